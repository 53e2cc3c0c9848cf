"""Shares of a batch: together they are the batch, and what stands in for nobody has no weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedtower.core.draws import Draws
from fedtower.core.rows import localise
from fedtower.core.runtime import Work
from fedtower.recsys.processes import Processes
from fedtower.recsys.share import Share

DRAWS = Draws(4)


def batch_of(axis: int, size: int) -> Work:
    """One step of ``size`` users with 3 targets and 5 slots each, or of one pool of ``size`` examples with 2 slots."""
    shape = (size, 1, 3) if axis == 0 else (1, 1, size)
    slots = (size, 1, 5) if axis == 0 else (1, 1, size, 2)
    ids = DRAWS.integers(9, "ids", np.arange(np.prod(slots))).reshape(slots)
    needed, where = localise(ids.reshape(slots[0], -1))
    inputs = {
        "weight": DRAWS.integers(2, "weight", np.arange(np.prod(shape))).reshape(shape).astype(np.float32),
        "label": np.arange(np.prod(shape), dtype=np.float32).reshape(shape),
    }
    count = np.full(slots[0], size)
    return Work(np.arange(slots[0]), np.ones_like(count), count, inputs, {"s": where.reshape(slots)}, {"item": needed})


@given(axis=some.sampled_from([0, 1]), size=some.integers(1, 12), count=some.integers(1, 5))
def test_shares_are_the_batch(axis: int, size: int, count: int) -> None:
    work = batch_of(axis, size)
    shares = [Share.of(work, axis, Processes(rank, count)) for rank in range(count)]
    assert len({len(share.positions) for share in shares}) == 1
    positions = np.concatenate([share.positions[share.real] for share in shares])
    assert positions.tolist() == list(range(size))
    for name, whole in work.inputs.items():
        parts = [np.compress(share.real, share.inputs()[name], axis=axis) for share in shares]
        assert np.array_equal(np.concatenate(parts, axis=axis), whole[:, 0])
    for share in shares:
        assert not np.compress(~share.real, share.inputs()["weight"], axis=axis).any()


@given(axis=some.sampled_from([0, 1]), size=some.integers(1, 12), count=some.integers(1, 5))
def test_a_share_asks_for_its_own_rows_and_no_others(axis: int, size: int, count: int) -> None:
    work = batch_of(axis, size)
    needed, where = work.row_ids["item"], work.slots["s"][:, 0]
    offsets = needed.offsets[:-1].reshape(-1, *[1] * (where.ndim - 1))
    whole = needed.ids[offsets + where]
    for rank in range(count):
        share = Share.of(work, axis, Processes(rank, count))
        items, places = share.rows()
        mine = np.take(whole, share.positions, axis=axis)
        assert np.array_equal(items[places["s"]], mine)
        assert items.tolist() == np.unique(mine).tolist()


@pytest.mark.parametrize(("axis", "users"), [(0, [2, 3]), (1, [0])])
def test_whose_a_share_is(axis: int, users: list[int]) -> None:
    assert Share.of(batch_of(axis, 4), axis, Processes(1, 2)).users.tolist() == users
