"""What every offered recipe promises."""

from __future__ import annotations

import tomllib

import pytest
import tomli_w

from fedtower.core.errors import RecipeError
from fedtower.core.recipe import Recipe, check, parse_recipe
from fedtower.core.registry import discover
from fedtower.core.testing.promises import Promises


class RecipePromises(Promises):
    """``make`` gives the recipe: ``make = lambda: load_recipe("my-recipe")``."""

    def test_it_survives_a_round_trip_through_toml(self) -> None:
        recipe: Recipe = self.made()
        assert parse_recipe(tomllib.loads(tomli_w.dumps(recipe.to_dict()))) == recipe

    def test_every_part_is_installed_and_accepts_its_settings(self) -> None:
        check(self.made(), discover())

    @pytest.mark.parametrize("mode", ["simulated", "standalone"])
    def test_the_mode_is_one_word(self, mode: str) -> None:
        recipe: Recipe = self.made()
        assert parse_recipe({**recipe.to_dict(), "mode": mode}).mode == mode

    def test_a_misspelt_key_is_refused(self) -> None:
        recipe: Recipe = self.made()
        with pytest.raises(RecipeError, match="did you mean 'rounds'"):
            parse_recipe({**recipe.to_dict(), "ruonds": 3})
