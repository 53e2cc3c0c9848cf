"""The fast runtime of simulations: K clients at a time, each in a lane of one compiled step.

A visit is as many calls of the step as the client has batches. Lanes are filled again as soon as their client is done,
clients with most steps first, so that ragged clients leave few lanes empty. The step is compiled for K lanes whatever
the block holds: the same kernels run on the same shapes, so a client's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    lanes: int = field(default=0, metadata={"help": "clients that step together; 0: what was measured to be fast"})
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
        cohort = Cohort(make_step(model.shared, local), lanes, self.compile)
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
                (self._once if plan.local.steps == 1 else self._visit)(plan, work, busy, width, result)
        return result.updates(plan, work), result.own

    def _once(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of one step, which all begin with the parameters of the plan."""
        kind, common = Kind(True, plan.train_rows and bool(work.rows)), frozenset(plan.parameters)
        desk = Desk(work, self._lanes, width)
        own = {name: np.zeros((self._lanes, *value.shape[1:]), np.float32) for name, value in work.states.items()}
        lanes = desk.lanes({**plan.parameters, **own}, {}, plan)
        for start in range(0, len(clients), self._lanes):
            here = clients[start : start + self._lanes]
            places = np.arange(len(here))
            desk.load_batch(places, here, np.zeros(len(here), dtype=np.int64))
            for name, values in own.items():
                values[: len(here)] = work.states[name][here]
            for lane, client in enumerate(here.tolist()):
                desk.load_rows(lane, client)
            out = self._ready_for(lanes, kind, common)(lanes.flat())
            parameters, _, rows, losses = _named(out, lanes, kind)
            result.keep(plan, work, places, here, parameters, rows)
            result.losses[here] = losses[: len(here)]

    def _visit(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of any number of steps: a lane takes the next client when its own is done."""
        if not len(clients):
            return
        kind = Kind(False, plan.train_rows and bool(work.rows))
        longest_first = clients[np.argsort(-work.steps[clients], kind="stable")]
        desk, starts = Desk(work, self._lanes, width), Starts(self._step, plan, work)
        parameters, states = starts.room(self._lanes)
        lanes = desk.lanes(parameters, states, plan)
        run, values, rows = self._ready_for(lanes, kind, frozenset()), lanes.flat(), desk.rows
        held, at = np.full(self._lanes, -1, dtype=np.int64), np.zeros(self._lanes, dtype=np.int64)
        taken = 0
        while True:
            free = np.flatnonzero(held < 0)[: len(clients) - taken]
            for lane, client in zip(free.tolist(), longest_first[taken : taken + len(free)].tolist(), strict=True):
                held[lane], at[lane] = client, 0
                starts.put(parameters, states, lane, client)
                desk.load_rows(lane, client, rows)
            taken += len(free)
            busy = np.flatnonzero(held >= 0)
            if not len(busy):
                return
            desk.load_batch(busy, held[busy], at[busy])
            out = run(values)
            # What came out is what goes in next: it has the same names in the same order, and ends with the losses.
            values[: len(out) - 1] = out[:-1]
            parameters, states, moved, losses = _named(out, lanes, kind)
            rows = moved or rows
            result.losses[held[busy]] += losses[busy].astype(np.float64) / work.steps[held[busy]]
            at[busy] += 1
            done = busy[at[busy] == work.steps[held[busy]]]
            if len(done):
                result.keep(plan, work, done, held[done], parameters, rows)
                held[done] = -1

    def _ready_for(self, lanes: Lanes, kind: Kind, common: frozenset[str]) -> Flat:
        """The step for lanes of these shapes."""
        values = lanes.flat()
        key = (kind, *(tuple(value.shape) for value in values))
        if key not in self._ready:
            graph = trace(self._step, lanes, kind, common)
            self._ready[key] = compiled(graph, values) if self._compile else plain(graph)
        return self._ready[key]


def _named(out: Sequence[Tensor], lanes: Lanes, kind: Kind) -> tuple[NamedArrays, NamedArrays, NamedArrays, FloatArray]:
    """What a step gave back, as arrays in the same memory: parameters, states, rows, and the losses ``(K,)``."""
    rest = iter([value.numpy() for value in out])
    parameters = {name: next(rest) for name in sorted(lanes.parameters)}
    states = {} if kind.once else {name: next(rest) for name in sorted(lanes.states)}
    rows = {name: next(rest) for name in sorted(lanes.rows)} if kind.train_rows else {}
    return parameters, states, rows, next(rest)


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

    def keep(
        self, plan: Plan, work: Work, lanes: IntArray, clients: IntArray, parameters: NamedArrays, rows: NamedArrays
    ) -> None:
        """Take what ``clients`` have become out of their lanes."""
        for name, values in parameters.items():
            if name in self.own:
                self.own[name][clients] = values[lanes]
            else:
                for lane, client in zip(lanes.tolist(), clients.tolist(), strict=True):
                    np.subtract(values[lane], plan.parameters[name], out=self.dense[name][client, ...])
        for source, delta in self.rows.items():
            offsets, before = work.row_ids[source].offsets, work.rows[source]
            for lane, client in zip(lanes.tolist(), clients.tolist(), strict=True):
                first, last = offsets[client], offsets[client + 1]
                np.subtract(rows[source][lane, : last - first], before[first:last], out=delta[first:last])

    def updates(self, plan: Plan, work: Work) -> Updates:
        """The block, as :func:`fedtower.core.runtime.as_updates` makes it."""
        return Updates(
            weights=work.examples.astype(np.float64),
            dense=self.dense,
            rows={name: Rows(work.row_ids[name].offsets, work.row_ids[name].ids, d) for name, d in self.rows.items()},
            clients=work.clients,
            rounds=np.full(len(work), plan.round, dtype=np.int64),
            metrics={"loss": self.losses},
        )


class Desk:
    """The inputs, slots and rows that are handed to K lanes; a lane that holds nobody keeps what it had."""

    def __init__(self, work: Work, lanes: int, width: int) -> None:
        self._work = work
        self._inputs = {name: np.zeros((lanes, *value.shape[2:]), value.dtype) for name, value in work.inputs.items()}
        self._slots = {name: np.zeros((lanes, *value.shape[2:]), np.int64) for name, value in work.slots.items()}
        self.rows = {name: np.zeros((lanes, width, value.shape[1]), np.float32) for name, value in work.rows.items()}

    def load_rows(self, lane: int, client: int, rows: NamedArrays | None = None) -> None:
        """Put a client's rows into a lane."""
        for source, held in (rows or self.rows).items():
            first, last = self._work.row_ids[source].offsets[client : client + 2]
            held[lane, : last - first] = self._work.rows[source][first:last]

    def load_batch(self, lanes: IntArray, clients: IntArray, at: IntArray) -> None:
        """Put the batches ``at`` of ``clients`` into ``lanes``."""
        for held, given in ((self._inputs, self._work.inputs), (self._slots, self._work.slots)):
            for name, values in given.items():
                _load(held[name], values, lanes, clients, at)

    def lanes(self, parameters: Mapping[str, FloatArray], states: Mapping[str, FloatArray], plan: Plan) -> Lanes:
        """All that a step needs: tensors in the memory of these arrays."""
        rates = {"lr": torch.tensor(plan.local.lr), "row_lr": torch.tensor(plan.local.rows_lr)}
        return Lanes(
            parameters=_tensors(parameters),
            states=_tensors(states),
            rows=_tensors(self.rows),
            slots=_tensors(self._slots),
            inputs=_tensors(self._inputs),
            rates=rates,
        )


def _load(held: NDArray[Any], values: Any, lanes: IntArray, clients: IntArray, at: IntArray) -> None:
    """Put ``values[clients, at]``, of an array or of a lookup, into the lanes."""
    if isinstance(values, Lookup) and len(lanes) == len(held):
        where = values.places[clients, at]
        if where.min(initial=0) < 0 or where.max(initial=0) >= len(values.table):
            raise IndexError(f"an input looks up row {where.min()} to {where.max()} of {len(values.table)}")
        np.take(values.table, where, axis=0, out=held, mode="clip")  # in any other mode numpy makes a copy first
    else:
        held[lanes] = values[clients, at]


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

    def put(self, parameters: NamedArrays, states: NamedArrays, lane: int, client: int) -> None:
        """Let a client begin in a lane."""
        # The state depends on a client only through its own parameters.
        state = self._init(client) if self._work.states and self._state else self._state
        for held, given in ((parameters, self._of(client)), (states, state)):
            for name, value in given.items():
                held[name][lane] = value


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
