"""A recipe is data: strict on the way in, whole on the way out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtower.core.checking import CheckSettings
from fedtower.core.errors import PluginError, RecipeError
from fedtower.core.recipe import Recipe, load_recipe, override_values, parse_recipe
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part

PLAIN: dict[str, Any] = {
    "name": "plain",
    "rounds": 3,
    "data": {"name": "synthetic", "users": 100},
    "model": {"name": "dssm", "dim": 8},
    "local": {"steps": 1},
    "cohort": {"name": "uniform", "size": 5},
    "server": {"optimizer": "adam", "lr": 0.005, "beta1": 0.8},
}


@pytest.fixture
def registry() -> Registry:
    return discover()


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "plain.toml"
    file.write_text(tomli_w.dumps({**PLAIN, **changes}))
    return file


def test_a_section_names_its_part_and_holds_its_settings() -> None:
    recipe = parse_recipe(PLAIN)
    assert recipe.data.part == Part("synthetic", {"users": 100})
    assert recipe.server.part == Part("adam", {"beta1": 0.8})
    assert (recipe.server.lr, recipe.server.decay) == (0.005, "none")
    assert recipe.cohort.part == Part("uniform", {"size": 5})


def test_it_survives_a_round_trip_through_toml() -> None:
    recipe = parse_recipe({**PLAIN, "transforms": [{"name": "clip", "norm": 1.0}], "evaluation": {"k": [5, 10]}})
    assert parse_recipe(tomllib.loads(tomli_w.dumps(recipe.to_dict()))) == recipe


def test_loading_writes_out_the_settings_of_every_part(tmp_path: Path, registry: Registry) -> None:
    recipe = load_recipe(written(tmp_path), registry=registry)
    assert recipe.server.part.settings == {"beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "correction": True}
    assert recipe.data.part.settings["users"] == 100
    assert set(recipe.data.part.settings) > {"users", "items"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ruonds=3", "ruonds is not a setting of Recipe .did you mean 'rounds'"),
        ("local.stpes=3", r"local\.stpes is not a setting of LocalSettings .did you mean 'steps'"),
        ("cohort.sise=3", r"cohort\.sise is not a setting of Uniform .did you mean 'size'"),
        ("server.beat1=3", r"server\.beat1 is not a setting of Adam .did you mean 'beta1'"),
        ("aggregator.name=fedagv", "no plugin offers the aggregator 'fedagv' .did you mean 'fedavg'"),
        ("transforms.0.name=clpi", "no plugin offers the transform 'clpi' .did you mean 'clip'"),
        ("transforms.0.name=clip", r"transforms\.0\.norm is missing: float, the longest that an update may be"),
        ("transforms.3.name=clip", r"transforms\.3 is not there: the list has 0 entries"),
        ("rounds.x=1", "rounds.x cannot be set: rounds is 3"),
        ("rounds.x.y=1", "rounds.x is not there: what should hold it is 3"),
        ("rounds=many", "rounds must be int, but is 'many'"),
        ("rounds=0", "rounds must be at least 1, but is 0"),
        ("evaluation.k=[]", r"evaluation\.k must be list lengths"),
        ("signer=wax", "no plugin offers the signer 'wax'"),
        ("mode=standalon", "did you mean 'standalone'"),
        ("local.negatives_from=any", r'local\.negatives_from must be "untouched" or "untrained", but is \'any\''),
        ("rounds", "an override is key=value"),
        ("=3", "an override is key=value"),
    ],
)
def test_a_mistake_is_refused_where_it_stands(tmp_path: Path, registry: Registry, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path), [override], registry)


def test_values_of_overrides_are_toml_or_else_strings() -> None:
    changed = override_values(PLAIN, ["rounds=7", "device=cuda", 'name="7"', "evaluation.k=[5, 10]", "data.version=1m"])
    assert (changed["rounds"], changed["device"], changed["name"]) == (7, "cuda", "7")
    assert changed["evaluation"] == {"k": [5, 10]}
    assert changed["data"]["version"] == "1m"
    assert PLAIN["rounds"] == 3


def test_a_value_cannot_smuggle_in_other_keys() -> None:
    assert override_values({}, ["name=1\nrounds = 9"]) == {"name": "1\nrounds = 9"}


def test_naming_another_part_drops_the_settings_of_the_old_one() -> None:
    changed = override_values(PLAIN, ["server.optimizer=sgd", "cohort.name=poisson", "data.name=mine"])
    assert changed["server"] == {"optimizer": "sgd", "lr": 0.005}
    assert changed["cohort"] == {"name": "poisson"}
    assert changed["data"] == {"name": "mine"}


def test_naming_the_same_part_keeps_its_settings() -> None:
    assert override_values(PLAIN, ["server.optimizer=adam"])["server"] == PLAIN["server"]


@pytest.mark.parametrize("swapped", [False, True])
def test_settings_of_the_new_part_stay_whichever_is_typed_first(swapped: bool) -> None:
    overrides = ["cohort.name=poisson", "cohort.client_rate=0.1"]
    changed = override_values(PLAIN, overrides[::-1] if swapped else overrides)
    assert changed["cohort"] == {"name": "poisson", "client_rate": 0.1}


def test_an_optimizer_that_is_no_part_is_an_ordinary_key() -> None:
    changed = override_values({"rows": {"optimizer": "sgd", "lr": 1.0}}, ["rows.optimizer=rowwise_adagrad"])
    assert changed == {"rows": {"optimizer": "rowwise_adagrad", "lr": 1.0}}


def test_a_transform_can_be_appended(tmp_path: Path, registry: Registry) -> None:
    recipe = load_recipe(written(tmp_path), ["transforms.0.name=clip", "transforms.0.norm=2"], registry)
    assert recipe.transforms == (Part("clip", {"norm": 2.0}),)


def test_an_unknown_name_names_the_nearest(registry: Registry) -> None:
    with pytest.raises(RecipeError, match="did you mean 'dssm-synthetic'"):
        load_recipe("dsm-synthetic", registry=registry)


def test_a_file_that_is_not_there_names_what_is(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read .* or one of .*dssm-synthetic"):
        load_recipe(tmp_path / "nothing.toml", registry=registry)


def test_a_run_folder_is_told_where_its_recipe_is(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "recipe.toml").write_text("rounds = 3\n")
    with pytest.raises(RecipeError, match=r"is a folder; .* give its recipe: .*recipe\.toml"):
        load_recipe(str(tmp_path), registry=registry)


@pytest.mark.parametrize("content", [b"rounds = = 3", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, registry: Registry, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.toml"):
        load_recipe(tmp_path / "bad.toml", registry=registry)


def test_the_recipe_can_block_plugins(tmp_path: Path, registry: Registry) -> None:
    file = written(tmp_path, plugins={"block": ["transform-clip"]})
    load_recipe(file, registry=registry)
    assert "clip" not in [offer.name for offer in registry.offers("transform")]
    with pytest.raises(RecipeError, match=r"blocked by the recipe's \[plugins\]"):
        load_recipe(file, ["transforms.0.name=transform-clip"], registry)


def test_blocking_what_is_not_installed_is_a_mistake(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(PluginError, match=r"names the plugin 'transform-clpi', which is not installed .did you mean"):
        load_recipe(written(tmp_path, plugins={"block": ["transform-clpi"]}), registry=registry)


def test_the_plugins_beside_a_recipe_count(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "fedtower_plugins.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedtower.core.hooks import hookimpl\n"
        "from fedtower.plugins.aggregators.fedavg import FedAvg\n"
        "class Mine(FedAvg):\n    pass\n"
        "@hookimpl\n"
        "def fedtower_register(registry):\n"
        "    registry.aggregator('mine', 'fedtower_plugins:Mine')\n"
    )
    recipe = load_recipe(written(tmp_path, aggregator={"name": "mine"}), registry=registry)
    assert type(registry.make("aggregator", recipe.aggregator)).__name__ == "Mine"
    assert registry.folder == tmp_path.resolve()


@pytest.mark.parametrize("name", ["dssm-synthetic", "dssm-ml-100k", "dssm-ml-1m"])
def test_shipped_recipes_load_by_name(name: str, registry: Registry) -> None:
    recipe = load_recipe(name, registry=registry)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name


@pytest.mark.parametrize("bound", ["max_norm", "max_examples"])
def test_a_bound_that_nothing_can_keep_is_refused(bound: str) -> None:
    with pytest.raises(RecipeError, match=rf"checks\.{bound} must be above 0, not 0.*leave it out"):
        CheckSettings(**{bound: 0})
