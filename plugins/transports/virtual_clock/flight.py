"""Flight: asynchronous rounds in virtual time: who is at work, from which version, and when it will be done.

When a visit ends follows from the traces as it begins, so a version is a walk through the ends in their order: each
makes room for another client, until enough updates have come. Clients are trained when the first of their version
arrives: blocks are wide, and hardly anybody is trained whose update is not used.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort, IntArray
from fedtower.core.plan import Plan
from fedtower.core.transport import Abandoned, Asked, DeviceTime
from fedtower.core.updates import Updates, stack

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, order=True)
class Task:
    """One client's visit: when it ends, how long the device works in it, and whether nothing comes of it."""

    ends: float
    client: int
    version: int
    seconds: float
    vanishes: bool


Begin = Callable[[IntArray], list[Task]]


@dataclass(eq=False)
class VirtualVersion:
    """A version: those of ``cohort`` begin to work from it, in an order drawn by the seed, as soon as there is room.

    ``begin(clients)`` gives their visits as if they began at 0; it is asked for ``block`` clients at a time. ``ahead``
    are the updates that were made and have not arrived, by version and client; without them they are made again.
    """

    plan: Plan
    cohort: Cohort
    asked: Asked
    begin: Begin
    block: int
    set_now: Callable[[float], None]
    now: float
    ahead: dict[tuple[int, int], Updates]
    _on_the_way: list[Task] = field(default_factory=list)
    _ended: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        flight = self.asked.flight
        if "clients" in flight:
            names = ("ends", "clients", "versions", "seconds", "vanishes")
            self._on_the_way = [Task(*each) for each in zip(*(flight[name].tolist() for name in names), strict=True)]
        heapq.heapify(self._on_the_way)
        self._busy = {task.client for task in self._on_the_way}
        self._next = self._beginners()

    def arrivals(self) -> Iterator[Updates]:
        """The updates that make the step, those of one version together, oldest first."""
        self._begin_some()
        while (needed := self.asked.needed()) > 0:
            stale, fresh = self._due(needed)
            self._ended += [*stale, *fresh]
            yield from (self._unused(task) for task in stale)
            for version in sorted({task.version for task in fresh}):
                clients = np.array(sorted(task.client for task in fresh if task.version == version), dtype=np.int64)
                for start in range(0, len(clients), self.block):
                    yield self._trained(version, clients[start : start + self.block].tolist())

    def flight(self) -> State:
        """Who is on the way, and what time it is."""
        tasks = sorted(self._on_the_way)
        return {
            "clients": np.array([task.client for task in tasks], dtype=np.int64),
            "versions": np.array([task.version for task in tasks], dtype=np.int64),
            "ends": np.array([task.ends for task in tasks], dtype=np.float64),
            "seconds": np.array([task.seconds for task in tasks], dtype=np.float64),
            "vanishes": np.array([task.vanishes for task in tasks], dtype=bool),
            "now": np.array(self.now),
        }

    def spent(self, counted: Cohort) -> DeviceTime:
        """The device seconds of the visits that ended here; what was too stale was for nothing."""
        used = set(counted.clients.tolist())
        wasted = [task for task in self._ended if task.vanishes or self._is_stale(task) or task.client not in used]
        return DeviceTime(
            seconds=sum(task.seconds for task in self._ended),
            wasted=sum(task.seconds for task in wasted),
            late=sum(not task.vanishes for task in wasted),
        )

    def _trained(self, version: int, clients: list[int]) -> Updates:
        """The updates of some who have arrived; when one is to be trained, so are others of that version on their way,
        as far as the block has room.
        """
        new = [client for client in clients if (version, client) not in self.ahead]
        if new:
            coming = (task for task in sorted(self._on_the_way) if task.version == version and not task.vanishes)
            others = [task.client for task in coming if (version, task.client) not in self.ahead]
            block = sorted([*new, *others[: self.block - len(new)]])
            updates = self.asked.visit(version, np.array(block, dtype=np.int64))
            self.ahead |= {(version, client): updates.slice(at, at + 1) for at, client in enumerate(block)}
        return stack([self.ahead.pop((version, client)) for client in clients])

    def _due(self, needed: int) -> tuple[list[Task], list[Task]]:
        """The next visits to arrive: those that are too stale, and as many others as are needed.

        Raises:
            Abandoned: there are not so many, or nothing comes for too long; who has arrived waits.
        """
        stale: list[Task] = []
        fresh: list[Task] = []
        limit = np.inf if self.asked.deadline is None else self.asked.deadline
        last = self.now
        while len(fresh) < needed:
            if not self._on_the_way or self._on_the_way[0].ends - last >= limit:
                why = f"for {limit:g} s nothing came" if self._on_the_way else "nobody else was on the way"
                self._go_on(last + limit if self._on_the_way else last)
                for task in [*stale, *fresh]:
                    heapq.heappush(self._on_the_way, task)
                    self._busy.add(task.client)
                raise Abandoned(f"{why}; {len(fresh)} of {needed} updates wait for the next version")
            task = heapq.heappop(self._on_the_way)
            self._go_on(task.ends)
            if task.vanishes:
                self._ended.append(task)
            else:
                last = self.now
                (stale if self._is_stale(task) else fresh).append(task)
            if task.vanishes or self._is_stale(task):  # of the others, whose update waits for a step begins nothing
                self._busy.discard(task.client)
            self._begin_some()
        return stale, fresh

    def _begin_some(self) -> None:
        """Let clients begin while there is room."""
        while len(self._on_the_way) < self.asked.settings.concurrency:
            task = next(self._next, None)
            if task is None:
                return
            self._busy.add(task.client)
            heapq.heappush(self._on_the_way, replace(task, ends=self.now + task.seconds))

    def _beginners(self) -> Iterator[Task]:
        """The cohort's visits in the order in which they are begun, without those who are at work when it is their
        turn.
        """
        order = np.argsort(self.asked.draws.uniform("begin", self.plan.round, self.cohort.clients), kind="stable")
        clients = self.cohort.clients[order]
        for start in range(0, len(clients), self.block):
            some = clients[start : start + self.block]
            yield from (task for task in self.begin(some) if task.client not in self._busy)

    def _go_on(self, now: float) -> None:
        self.now = max(now, self.now)
        self.set_now(self.now)

    def _is_stale(self, task: Task) -> bool:
        return task.version < self.plan.round - self.asked.settings.max_staleness

    def _unused(self, task: Task) -> Updates:
        """In the place of an update that is too stale to count, and so is not computed: zeros."""
        self.ahead.pop((task.version, task.client), None)
        dense = {name: np.zeros((1, *value.shape), np.float32) for name, value in self.plan.parameters.items()}
        return Updates(
            weights=np.zeros(1), dense=dense, clients=np.array([task.client]), rounds=np.array([task.version])
        )
