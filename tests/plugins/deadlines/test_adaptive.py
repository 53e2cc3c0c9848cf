"""An adaptive deadline: by hand, growing out of a deadline that was too short, and settling near the oracle's."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.deadline import Arrivals, State
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.deadlines.adaptive import Adaptive


def a_round(*seconds: float, asked: int, ended: float, target: int | None = None, unknown: int = 0) -> Arrivals:
    return Arrivals(1, asked, target or asked, np.array(sorted(seconds)), ended, ended, unknown)


def learn(deadline: Adaptive, *rounds: Arrivals) -> tuple[State, list[str]]:
    state, said = deadline.init(), []
    for each in rounds:
        state, why = deadline.learn(state, each)
        said.append(why)
    return state, said


BY_HAND = Adaptive(first=12.4, share=0.75, quantile=0.5, window=3, slack=1.5, growth=2.0, least=0.1, most=100.0)


def test_by_hand() -> None:
    # Three of four are enough: 5 s, 3 s, 4 s, 1 s; half of the last three rounds had them within 5, 5, 4 and 3 s.
    rounds = [a_round(1, 2, each, 9, asked=4, ended=12.0) for each in (5.0, 3.0, 4.0)] + [
        a_round(0.5, 0.6, 1.0, asked=4, ended=12.0)
    ]
    limits, state = [], BY_HAND.init()
    for each in rounds:
        state, _ = BY_HAND.learn(state, each)
        limits.append(BY_HAND.limit(state))
    assert limits == [7.5, 7.5, 6.0, 4.5]


def test_why_is_said_in_a_sentence() -> None:
    _, said = learn(BY_HAND, a_round(1, 2, 5, asked=4, ended=12.4), a_round(1, 2, asked=4, ended=7.5))
    assert said[0] == "deadline 12.4 s → 7.5 s: the only round so far had enough updates within 5 s"
    assert said[1] == (
        "deadline 7.5 s → 22.5 s: 50% of the last 2 rounds had enough updates within 15 s, of which 1 did not get as "
        "many and are taken as 2 times as long"
    )


def test_a_small_change_is_left() -> None:
    state, said = learn(BY_HAND, a_round(1, 2, 8.2, asked=4, ended=12.4), a_round(1, 2, 8.3, asked=4, ended=12.4))
    assert said == ["", ""]
    assert BY_HAND.limit(state) == 12.4
    assert state["needed"].tolist() == [8.2, 8.3]


def test_the_target_is_enough_where_more_were_asked() -> None:
    state, _ = learn(BY_HAND, a_round(1, 2, asked=4, ended=2.0, target=2))
    assert state["needed"].tolist() == [2.0]
    assert state["met"].tolist() == [True]


def test_a_round_whose_times_are_not_known_teaches_nothing() -> None:
    state, said = learn(BY_HAND, a_round(1, 2, asked=4, ended=12.4, unknown=1))
    assert (state["needed"].tolist(), said) == ([], [""])


def test_unknown_times_do_not_hide_that_too_few_came() -> None:
    state, _ = learn(BY_HAND, a_round(1, asked=4, ended=12.4, unknown=1))
    assert state["met"].tolist() == [False]


def test_it_stays_between_least_and_most() -> None:
    deadline = Adaptive(first=10.0, least=5.0, most=15.0, window=1)
    state, _ = learn(deadline, a_round(0.1, 0.1, asked=2, ended=10.0))
    assert deadline.limit(state) == 5.0
    state, _ = deadline.learn(state, a_round(asked=2, ended=12.0))
    assert deadline.limit(state) == 15.0


@pytest.mark.parametrize("first", [0.2, 500.0])
def test_it_settles_where_an_oracle_would_have_put_it(first: float) -> None:
    """The oracle sees all arrivals of all rounds, the late ones too, and takes the same quantile of them."""
    deadline = Adaptive(first=first, share=0.8, quantile=0.9, window=40, slack=1.2, least=0.1)
    draws, state, needed, limits = Draws(3), deadline.init(), [], []
    for round in range(1, 301):
        limit = deadline.limit(state)
        seconds = np.sort(np.exp(draws.normal("arrival", round, np.arange(100))))
        needed.append(float(seconds[79]))
        ended = min(limit, float(seconds[-1]))
        state, _ = deadline.learn(state, Arrivals(round, 100, 100, seconds[seconds < limit], ended, limit))
        limits.append(limit)
    oracle = 1.2 * float(np.quantile(needed, 0.9, method="higher"))
    assert limits[-1] == pytest.approx(oracle, rel=0.15)
    assert np.mean(np.array(needed[100:]) < limits[100:]) > 0.9


def test_it_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    rounds = [a_round(1.0 * each, 2.0 * each, asked=2, ended=12.0) for each in range(1, 8)]
    whole, _ = learn(BY_HAND, *rounds)
    half, _ = learn(BY_HAND, *rounds[:4])
    for each in rounds[4:]:
        half, _ = BY_HAND.learn({name: np.array(value) for name, value in half.items()}, each)
    assert_same_bits(half, whole)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"quantile": 1.1}, "quantile must be above 0 and at most 1"),
        ({"slack": 0.9}, "slack must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"growth": 1.0}, "could never grow"),
        ({"tolerance": 1.0}, "tolerance must be"),
        ({"least": 5.0, "first": 4.0}, "in that order"),
        ({"first": 4_000.0}, "in that order"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Adaptive(**settings)  # type: ignore[arg-type]
