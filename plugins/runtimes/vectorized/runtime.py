"""The fast runtime of simulations: K clients at a time, each in a lane of one compiled step.

A visit is as many calls of the step as the client has batches. Lanes are filled again as soon as their client is done,
clients with most steps first, so that ragged clients leave few lanes empty. The step is compiled for K lanes whatever
the block holds: the same kernels run on the same shapes, so a client's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Runtime, Work, as_updates
from fedtower.core.updates import Updates
from fedtower.plugins.runtimes.vectorized.compiled import Flat, compiled, plain
from fedtower.plugins.runtimes.vectorized.crew import Crew
from fedtower.plugins.runtimes.vectorized.graph import Kind, Lanes, trace
from fedtower.recsys.models import Declared
from fedtower.recsys.step import Step, make_step

Array = NDArray[Any]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Arrays = Mapping[str, Array]

# Measured on two cores of an AMD EPYC (benchmarks/simulation.py, tower workload): a compiled client-step in 4 / 8 / 16
# lanes took 17.2 / 15.5 / 15.2 us; more lanes stand empty when few clients are left. Uncompiled, every operation costs
# its dispatch, and many lanes share it.
COMPILED_LANES, PLAIN_LANES = 8, 32
# Rows are padded to the next of these numbers, times a power of two, so that few distinct steps are compiled.
FEWEST_ROWS = 256


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

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RecipeError(f"runtime.workers must be at least 1, not {self.workers}")
        if self.lanes < 0:
            raise RecipeError(f"runtime.lanes must be a number of clients, or 0 for the default, not {self.lanes}")

    def open(self, model: Declared, local: LocalSettings) -> Runtime:
        """The runtime for one model and one kind of visit."""
        lanes = self.lanes or (COMPILED_LANES if self.compile else PLAIN_LANES)
        cohort = Cohort(make_step(model.shared, local), lanes, self.compile)
        return cohort if self.workers == 1 else Crew(cohort, self.workers)


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
                if plan.local.steps == 1:
                    self._once(plan, work, clients[work.steps[clients] > 0], width, result)
                else:
                    self._visit(plan, work, clients[work.steps[clients] > 0], width, result)
        updates = as_updates(plan, work, result.parameters, result.rows, result.losses)
        return updates, {name: result.parameters[name] for name in work.states}

    def _once(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of one step, which all begin with the parameters of the plan."""
        kind, common = Kind(True, plan.train_rows and bool(work.rows)), frozenset(plan.parameters)
        shared = {name: torch.from_numpy(np.asarray(value)) for name, value in plan.parameters.items()}
        desk = Desk(work, self._lanes, width)
        for start in range(0, len(clients), self._lanes):
            here = clients[start : start + self._lanes]
            for lane, client in enumerate(here):
                desk.load_rows(lane, client)
                desk.load_own(lane, client)
            desk.load_batch(np.arange(len(here)), here, np.zeros(len(here), dtype=np.int64))
            lanes = desk.lanes(shared, {}, plan)
            parameters, _, rows, losses = self._run(lanes, kind, common)
            for name, value in parameters.items():
                result.parameters[name][here] = value.numpy()[: len(here)]
            for lane, client in enumerate(here):
                result.keep_rows(work, client, rows, lane)
            result.losses[here] = losses.numpy()[: len(here)]

    def _visit(self, plan: Plan, work: Work, clients: IntArray, width: int, result: Result) -> None:
        """Visits of any number of steps: a lane takes the next client when its own is done."""
        kind = Kind(False, plan.train_rows and bool(work.rows))
        waiting = iter(clients[np.argsort(-work.steps[clients], kind="stable")].tolist())
        desk = Desk(work, self._lanes, width)
        held = np.full(self._lanes, -1, dtype=np.int64)
        at = np.zeros(self._lanes, dtype=np.int64)
        starts = Starts(self._step, plan, work)
        parameters, states = starts.room(self._lanes)
        while True:
            for lane in np.flatnonzero(held < 0).tolist():
                client = next(waiting, None)
                if client is None:
                    break
                held[lane], at[lane] = client, 0
                starts.put(parameters, states, lane, client)
                desk.load_rows(lane, client)
            busy = np.flatnonzero(held >= 0)
            if not len(busy):
                return
            desk.load_batch(busy, held[busy], at[busy])
            parameters, states, rows, losses = self._run(desk.lanes(parameters, states, plan), kind, common=frozenset())
            desk.rows |= rows
            result.losses[held[busy]] += losses.numpy()[busy].astype(np.float64) / work.steps[held[busy]]
            at[busy] += 1
            for lane in busy[at[busy] == work.steps[held[busy]]]:
                for name, value in parameters.items():
                    result.parameters[name][held[lane]] = value[lane].numpy()
                result.keep_rows(work, held[lane], rows, lane)
                held[lane] = -1

    def _run(
        self, lanes: Lanes, kind: Kind, common: frozenset[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
        """All lanes one step further."""
        values = lanes.flat()
        key = (kind, *(tuple(value.shape) for value in values))
        if key not in self._ready:
            graph, _ = trace(self._step, lanes, kind, common)
            self._ready[key] = compiled(graph, values) if self._compile else plain(graph)
        out = iter(self._ready[key](values))
        parameters = {name: next(out) for name in sorted(lanes.parameters)}
        states = {} if kind.once else {name: next(out) for name in sorted(lanes.states)}
        rows = {name: next(out) for name in sorted(lanes.rows)} if kind.train_rows else {}
        return parameters, states, rows, next(out)


@dataclass(frozen=True)
class Result:
    """What a block's parameters, rows and losses become; clients without a step keep what they had."""

    parameters: dict[str, FloatArray]
    rows: dict[str, FloatArray]
    losses: NDArray[np.float64]

    @staticmethod
    def of(plan: Plan, work: Work) -> Result:
        """Before anyone has trained."""
        idle = np.flatnonzero(work.steps == 0)
        parameters = {}
        for name, value in plan.parameters.items():
            parameters[name] = np.empty((len(work), *value.shape), dtype=np.float32)
            parameters[name][idle] = value
        parameters |= {name: values.copy() for name, values in work.states.items()}
        rows = {source: values.copy() if plan.train_rows else values for source, values in work.rows.items()}
        return Result(parameters, rows, np.zeros(len(work)))

    def keep_rows(self, work: Work, client: int, rows: Mapping[str, Tensor], lane: int) -> None:
        """Take a client's rows out of its lane."""
        for source, values in rows.items():
            first, last = work.row_ids[source].offsets[client : client + 2]
            self.rows[source][first:last] = values[lane, : last - first].numpy()


class Desk:
    """The inputs, slots and rows that are handed to K lanes; a lane that holds nobody keeps what it had."""

    def __init__(self, work: Work, lanes: int, width: int) -> None:
        self._work = work
        self._inputs = {name: np.zeros((lanes, *value.shape[2:]), value.dtype) for name, value in work.inputs.items()}
        self._slots = {name: np.zeros((lanes, *value.shape[2:]), np.int64) for name, value in work.slots.items()}
        self._own = {name: torch.zeros(lanes, *value.shape[1:]) for name, value in work.states.items()}
        self.rows = {source: torch.zeros(lanes, width, value.shape[1]) for source, value in work.rows.items()}

    def load_rows(self, lane: int, client: int) -> None:
        """Put a client's rows into a lane."""
        for source, needed in self._work.row_ids.items():
            first, last = needed.offsets[client : client + 2]
            self.rows[source][lane, : last - first] = torch.from_numpy(self._work.rows[source][first:last])

    def load_own(self, lane: int, client: int) -> None:
        """Put a client's own parameters into a lane."""
        for name, values in self._own.items():
            values[lane] = torch.from_numpy(self._work.states[name])[client]

    def load_batch(self, lanes: IntArray, clients: IntArray, at: IntArray) -> None:
        """Put the batches ``at`` of ``clients`` into ``lanes``."""
        for held, given in ((self._inputs, self._work.inputs), (self._slots, self._work.slots)):
            for name, values in given.items():
                held[name][lanes] = values[clients, at]

    def lanes(self, parameters: Mapping[str, Tensor], states: Mapping[str, Tensor], plan: Plan) -> Lanes:
        """All that a step needs."""
        return Lanes(
            parameters={**self._own, **parameters},
            states=dict(states),
            rows=self.rows,
            slots={name: torch.from_numpy(value) for name, value in self._slots.items()},
            inputs={name: torch.from_numpy(value) for name, value in self._inputs.items()},
            rates={"lr": torch.tensor(plan.local.lr), "row_lr": torch.tensor(plan.local.rows_lr)},
        )


class Starts:
    """The parameters and the optimiser's state with which clients begin."""

    def __init__(self, step: Step, plan: Plan, work: Work) -> None:
        self._step, self._work = step, work
        self._shared = {name: torch.from_numpy(np.asarray(value)) for name, value in plan.parameters.items()}
        self._state = step.init(self._of(0)) if len(work) else {}

    def _of(self, client: int) -> dict[str, Tensor]:
        return self._shared | {name: torch.from_numpy(value)[client] for name, value in self._work.states.items()}

    def room(self, lanes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and states for so many lanes, not yet anybody's."""
        return tuple(
            {name: value[None].repeat(lanes, *([1] * value.dim())) for name, value in each.items()}
            for each in (self._of(0), self._state)
        )  # type: ignore[return-value]

    def put(self, parameters: Mapping[str, Tensor], states: Mapping[str, Tensor], lane: int, client: int) -> None:
        """Let a client begin in a lane."""
        mine = self._of(client)
        # The state depends on a client only through its own parameters.
        state = self._step.init(mine) if self._work.states and self._state else self._state
        for held, given in ((parameters, mine), (states, state)):
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
