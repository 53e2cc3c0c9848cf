"""The fast runtime: the numbers of the plain loop, and the same bits whatever the block and the workers."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.client import ClientSide, Preparing
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Lookup, Work
from fedtower.core.store import ClientStore
from fedtower.core.testing.promises import assert_close, assert_same_bits
from fedtower.core.updates import Updates, stack
from fedtower.plugins.runtimes.torch_loop.runtime import TorchLoop
from fedtower.plugins.runtimes.vectorized import compiled
from fedtower.plugins.runtimes.vectorized.crew import Crew, WorkerDied, WorkerFailed
from fedtower.plugins.runtimes.vectorized.processes import Process
from fedtower.plugins.runtimes.vectorized.runtime import FEWEST_ROWS, Vectorized, by_rows
from fedtower.plugins.runtimes.vectorized.schedule import Schedule
from fedtower.recsys.testing.examples import Case, cases
from fedtower.recsys.testing.runtime import RuntimePromises

CASES = cases()
PLAIN = Vectorized(compile=False)


class TestOperationByOperation(RuntimePromises):
    @staticmethod
    def make() -> Vectorized:
        return PLAIN


class TestWorkers(RuntimePromises):
    @staticmethod
    def make() -> Vectorized:
        return Vectorized(compile=False, workers=2)


@pytest.mark.soak  # it compiles some forty graphs
class TestCompiled(RuntimePromises):
    make = Vectorized


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def runtime(request: pytest.FixtureRequest) -> Vectorized:
    return Vectorized(compile=request.param)


@dataclass(frozen=True)
class Given:
    """Clients whose work is made already: client c has place c of it."""

    whole: Work

    def work(self, plan: Plan, clients: NDArray[np.int64]) -> Work:
        return replace(take(self.whole, clients), rows={}, states={})


def take(work: Work, clients: NDArray[np.int64]) -> Work:
    """The work of some clients, in this order."""
    row_ids, rows = {}, {}
    for source, needed in work.row_ids.items():
        parts = [slice(*needed.offsets[client : client + 2]) for client in clients]
        offsets = np.concatenate([[0], np.cumsum([part.stop - part.start for part in parts])]).astype(np.int64)
        row_ids[source] = RowIds(offsets, np.concatenate([needed.ids[part] for part in parts]))
        rows[source] = np.concatenate([work.rows[source][part] for part in parts])
    return Work(
        work.clients[clients],
        work.steps[clients],
        work.examples[clients],
        {name: value[clients] for name, value in work.inputs.items()},
        {name: value[clients] for name, value in work.slots.items()},
        row_ids,
        rows,
        {name: value[clients] for name, value in work.states.items()},
    )


def in_blocks(runtime: Vectorized, case: Case, plan: Plan, work: Work, size: int) -> Updates:
    opened = runtime.open(case.model, plan.local)
    places = np.arange(len(work))
    blocks = [opened.train(plan, take(work, places[at : at + size]))[0] for at in range(0, len(work), size)]
    if isinstance(opened, Crew):
        opened.close()
    return stack(blocks)


def test_the_same_bits_in_blocks_of_1_7_and_64_and_with_2_workers(case: Case, runtime: Vectorized) -> None:
    plan, work = case.plan(), case.work(clients=64)
    whole = in_blocks(runtime, case, plan, work, 64)
    for size in (1, 7):
        assert_same_bits(in_blocks(runtime, case, plan, work, size), whole)
    for size in (1, 7, 64):
        assert_same_bits(in_blocks(replace(runtime, workers=2), case, plan, work, size), whole)


def test_a_single_step_has_the_same_bits_whatever_the_block(case: Case, runtime: Vectorized) -> None:
    plan, work = case.plan(steps=1), case.work(clients=40)
    work = replace(work, steps=np.minimum(work.steps, 1))
    whole = in_blocks(runtime, case, plan, work, 40)
    for size in (1, 7):
        assert_same_bits(in_blocks(runtime, case, plan, work, size), whole)


def test_it_agrees_with_the_plain_loop_to_a_millionth(case: Case, runtime: Vectorized) -> None:
    plan, work = case.plan(), case.work(clients=20)
    loop, _ = TorchLoop().open(case.model, plan.local).train(plan, work)
    fast, _ = runtime.open(case.model, plan.local).train(plan, work)
    scale = max(float(np.abs(delta).max()) for delta in loop.dense.values())
    assert_close(fast, loop, rtol=1e-6, atol=1e-6 * scale)


def test_ragged_clients_fill_few_lanes_in_vain() -> None:
    steps = np.where(np.arange(40) == 39, 24, 3)  # the longest comes last
    schedule = Schedule.of(np.arange(40), steps, lanes=8)
    assert len(schedule) == 24, "a lane stood empty while clients waited, or the longest visit began late"
    assert schedule.busy.sum() == steps.sum()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 8))
def test_a_client_makes_all_its_steps_in_one_lane_in_order(given_steps: list[int], lanes: int) -> None:
    steps = np.array(given_steps)
    clients = np.arange(len(steps)) * 3 + 1
    schedule = Schedule.of(clients, steps, lanes)
    for client, count in zip(clients, steps, strict=True):
        turn, lane = np.nonzero(schedule.busy & (schedule.client == client))
        assert set(lane.tolist()) == {lane[0]}
        assert np.diff(turn).tolist() == [1] * (count - 1)
        assert schedule.step[turn, lane].tolist() == list(range(count))
        assert schedule.last[turn, lane].tolist() == [False] * (count - 1) + [True]
    assert schedule.busy.sum() == steps.sum()
    assert schedule.last.sum() == len(clients)


def test_rows_are_padded_to_few_sizes() -> None:
    lengths = np.array([0, 1, FEWEST_ROWS, FEWEST_ROWS + 1, 5 * FEWEST_ROWS])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    none = np.zeros(len(lengths), dtype=np.int64)
    work = Work(none, none, none, {}, {}, {"item": RowIds(offsets, np.zeros(offsets[-1], dtype=np.int64))})
    groups = {width: clients.tolist() for width, clients in by_rows(work)}
    assert groups == {FEWEST_ROWS: [0, 1, 2], 2 * FEWEST_ROWS: [3], 8 * FEWEST_ROWS: [4]}


def test_a_second_run_compiles_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, work = case.plan(), case.work()
    first, _ = Vectorized().open(case.model, plan.local).train(plan, work)
    monkeypatch.setattr(compiled, "_compile", lambda *arguments: pytest.fail("it was compiled again"))
    monkeypatch.setattr(compiled, "_warn_once", lambda reason: pytest.fail(reason))
    again, _ = Vectorized().open(case.model, plan.local).train(plan, work)
    assert_same_bits(again, first)


def test_without_a_compiler_it_runs_and_says_why_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["clicks"]
    plan, work = case.plan(), case.work()
    monkeypatch.setattr(compiled, "cache_folder", lambda: tmp_path)
    compiled._warn_once.cache_clear()
    # The compiler's own way of patching its settings: pytest's would take the setting away from every later test.
    absent = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with absent, caplog.at_level(logging.WARNING, logger="fedtower.vectorized"):
        for _ in range(2):
            slow, _ = Vectorized().open(case.model, plan.local).train(plan, work)
    assert len(caplog.records) == 1
    assert "could not be compiled" in caplog.text
    assert "g++" in caplog.text
    lanes = Vectorized(compile=False, lanes=8)
    assert_same_bits(slow, lanes.open(case.model, plan.local).train(plan, work)[0])


@pytest.fixture
def crew() -> Iterator[tuple[Case, Plan, Work, Crew]]:
    case = CASES["clicks"]
    plan, work = case.plan(), case.work(clients=9)
    opened = Vectorized(compile=False, workers=2).open(case.model, plan.local)
    assert isinstance(opened, Crew)
    yield case, plan, work, opened
    opened.close()


def test_workers_prepare_what_they_train(crew: tuple[Case, Plan, Work, Crew]) -> None:
    case, plan, work, opened = crew
    assert isinstance(opened, Preparing)
    clients = np.array([1, 2, 3, 5, 8])
    prepared = opened.prepares(Given(work)).work(plan, clients)
    assert not prepared.inputs
    part = take(work, clients)
    updates, states = opened.train(plan, replace(prepared, rows=part.rows, states=part.states))
    wanted, own = PLAIN.open(case.model, plan.local).train(plan, part)
    assert_same_bits(updates, wanted)
    assert_same_bits(dict(states), dict(own))


def test_a_worker_s_error_is_raised_here(crew: tuple[Case, Plan, Work, Crew]) -> None:
    _, plan, work, opened = crew
    with pytest.raises(TypeError) as raised:  # what Given says of a client that it does not have
        opened.prepares(Given(work)).work(plan, np.array([3, 1_000]))
    assert "worker process" in raised.value.__notes__[0]
    assert len(opened.work(plan, np.array([3, 4])).clients) == 2, "it goes on afterwards"


class Unsendable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("not to be sent")


@dataclass(frozen=True)
class Refusing:
    def work(self, plan: Plan, clients: NDArray[np.int64]) -> Work:
        raise Unsendable("no such client")


def test_an_error_that_cannot_be_sent_is_told_of(crew: tuple[Case, Plan, Work, Crew]) -> None:
    _, plan, _, opened = crew
    with pytest.raises(WorkerFailed, match="no such client"):
        opened.prepares(Refusing()).work(plan, np.array([3, 4]))


def test_another_worker_does_the_share_of_a_killed_one_again(
    crew: tuple[Case, Plan, Work, Crew], caplog: pytest.LogCaptureFixture
) -> None:
    case, plan, work, opened = crew
    clients = np.arange(9)
    prepared = opened.prepares(Given(work)).work(plan, clients)
    victim = opened._workers[1]
    assert isinstance(victim, Process)
    assert victim.process.pid is not None
    os.kill(victim.process.pid, signal.SIGKILL)
    updates, states = opened.train(plan, replace(prepared, rows=work.rows, states=work.states))
    wanted, own = PLAIN.open(case.model, plan.local).train(plan, work)
    assert_same_bits(updates, wanted)
    assert_same_bits(dict(states), dict(own))
    (said,) = (record.getMessage() for record in caplog.records if record.name == "fedtower.vectorized")
    assert re.search(r"worker 1 .* exit code -9 .*another one does its share again", said)


@dataclass(frozen=True)
class Deadly(Given):
    """Whoever prepares client 3 dies of it."""

    parent: int

    def work(self, plan: Plan, clients: NDArray[np.int64]) -> Work:
        if 3 in clients and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(plan, clients)


def test_a_second_death_is_told_of(crew: tuple[Case, Plan, Work, Crew]) -> None:
    _, plan, work, opened = crew
    with pytest.raises(WorkerDied, match=r"worker 0 .* exit code -9.*fedtower resume"):
        opened.prepares(Deadly(work, os.getpid())).work(plan, np.array([3, 4]))
    assert opened.work(plan, np.array([5, 4])).clients.tolist() == [5, 4], "it goes on with new workers"


def test_a_visit_is_the_same_with_workers(crew: tuple[Case, Plan, Work, Crew]) -> None:
    case, plan, work, opened = crew
    sides, stores = [], []
    for runtime in (PLAIN.open(case.model, plan.local), opened):
        data = runtime.prepares(Given(work)) if isinstance(runtime, Preparing) else Given(work)
        store = ClientStore(9)
        for name, value in case.model.device_parameters().items():
            store.declare(name, value)
        own = case.model.on_device
        stores.append(store)
        sides.append(ClientSide(data, runtime, Rows(), (), store, Hooks.none(), Draws(1), device_state=own))
    clients = np.arange(9)
    for _ in range(2):  # what stayed on the devices counts
        assert_same_bits(sides[1].visit(plan, clients), sides[0].visit(plan, clients))
        for side in sides:
            side.settle(clients, np.ones(9, dtype=bool))
    assert_same_bits(dict(stores[1].snapshot()), dict(stores[0].snapshot()))


class Rows:
    """Rows that are a function of their ids."""

    generation = 0

    def fetch(self, source: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(np.sin(ids[:, None] + np.arange(4)[None, :]), dtype=np.float32)

    def apply(self, deltas: object, lr_scale: float) -> None: ...
    def snapshot(self) -> dict[str, NDArray[np.float32]]:
        return {}

    def restore(self, arrays: object) -> None: ...


@pytest.mark.parametrize("settings", [{"workers": 0}, {"lanes": -1}, {"cluster": "locl"}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, int | str]) -> None:
    with pytest.raises(RecipeError, match="runtime"):
        Vectorized(**settings)  # type: ignore[arg-type]


def test_an_input_that_is_looked_up_is_as_good_as_a_whole_one() -> None:
    case = CASES["images"]
    plan, work = case.plan(), case.work(clients=20)
    dense = work.inputs["dense"]
    places = np.arange(int(np.prod(dense.shape[:3]))).reshape(dense.shape[:3])
    table = dense.reshape(-1, *dense.shape[3:])
    looked_up = replace(work, inputs={**work.inputs, "dense": Lookup(table, places)})  # type: ignore[dict-item]
    assert_same_bits(np.asarray(looked_up.inputs["dense"]), dense)
    for runtime in (TorchLoop(), Vectorized(compile=False, lanes=8)):
        whole, _ = runtime.open(case.model, plan.local).train(plan, work)
        assert_same_bits(runtime.open(case.model, plan.local).train(plan, looked_up)[0], whole)


@pytest.mark.parametrize("place", [-1, 10**6])
def test_looking_up_what_is_not_there_is_an_error(place: int) -> None:
    case = CASES["images"]
    plan, work = case.plan(), replace(case.work(clients=20), steps=np.ones(20, dtype=np.int64))
    dense = work.inputs["dense"]
    lost = Lookup(dense.reshape(-1, *dense.shape[3:]), np.full(dense.shape[:3], place))
    work = replace(work, inputs={**work.inputs, "dense": lost})  # type: ignore[dict-item]
    with pytest.raises(IndexError, match="looks up"):
        Vectorized(compile=False, lanes=8).open(case.model, plan.local).train(plan, work)
