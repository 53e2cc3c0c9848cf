"""What every aggregator promises."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.aggregation import Aggregator, Instructed, Rooted, folded
from fedtower.core.errors import RowsNotSupported, UpdateError
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, Untouched, assert_close, assert_same_bits, not_promised
from fedtower.core.updates import Updates, stack


class AggregatorPromises(Promises):
    """``make`` gives an aggregator. One that cannot fold rows raises ``RowsNotSupported`` and is tested without.

    ``shortens`` is true of one that shortens what is longer than a bound of its own: who is alone, or agrees with
    everybody, is then not returned as she is.
    """

    shortens: ClassVar[bool] = False

    @pytest.fixture
    def cohort(self) -> Updates:
        """A cohort of seven, with rows if the aggregator folds them."""
        block = examples.updates(7)
        try:
            self.fold(block)
        except RowsNotSupported:
            return examples.updates(7, rows=False)
        return block

    @pytest.fixture(params=["ordinary", "cancelling"])
    def any_cohort(self, cohort: Updates, request: pytest.FixtureRequest) -> Updates:
        """That cohort, and one whose large deltas cancel, where a sum of floats shows its order."""
        return cohort if request.param == "ordinary" else examples.cancelling(rows=bool(cohort.rows))

    def fold(self, *blocks: Updates, root: Updates | None = None) -> Updates:
        """The total of a first round; ``root`` is what the server itself makes of the plan, for who asks for it."""
        total, _ = self.briefed(root).fold(iter(blocks), {})
        return total

    def briefed(self, root: Updates | None = None) -> Aggregator:
        """The aggregator, told what a round tells it."""
        aggregator: Aggregator = self.made()
        if isinstance(aggregator, Instructed):
            aggregator = aggregator.instructed(examples.plan())
        if isinstance(aggregator, Rooted):
            aggregator = aggregator.rooted(examples.updates(1, seed=9) if root is None else root)
        return aggregator

    def test_a_total_is_one_update(self, cohort: Updates) -> None:
        total = self.fold(cohort)
        assert total.weights.shape == (1,)
        assert np.isfinite(total.weights[0])
        assert total.weights[0] > 0
        assert set(total.dense) == set(cohort.dense)
        for name, delta in cohort.dense.items():
            assert total.dense[name].shape == (1, *delta.shape[1:]), name
            assert total.dense[name].dtype == np.float32, name
            assert np.all(np.isfinite(total.dense[name])), name

    def test_nothing_that_is_given_is_lost(self, cohort: Updates) -> None:
        folded(self.briefed(), iter([cohort]), {})

    def test_a_row_is_there_once_and_was_touched(self, cohort: Updates) -> None:
        for table, rows in self.fold(cohort).rows.items():
            assert rows.offsets.tolist() == [0, len(rows.row_ids)]
            assert np.all(np.diff(rows.row_ids) > 0), "the ids of a total are sorted and distinct"
            assert set(rows.row_ids.tolist()) <= set(cohort.rows[table].row_ids.tolist())
            assert rows.row_deltas.dtype == np.float32
            assert np.all(np.isfinite(rows.row_deltas))
            assert rows.row_weights is not None
            assert rows.row_weights.shape == rows.row_ids.shape
            assert np.all(rows.row_weights > 0)
            assert np.all(rows.row_weights <= self.fold(cohort).weights[0] * (1 + 1e-9))

    @pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]])
    def test_the_order_of_arrival_changes_no_bit(self, any_cohort: Updates, order: list[int]) -> None:
        assert_same_bits(self.fold(*(any_cohort.slice(i, i + 1) for i in order)), self.fold(any_cohort))

    @pytest.mark.parametrize("cuts", [[0, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7], [0, 0, 6, 7]])
    def test_the_width_of_blocks_changes_no_bit(self, any_cohort: Updates, cuts: list[int]) -> None:
        blocks = [any_cohort.slice(start, stop) for start, stop in pairwise(cuts)]
        assert_same_bits(self.fold(*blocks), self.fold(any_cohort))

    def test_a_single_client_is_returned_as_it_is(self, cohort: Updates) -> None:
        self.unless_it_shortens()
        alone = cohort.slice(2, 3)
        _assert_says(self.fold(alone, root=alone), alone)

    def test_clients_that_agree_get_what_they_agree_on(self, cohort: Updates) -> None:
        self.unless_it_shortens()
        one = cohort.slice(4, 5)
        ids = np.arange(5, dtype=np.int64)
        agreeing = replace(stack([one] * 5), clients=ids, weights=np.arange(1.0, 6.0))
        _assert_says(self.fold(agreeing, root=one), one)

    def test_the_unit_of_weights_does_not_matter(self, cohort: Updates) -> None:
        one, other = self.fold(cohort), self.fold(replace(cohort, weights=cohort.weights * 4))
        assert_close(other.dense, one.dense)
        for table, rows in one.rows.items():
            assert_close(other.rows[table].row_deltas, rows.row_deltas)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_never_reaches_the_total(self, cohort: Updates, bad: float) -> None:
        poisoned = deepcopy(cohort)
        poisoned.dense["tower.bias"][3, 1] = bad
        for rows in poisoned.rows.values():
            rows.row_deltas[rows.offsets[3]] = bad
        try:
            total = self.fold(poisoned)
        except UpdateError:
            return
        spoilt = [name for name, delta in total.dense.items() if not np.all(np.isfinite(delta))]
        spoilt += [table for table, rows in total.rows.items() if not np.all(np.isfinite(rows.row_deltas))]
        assert not spoilt, (
            f"client 3 sent {bad}, which reached the total of {spoilt}: raise UpdateError, or leave it out"
        )

    def test_order_and_width_change_no_bit_of_any_cohort(self, cohort: Updates) -> None:
        from fedtower.core.testing.laws import order_and_width_change_no_bit

        order_and_width_change_no_bit(self.fold, rows=bool(cohort.rows))

    def test_a_scale_is_followed(self, cohort: Updates) -> None:
        from fedtower.core.testing.laws import a_scale_is_followed

        self.unless_it_shortens()
        a_scale_is_followed(self.fold, rows=bool(cohort.rows))

    def test_whoever_is_alone_is_returned_as_it_is(self, cohort: Updates) -> None:
        from fedtower.core.testing.laws import one_client_is_returned

        self.unless_it_shortens()
        one_client_is_returned(self.fold, rows=bool(cohort.rows))

    def test_a_row_is_folded_as_a_parameter_is(self, cohort: Updates) -> None:
        from fedtower.core.testing.laws import a_row_is_folded_as_a_parameter_is

        if not cohort.rows:
            not_promised("it folds no rows")
        a_row_is_folded_as_a_parameter_is(self.fold)

    def unless_it_shortens(self) -> None:
        """End a test of what an aggregator that shortens updates does not promise."""
        if self.shortens:
            not_promised("it shortens what is longer than its bound")

    def test_nothing_to_fold_is_refused(self) -> None:
        with pytest.raises(UpdateError):
            self.fold()

    def test_inputs_are_left_alone_and_a_repetition_gives_the_same(self, cohort: Updates) -> None:
        with Untouched(cohort):
            once = self.fold(cohort)
        assert_same_bits(self.fold(cohort), once)

    def test_a_state_can_be_kept_and_goes_on_alike(self, cohort: Updates) -> None:
        aggregator = self.briefed()
        _, state = aggregator.fold(iter([cohort]), {})
        kept = _stored(state)
        with Untouched(state):
            following = aggregator.fold(iter([examples.updates(5, rows=bool(cohort.rows), seed=2)]), state)
        again = self.briefed().fold(iter([examples.updates(5, rows=bool(cohort.rows), seed=2)]), kept)
        assert_same_bits(again, following)


def _assert_says(total: Updates, client: Updates) -> None:
    """The total's deltas are this one client's, up to the grid on which sums are exact."""
    for name, delta in client.dense.items():
        assert_close(total.dense[name], delta, f"dense[{name!r}]")
    for table, rows in total.rows.items():
        assert_close(rows.row_ids, client.rows[table].row_ids, f"the row ids of {table!r}")
        assert_close(rows.row_deltas, client.rows[table].row_deltas, f"the row deltas of {table!r}")


def _stored(state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The state as a checkpoint gives it back."""
    assert all(isinstance(value, np.ndarray) for value in state.values()), "a state holds numpy arrays"
    return {str(name): np.array(value) for name, value in state.items()}
