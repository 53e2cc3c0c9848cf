"""The fast runtime of simulations: K clients at a time, each in a lane of one compiled step.

A visit is as many calls of the step as the client has batches. Lanes are filled again as soon as their client is done,
clients with most steps first, so that ragged clients leave few lanes empty. The step is compiled for K lanes whatever
the block holds: the same kernels run on the same shapes, so a client's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.errors import RecipeError, nearest
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Lookup, Runtime, Work
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.runtimes.vectorized.cluster import Cluster
from fedtower.plugins.runtimes.vectorized.compiled import Flat, compiled, plain
from fedtower.plugins.runtimes.vectorized.crew import Crew
from fedtower.plugins.runtimes.vectorized.graph import Kind, Lanes, trace
from fedtower.plugins.runtimes.vectorized.processes import hired_by
from fedtower.plugins.runtimes.vectorized.schedule import Schedule
from fedtower.recsys.models import Declared
from fedtower.recsys.step import Step, make_step

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
NamedArrays = dict[str, FloatArray]

# Measured on two cores of an AMD EPYC (benchmarks/simulation.py, tower workload): a compiled client-step in 4 / 8 / 16
# lanes took 17.2 / 15.5 / 15.2 us; more lanes stand empty when few clients are left. Uncompiled, every operation costs
# its dispatch, and many lanes share it.
COMPILED_LANES, PLAIN_LANES = 8, 32
# Rows are padded to the next of these numbers, times a power of two, so that few distinct steps are compiled.
FEWEST_ROWS = 256
CLUSTERS = ("ray", "local", "auto")


@dataclass(frozen=True)
class Vectorized:
    """Runs the step for many clients at once, compiled where there is a C++ compiler."""

    compile: bool = field(
        default=True, metadata={"help": "compile the step (once for a machine); false: run it operation by operation"}
    )
    lanes: int = field(
        default=0,
        metadata={
            "help": "clients that step together; 0: what was measured to be fast. For cohorts of one set 1: lanes that "
            "stand empty are computed too, because numbers depend on how many there are"
        },
    )
    workers: int = field(
        default=1, metadata={"help": "processes that a cohort is split over; 1: this one. It changes no bit"}
    )
    cluster: str = field(
        default="",
        metadata={
            "help": "where the workers are. Empty: this machine; ray (RAY_ADDRESS, else local), local, auto, host:port "
            "or ray://host:port: a Ray cluster"
        },
    )

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RecipeError(f"runtime.workers must be at least 1, not {self.workers}")
        if self.lanes < 0:
            raise RecipeError(f"runtime.lanes must be a number of clients, or 0 for the default, not {self.lanes}")
        if self.cluster not in ("", *CLUSTERS) and ":" not in self.cluster:
            raise RecipeError(
                f"runtime.cluster must be empty, one of {', '.join(CLUSTERS)}, or an address such as ray://host:10001, "
                f"not {self.cluster!r}{nearest(self.cluster, CLUSTERS)}"
            )

    def open(self, model: Declared, local: LocalSettings) -> Runtime:
        """The runtime for one model and one kind of visit."""
        if self.cluster:
            here = replace(self, workers=1, cluster="")
            return Crew(Cluster(self.cluster, self.workers, here, model, local).hire, self.workers)
        lanes = self.lanes or (COMPILED_LANES if self.compile else PLAIN_LANES)
        cohort = Cohort(make_step(model.shared, local, model.on_device), lanes, self.compile)
        return cohort if self.workers == 1 else Crew(hired_by(cohort), self.workers)


class Cohort:
    """``vectorized`` with a model in it. Memory grows with a block, not with the cohort."""

    def __init__(self, step: Step, lanes: int, compile: bool) -> None:
        self._step = step
        self._lanes = lanes
        self._compile = compile
        self._ready: dict[tuple[Any, ...], Flat] = {}

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """The updates of the clients of ``work``, and what their device parameters have become."""
        result = Result.of(plan, work)
        with one_thread():
            for width, clients in by_rows(work):
                busy = clients[work.steps[clients] > 0]
                if len(busy):
                    (self._once if plan.local.steps == 1 else self._visit)(plan, work, busy, width, result)
        return result.updates(plan, work), result.own

    def _once(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of one step, which all begin with the parameters of the plan."""
        kind, common = Kind(True, plan.train_rows and bool(work.rows)), frozenset(plan.parameters)
        schedule = Schedule.of(clients, np.ones(len(clients), dtype=np.int64), self._lanes)
        desk = Desk(work, schedule, width)
        own = {name: desk.room(value.shape[1:]) for name, value in work.states.items()}
        learnt = {f"parameters/{name}": value.shape for name, value in plan.parameters.items()}
        learnt |= {f"parameters/{name}": value.shape[1:] for name, value in own.items()}
        out = {name: np.empty((len(schedule), self._lanes, *shape), np.float32) for name, shape in learnt.items()}
        moved = {source: np.empty_like(rows) for source, rows in desk.rows.items() if kind.train_rows}
        first = {name: value[0] for name, value in out.items()} | {f"rows/{name}": rows for name, rows in moved.items()}
        lanes = desk.lanes({**plan.parameters, **own}, {}, plan, first)
        run, values = self._ready_for(lanes, kind, common), lanes.flat()
        turns = [torch.from_numpy(out[name]).unbind() if name in out else None for name in sorted(lanes.out)]
        for turn, here in enumerate(schedule.client):
            desk.load_batch(turn)
            desk.load_rows(range(self._lanes), here.tolist())
            for name, values_of in own.items():
                values_of[:] = work.states[name][here]
            values[-len(turns) :] = [
                here_in if each is None else each[turn]
                for each, here_in in zip(turns, values[-len(turns) :], strict=True)
            ]
            run(values)
            busy = np.flatnonzero(schedule.busy[turn])
            result.keep_rows(work, moved, busy, here[busy])
            result.losses[here[busy]] = desk.losses[busy]
        result.keep_all(
            clients, {name.partition("/")[2]: value.reshape(-1, *value.shape[2:]) for name, value in out.items()}
        )

    def _visit(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of any number of steps: a lane takes the next client when its own is done."""
        kind = Kind(False, plan.train_rows and bool(work.rows))
        schedule = Schedule.of(clients, work.steps[clients], self._lanes)
        desk, starts = Desk(work, schedule, width), Starts(self._step, plan, work)
        parameters, states = starts.room(self._lanes)
        lanes = desk.lanes(parameters, states, plan, {})
        run, values = self._ready_for(lanes, kind, frozenset()), lanes.flat()
        losses = np.zeros(schedule.client.shape)
        for turn, here in enumerate(schedule.client):
            begin = np.flatnonzero(schedule.busy[turn] & (schedule.step[turn] == 0))
            if len(begin):
                starts.put(parameters, states, begin, here[begin])
                desk.load_rows(begin.tolist(), here[begin].tolist())
            desk.load_batch(turn)
            run(values)
            losses[turn] = desk.losses
            done = np.flatnonzero(schedule.last[turn])
            if len(done):
                result.keep(plan, parameters, done, here[done])
                result.keep_rows(work, desk.rows, done, here[done], before=True)
        busy = schedule.busy
        np.add.at(result.losses, schedule.client[busy], losses[busy] / work.steps[schedule.client[busy]])

    def _ready_for(self, lanes: Lanes, kind: Kind, common: frozenset[str]) -> Flat:
        """The step for lanes of these shapes."""
        values = lanes.flat()
        key = (kind, *(tuple(value.shape) for value in values))
        if key not in self._ready:
            graph = trace(self._step, lanes, kind, common)
            self._ready[key] = compiled(graph, values) if self._compile else plain(graph)
        return self._ready[key]


@dataclass(frozen=True)
class Result:
    """What the visits of a block leave: deltas, what stays on the devices, and losses; of clients without a step,
    zeros and what they had.
    """

    dense: NamedArrays
    rows: NamedArrays
    own: NamedArrays
    losses: NDArray[np.float64]

    @staticmethod
    def of(plan: Plan, work: Work) -> Result:
        """Before anyone has trained."""
        idle = work.steps == 0
        dense = {name: np.empty((len(work), *value.shape), np.float32) for name, value in plan.parameters.items()}
        for values in dense.values():
            values[idle] = 0.0
        rows = {source: np.zeros_like(values) for source, values in work.rows.items() if plan.train_rows}
        return Result(dense, rows, {name: value.copy() for name, value in work.states.items()}, np.zeros(len(work)))

    def keep(self, plan: Plan, parameters: NamedArrays, lanes: IntArray, clients: IntArray) -> None:
        """Take what ``clients`` have become out of their lanes."""
        for name, values in parameters.items():
            if name in self.own:
                self.own[name][clients] = values[lanes]
            else:
                for lane, client in zip(lanes.tolist(), clients.tolist(), strict=True):
                    np.subtract(values[lane], plan.parameters[name], out=self.dense[name][client, ...])

    def keep_all(self, clients: IntArray, learnt: NamedArrays) -> None:
        """Take the deltas of ``clients``, and what is their own; who comes after them in ``learnt`` is nobody."""
        for name, values in learnt.items():
            if name in self.own:
                self.own[name][clients] = values[: len(clients)]
            elif len(clients) == len(self.losses):  # everybody, in order: no need for a copy
                self.dense[name] = values[: len(clients)]
            else:
                self.dense[name][clients] = values[: len(clients)]

    def keep_rows(
        self, work: Work, moved: NamedArrays, lanes: IntArray, clients: IntArray, before: bool = False
    ) -> None:
        """Take the deltas of the rows of ``clients``: of their lanes, less what they were ``before`` if asked to."""
        for source, delta in self.rows.items():
            offsets, then = work.row_ids[source].offsets.tolist(), work.rows[source]
            for lane, client in zip(lanes.tolist(), clients.tolist(), strict=True):
                first, last = offsets[client], offsets[client + 1]
                now = moved[source][lane, : last - first]
                if before:
                    np.subtract(now, then[first:last], out=delta[first:last])
                else:
                    delta[first:last] = now

    def updates(self, plan: Plan, work: Work) -> Updates:
        """The block, as :func:`fedtower.core.runtime.as_updates` makes it."""
        return Updates(
            weights=work.examples.astype(np.float64),
            dense=self.dense,
            rows={name: Rows(work.row_ids[name].offsets, work.row_ids[name].ids, d) for name, d in self.rows.items()},
            clients=work.clients,
            rounds=np.full(len(work), plan.round, dtype=np.int64),
            metrics={"loss": self.losses, "steps": work.steps.astype(np.float64)},
        )


class Desk:
    """The inputs, slots and rows that are handed to K lanes, turn after turn."""

    def __init__(self, work: Work, schedule: Schedule, width: int) -> None:
        self._work, self._schedule = work, schedule
        self._count = schedule.client.shape[1]
        self._inputs = {name: self.room(value.shape[2:], value.dtype) for name, value in work.inputs.items()}
        self._slots = {name: self.room(value.shape[2:], np.int64) for name, value in work.slots.items()}
        self._offsets = {source: needed.offsets.tolist() for source, needed in work.row_ids.items()}
        self.rows = {name: self.room((width, value.shape[1])) for name, value in work.rows.items()}
        self.losses = self.room(())

    def room(self, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        """Zeros for every lane."""
        return np.zeros((self._count, *shape), dtype)

    def load_rows(self, lanes: Iterable[int], clients: Iterable[int]) -> None:
        """Put the rows of clients into lanes."""
        for source, held in self.rows.items():
            offsets, rows = self._offsets[source], self._work.rows[source]
            for lane, client in zip(lanes, clients, strict=True):
                first, last = offsets[client], offsets[client + 1]
                held[lane, : last - first] = rows[first:last]

    def load_batch(self, turn: int) -> None:
        """Put the batches of a turn into the lanes."""
        clients, steps = self._schedule.client[turn], self._schedule.step[turn]
        for held, given in ((self._inputs, self._work.inputs), (self._slots, self._work.slots)):
            for name, values in given.items():
                _load(held[name], values, clients, steps)

    def lanes(self, parameters: NamedArrays, states: NamedArrays, plan: Plan, out: NamedArrays) -> Lanes:
        """All that a step needs: tensors in the memory of these arrays."""
        rates = {"lr": torch.tensor(plan.local.lr), "row_lr": torch.tensor(plan.local.rows_lr)}
        return Lanes(
            parameters=_tensors(parameters),
            states=_tensors(states),
            rows=_tensors(self.rows),
            slots=_tensors(self._slots),
            inputs=_tensors(self._inputs),
            rates=rates,
            out=_tensors({**out, "losses": self.losses}),
        )


def _load(held: NDArray[Any], values: Any, clients: IntArray, steps: IntArray) -> None:
    """Put ``values[clients, steps]``, of an array or of a lookup, into the lanes."""
    if isinstance(values, Lookup):
        where = values.places[clients, steps]
        if where.min(initial=0) < 0 or where.max(initial=0) >= len(values.table):
            raise IndexError(f"an input looks up row {where.min()} to {where.max()} of {len(values.table)}")
        np.take(values.table, where, axis=0, out=held, mode="clip")  # in any other mode numpy makes a copy first
    else:
        held[...] = values[clients, steps]


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


class Starts:
    """The parameters and the optimiser's state with which clients begin."""

    def __init__(self, step: Step, plan: Plan, work: Work) -> None:
        self._step, self._plan, self._work = step, plan, work
        self._state = self._init(0)

    def _of(self, client: int) -> NamedArrays:
        own = {name: np.asarray(values[client]) for name, values in self._work.states.items()}
        return {**self._plan.parameters, **own}

    def _init(self, client: int) -> NamedArrays:
        mine = {name: torch.from_numpy(value) for name, value in self._of(client).items()}
        return {name: value.numpy() for name, value in self._step.init(mine).items()}

    def room(self, lanes: int) -> tuple[NamedArrays, NamedArrays]:
        """Parameters and states for so many lanes, not yet anybody's."""
        parameters, states = (
            {name: np.repeat(value[None], lanes, axis=0) for name, value in each.items()}
            for each in (self._of(0), self._state)
        )
        return parameters, states

    def put(self, parameters: NamedArrays, states: NamedArrays, lanes: IntArray, clients: IntArray) -> None:
        """Let clients begin in lanes."""
        for name, held in parameters.items():
            held[lanes] = self._work.states[name][clients] if name in self._work.states else self._plan.parameters[name]
        for name, held in states.items():
            held[lanes] = self._state[name]
        # The state depends on a client only through its own parameters: their start, where it is kept, is one of them.
        for name in self._work.states:
            if f"start/{name}" in states:
                states[f"start/{name}"][lanes] = self._work.states[name][clients]


def by_rows(work: Work) -> Iterator[tuple[int, IntArray]]:
    """The clients of a block, grouped by the number of rows that they are padded to."""
    needed = np.zeros(len(work), dtype=np.int64)
    for ids in work.row_ids.values():
        needed = np.maximum(needed, np.diff(ids.offsets))
    widths = FEWEST_ROWS * 2 ** np.ceil(np.log2(np.maximum(needed, FEWEST_ROWS) / FEWEST_ROWS)).astype(np.int64)
    for width in np.unique(widths):
        yield int(width), np.flatnonzero(widths == width)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's operations: a lane's work is too small to share, and its bits must not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
