"""ER@K by hand: three users, five items, and one score for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.recipe import EvaluationSettings
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.exposure import exposure
from fedtower.recsys.metrics import ScoreError
from fedtower.recsys.splits import make_split

HISTORIES = [[0, 1, 2], [1, 2, 4], [0, 1, 3]]
SCORES = np.array([[9, 9, 9, 2, 1], [5, 0, 0, 2, 0], [0, 0, 9, 0, 8]], dtype=np.float32)


class Fixed:
    """The scores above, whatever is asked."""

    def __init__(self, scores: Any = SCORES) -> None:
        self.scores = np.asarray(scores, dtype=np.float32)

    def score(self, clients: Any, cut: Any, candidates: Any) -> Any:
        raise AssertionError("exposure looks at the whole catalogue")

    def score_all(self, clients: Any, cut: Any) -> Any:
        return self.scores[clients]


@pytest.fixture
def shown(population_of: Callable[..., EventTable]) -> Callable[..., dict[str, float]]:
    def ask(item: int, clients: tuple[int, ...] = (0, 1, 2), scores: Any = SCORES, size: int = 512) -> dict[str, float]:
        population = population_of(HISTORIES, 5)
        split = make_split("leave_two_out", population, validation=True, draws=Draws(1), min_events=3)
        settings = EvaluationSettings(k=(1, 2), batch_size=size)
        return exposure(Fixed(scores), population, split, "test", settings, np.array(clients), item)

    return ask


def test_it_is_the_share_of_lists_with_the_item(shown: Callable[..., dict[str, float]]) -> None:
    """Of what they did not touch, user 0 is shown 3 and then 4, and user 1 is shown 0 and then 3; user 2 touched 3."""
    assert shown(3) == {"ER@1": 0.5, "ER@2": 1.0}


def test_only_those_who_are_asked_for_count_however_many_at_a_time(shown: Callable[..., dict[str, float]]) -> None:
    assert shown(3, (1, 2)) == shown(3, (1, 2), size=1) == {"ER@1": 0.0, "ER@2": 1.0}


def test_a_tie_counts_against_the_item(shown: Callable[..., dict[str, float]]) -> None:
    assert shown(4, (0,), np.zeros((3, 5))) == {"ER@1": 0.0, "ER@2": 1.0}


def test_where_everybody_has_touched_it_there_is_no_figure(shown: Callable[..., dict[str, float]]) -> None:
    assert np.isnan(shown(1)["ER@1"])


def test_scores_that_are_no_numbers_are_refused(shown: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(ScoreError, match="not a number"):
        shown(3, scores=np.full((3, 5), np.nan))
