"""torch_loop: the promises of a runtime, and what a device keeps to itself."""

from __future__ import annotations

import numpy as np

from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.runtimes.torch_loop.runtime import TorchLoop
from fedtower.recsys.testing.examples import small_model, small_plan, small_work
from fedtower.recsys.testing.runtime import RuntimePromises


class TestTorchLoop(RuntimePromises):
    make = TorchLoop


def test_what_lives_on_the_device_is_in_no_update() -> None:
    model = small_model()
    plan, work = small_plan(model), small_work(model)
    updates, states = TorchLoop().open(model, plan.local).train(plan, work)
    assert set(states) == {"own"}
    assert "own" not in updates.dense
    moved = np.abs(states["own"] - work.states["own"]).sum(axis=1) > 0
    assert_same_bits(moved, work.steps > 0)


def test_a_row_that_no_step_uses_does_not_move() -> None:
    model = small_model()
    plan, work = small_plan(model), small_work(model)
    updates, _ = TorchLoop().open(model, plan.local).train(plan, work)
    deltas, offsets = updates.rows["item"].row_deltas, work.row_ids["item"].offsets
    for client in range(len(work)):
        rows = np.arange(offsets[client + 1] - offsets[client])
        used = {int(at) for slots in work.slots.values() for at in slots[client, : work.steps[client]].ravel()}
        unused = [row for row in rows if row not in used]
        assert not deltas[offsets[client] : offsets[client + 1]][unused].any()
    assert deltas.any()


def test_frozen_rows_stay_as_they_were_fetched_from_step_to_step() -> None:
    # With one step a visit the towers' updates cannot tell; with three they can.
    model = small_model()
    work = small_work(model)
    frozen, _ = TorchLoop().open(model, small_plan(model).local).train(small_plan(model, train_rows=False), work)
    still, _ = TorchLoop().open(model, small_plan(model).local).train(small_plan(model, row_lr=0.0), work)
    moving, _ = TorchLoop().open(model, small_plan(model).local).train(small_plan(model), work)
    assert_same_bits(dict(frozen.dense), dict(still.dense))
    assert any(not np.array_equal(frozen.dense[name], moving.dense[name]) for name in frozen.dense)
