"""The client's half of a round: fetch rows, train, and pass the update through the transforms' client sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checking import Leased
from fedtower.core.control import corrected
from fedtower.core.download import HELD
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds, RowReader, distinct
from fedtower.core.runtime import Runtime, Work
from fedtower.core.store import StateStore
from fedtower.core.traces import Load
from fedtower.core.transform import States, Transform, on_client
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


class ClientData(Protocol):
    """What the clients hold, made into fixed shapes."""

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """The batches of one visit of each client, and the ids of the rows it needs."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A runtime that also prepares the clients' data, where it trains them: in processes of its own."""

    def prepares(self, data: ClientData) -> ClientData:
        """The same data, prepared there."""
        ...


@dataclass(frozen=True)
class Staged:
    """What a visit of C clients leaves behind until the server has spoken: ``states[name]`` (C, *shape), and the rows
    that they were given.
    """

    clients: IntArray
    states: Mapping[str, FloatArray]
    leased: Mapping[str, Leased] | None  # not known any more of those who are left of a visit

    def __len__(self) -> int:
        return len(self.clients)

    def without(self, clients: IntArray) -> Staged:
        """The same for the clients that are not among ``clients``; the rows that they were given are forgotten."""
        rest = ~np.isin(self.clients, clients)
        return Staged(self.clients[rest], {name: values[rest] for name, values in self.states.items()}, None)


@dataclass(frozen=True)
class ClientSide:
    """What a client's half of the round is made of.

    A visit changes nothing that the next one sees: what its clients are to keep is staged, until :meth:`settle` says
    whose update counted.
    """

    data: ClientData
    runtime: Runtime
    rows: RowReader | None
    transforms: Sequence[Transform]
    store: StateStore
    hooks: Hooks
    draws: Draws
    device_state: tuple[str, ...] = ()  # names in the store that are parameters of the model
    staged: list[Staged] = field(default_factory=list)

    def declare(self, plan: Plan) -> None:
        """Make room in the store for what the transforms keep on each client."""
        for position, transform in enumerate(self.transforms):
            for name, shape in transform.state(plan).items():
                self.store.declare(f"transforms.{position}.{name}", np.zeros(shape, dtype=np.float32))
        if _goes_on(plan):
            self.store.declare(HELD, np.zeros((), dtype=np.float32))

    def given(self, plan: Plan, clients: IntArray) -> Work:
        """What ``clients`` train on in a visit, with the rows that they need and what they keep."""
        work = self.data.work(plan, clients)
        if self.rows is not None:
            held = {source: fetch(self.rows, source, needed) for source, needed in work.row_ids.items()}
            work = replace(work, rows=held)
        return replace(work, states={name: self.store.read(name, clients) for name in self.device_state})

    def visit(self, plan: Plan, clients: IntArray) -> Updates:
        """The updates of ``clients`` as they leave their devices; what is to stay on the devices is staged.

        Their metric ``bytes_down`` is what each was sent: the plan's shared parameters, and the rows it asked for. Of
        publications that are differences it is what it has missed since the last visit whose update counted.
        """
        work = self.given(plan, clients)
        bytes_down = plan.bytes_down(held_by(self.store, plan, clients)).astype(np.float64)
        for source, rows in work.rows.items():
            bytes_down += np.diff(work.row_ids[source].offsets) * 4.0 * rows.shape[1]

        updates, states = self.hooks.wrap(
            "client_train", lambda: self.runtime.train(plan, work), plan=plan, clients=clients
        )
        if plan.local.control != "none":
            updates, states = corrected(plan, work.states, updates, states)
        kept: Sequence[States] = [
            {name: self.store.read(f"transforms.{position}.{name}", clients) for name in transform.state(plan)}
            for position, transform in enumerate(self.transforms)
        ]
        updates, kept = on_client(self.transforms, updates, kept, self.draws)

        states = {**states}
        if plan.publication is not None and plan.publication.differences:
            states[HELD] = np.full(len(clients), plan.publication.round, dtype=np.float32)
        for position, state in enumerate(kept):
            states |= {f"transforms.{position}.{name}": values for name, values in state.items()}
        leased = {source: Leased(needed, work.rows[source].shape[1]) for source, needed in work.row_ids.items()}
        self.staged.append(Staged(clients, states, leased))
        return replace(updates, metrics={**updates.metrics, "bytes_down": bytes_down})

    def leased(self, clients: IntArray) -> Mapping[str, Leased] | None:
        """The rows that a block of ``clients`` was given by the visit that they made together, if they did."""
        together = (visit.leased for visit in self.staged if np.array_equal(visit.clients, clients))
        return next(together, None)

    def settle(self, clients: IntArray, counted: NDArray[np.bool_]) -> None:
        """Write what those of ``clients`` keep whose update ``counted`` (C,), and forget it for the others."""
        waiting: list[Staged] = []
        for visit in self.staged:
            together = np.array_equal(visit.clients, clients)  # as it is unless a transport divides blocks
            writers = counted if together else np.isin(visit.clients, clients[counted])
            for name, values in visit.states.items():
                self.store.write(name, visit.clients[writers], values[writers])
            if not together and len(rest := visit.without(clients)):
                waiting.append(rest)
        self.staged[:] = waiting

    def discard(self) -> None:
        """Forget what is staged: those clients were not heard."""
        self.staged.clear()


@dataclass(frozen=True)
class VisitCosts:
    """What visits ask of devices, told without training: the plan and the rows that a client needs, its steps, and an
    update of the same size, which no transform has made smaller.
    """

    data: ClientData
    rows: RowReader | None
    block: int = 256  # clients whose batches are made at a time, to be counted
    store: StateStore | None = None  # where it is known what they hold already

    def __call__(self, plan: Plan, clients: IntArray) -> Load:
        """The load of a visit of each client."""
        blocks = [self._load(plan, clients[start : start + self.block]) for start in range(0, len(clients), self.block)]
        parts = zip(*blocks, strict=True) if blocks else [[np.zeros(0)]] * 3
        return Load(*(np.concatenate(part) for part in parts))

    def _load(self, plan: Plan, clients: IntArray) -> tuple[NDArray[np.float64], ...]:
        work = self.data.work(plan, clients)
        held = np.zeros(len(clients), np.int64) if self.store is None else held_by(self.store, plan, clients)
        down, up = plan.bytes_down(held).astype(np.float64), np.full(len(clients), plan.nbytes + 8.0)
        for source, needed in work.row_ids.items():
            if self.rows is None:
                break
            width = self.rows.fetch(source, needed.ids[:1]).shape[1]
            count = np.diff(needed.offsets)
            down += count * 4.0 * width
            up += (count * 4.0 * (width + 1) + 4.0) * plan.train_rows
        return down, work.steps.astype(np.float64), up


def held_by(store: StateStore, plan: Plan, clients: IntArray) -> IntArray:
    """The round whose publication each of ``clients`` (C,) had last, as far as that matters to the plan; 0: none."""
    if not _goes_on(plan):
        return np.zeros(len(clients), dtype=np.int64)
    return store.read(HELD, clients).astype(np.int64)


def _goes_on(plan: Plan) -> bool:
    """Whether what a client had before makes its next download shorter."""
    return plan.publication is not None and plan.publication.differences


def fetch(rows: RowReader, source: str, needed: RowIds) -> NDArray[np.float32]:
    """The rows that each client of a block needs, (R, D); those that many need are computed once."""
    ids, place = distinct(needed.ids)
    return rows.fetch(source, ids).take(place, axis=0)
