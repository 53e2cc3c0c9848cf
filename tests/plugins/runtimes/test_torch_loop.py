"""torch_loop: the promises of a runtime, and what a device keeps to itself."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.runtimes.torch_loop.runtime import TorchLoop
from fedtower.recsys.testing.examples import Case, cases
from fedtower.recsys.testing.runtime import RuntimePromises

CASES = cases()
WITH_ROWS = pytest.mark.parametrize("case", [CASES["histories"], CASES["clicks"]], ids=lambda case: case.name)


class TestTorchLoop(RuntimePromises):
    make = TorchLoop


@WITH_ROWS
def test_what_lives_on_the_device_is_in_no_update(case: Case) -> None:
    plan, work = case.plan(), case.work()
    updates, states = TorchLoop().open(case.model, plan.local).train(plan, work)
    assert set(states) == {"own"}
    assert "own" not in updates.dense
    moved = np.abs(states["own"] - work.states["own"]).reshape(len(work), -1).sum(axis=1) > 0
    assert_same_bits(moved, work.steps > 0)


@WITH_ROWS
def test_a_row_that_no_step_uses_does_not_move(case: Case) -> None:
    plan, work = case.plan(), case.work()
    updates, _ = TorchLoop().open(case.model, plan.local).train(plan, work)
    source = case.model.source
    deltas, offsets = updates.rows[source].row_deltas, work.row_ids[source].offsets
    for client in range(len(work)):
        rows = np.arange(offsets[client + 1] - offsets[client])
        used = {int(at) for slots in work.slots.values() for at in slots[client, : work.steps[client]].ravel()}
        unused = [row for row in rows if row not in used]
        assert not deltas[offsets[client] : offsets[client + 1]][unused].any()
    assert deltas.any()


@WITH_ROWS
def test_frozen_rows_stay_as_they_were_fetched_from_step_to_step(case: Case) -> None:
    # With one step a visit the towers' updates cannot tell; with three they can.
    work = case.work()
    runtime = TorchLoop().open(case.model, case.plan().local)
    frozen, _ = runtime.train(case.plan(train_rows=False), work)
    still, _ = runtime.train(case.plan(row_lr=0.0), work)
    moving, _ = runtime.train(case.plan(), work)
    assert_same_bits(dict(frozen.dense), dict(still.dense))
    assert any(not np.array_equal(frozen.dense[name], moving.dense[name]) for name in frozen.dense)
