"""What every deadline promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fedtower.core.deadline import Arrivals, Deadline, State
from fedtower.core.draws import Draws
from fedtower.core.testing.promises import Promises, Untouched, assert_same_bits


def rounds(limit: float, spread: float = 1.0, seed: int = 7) -> Iterator[Arrivals]:
    """Thirty rounds of twenty clients, of whom some are late; ``limit`` is what each round was given."""
    draws = Draws(seed)
    for round in range(1, 31):
        seconds = np.sort(np.exp(spread * draws.normal("arrival", round, np.arange(20))))
        yield Arrivals(round, 20, 16, seconds[seconds < limit], limit, limit)


class DeadlinePromises(Promises):
    """``make`` gives a deadline."""

    def after(self, arrivals: Iterator[Arrivals]) -> tuple[State, list[str]]:
        """The state after these rounds, and what was said."""
        deadline: Deadline = self.made()
        state, said = deadline.init(), []
        for each in arrivals:
            state, why = deadline.learn(state, each)
            said.append(why)
        return state, said

    @pytest.mark.parametrize("limit", [0.1, 2.0, 1e6])
    def test_a_round_always_has_some_time(self, limit: float) -> None:
        deadline: Deadline = self.made()
        state = deadline.init()
        assert np.isfinite(deadline.limit(state))
        assert deadline.limit(state) > 0
        for each in rounds(limit):
            state, _ = deadline.learn(state, each)
            assert np.isfinite(deadline.limit(state))
            assert deadline.limit(state) > 0

    @pytest.mark.parametrize("limit", [0.1, 2.0, 1e6])
    def test_a_change_is_said_and_nothing_else_is(self, limit: float) -> None:
        deadline: Deadline = self.made()
        state = deadline.init()
        for each in rounds(limit):
            before = deadline.limit(state)
            state, why = deadline.learn(state, each)
            assert (deadline.limit(state) != before) == bool(why)

    def test_the_same_rounds_teach_the_same(self) -> None:
        assert_same_bits(self.after(rounds(2.0)), self.after(rounds(2.0)))

    def test_it_goes_on_from_a_saved_state(self) -> None:
        first: Deadline = self.made()
        state = first.init()
        for each in rounds(2.0):
            saved = {name: np.array(value) for name, value in state.items()}
            state, why = first.learn(state, each)
            again: Deadline = self.made()
            assert_same_bits(again.learn(saved, each), (state, why))

    def test_what_goes_in_is_left_alone(self) -> None:
        deadline: Deadline = self.made()
        state = deadline.init()
        for each in rounds(2.0):
            with Untouched(state, each):
                state, _ = deadline.learn(state, each)

    def test_the_state_can_be_saved_and_does_not_grow_forever(self) -> None:
        state, _ = self.after(rounds(2.0))
        assert all(isinstance(value, np.ndarray) and value.dtype != object for value in state.values())
        more = list(rounds(2.0)) * 10
        size = sum(value.nbytes for value in self.after(iter(more))[0].values())
        assert size <= sum(value.nbytes for value in state.values())

    def test_rounds_in_which_nobody_was_asked_or_heard_are_no_error(self) -> None:
        nobody = Arrivals(1, 0, 0, np.zeros(0), 0.5, None)
        silent = Arrivals(2, 20, 20, np.zeros(0), 5.0, 5.0)
        unknown = Arrivals(3, 20, 20, np.zeros(0), 5.0, 5.0, unknown=20)
        deadline: Deadline = self.made()
        state = deadline.init()
        for each in (nobody, silent, unknown):
            state, _ = deadline.learn(state, each)
            assert deadline.limit(state) > 0
