"""Intake: what clients ask of a journal, many at once, decided between one reading and one writing.

A journal reads the windows and leases that a batch is about, lets :class:`Batch` answer, and writes what came of it,
all in one transaction. So the rules stand here once, and a journal is only storage.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from fedtower.core.journal import Instant, Lease, LeaseRecord, Outcome, RoundRecord, State, Task, judge, lives

Window = tuple[int, Task]


class Sent(Protocol):
    """An upload, wherever its payload is by now."""

    @property
    def lease(self) -> bytes: ...
    @property
    def digest(self) -> bytes: ...


S = TypeVar("S", bound=Sent)


@dataclass(frozen=True)
class Grant:
    """Asks for a lease."""

    round: int
    task: Task
    client: int
    seconds: float
    most: int | None = None


@dataclass(frozen=True)
class Renewal:
    """Asks for a longer lease."""

    lease: bytes
    seconds: float


@dataclass(frozen=True)
class Ending:
    """Says that a visit brought nothing."""

    lease: bytes
    late: bool


Answer = Lease | Outcome | None


class Batch(Generic[S]):
    """Answers orders, one after the other, and remembers what is to be written: leases that are ``replaced``, and then
    those ``granted``, ``renewed`` and ``ended``, and the uploads ``accepted``, each with its lease and position, at the
    moment ``now``.

    ``rounds`` are the windows of all orders, as far as there are such, and ``leases`` all that the orders name, and the
    newest one of each client who asks. Where a grant has a ``most``, all open windows of its task are among ``rounds``,
    and the leases in them that are not replaced among ``leases``.
    """

    def __init__(self, now: Instant, rounds: Mapping[Window, RoundRecord], leases: Iterable[LeaseRecord]) -> None:
        self.now = now
        self._rounds = rounds
        self._leases: dict[bytes, LeaseRecord] = {}
        self._counts: dict[Window, int] = {}
        self._newest: dict[tuple[int, Task, int], bytes] = {}
        self._at_work: dict[Task, dict[int, Lease]] = {}
        for held in leases:
            self._keep(held)
        self.replaced: list[bytes] = []
        self.granted: list[Lease] = []
        self.renewed: list[Lease] = []
        self.ended: list[Ending] = []
        self.accepted: list[tuple[Lease, int, S]] = []

    @property
    def counts(self) -> list[tuple[int, Window]]:
        """How many uploads the windows have now in which some were accepted."""
        return [(count, window) for window, count in sorted(self._counts.items())]

    def judge(self, upload: Sent) -> Outcome:
        """What would become of an upload."""
        held = self._leases.get(upload.lease)
        return judge(upload.digest, held, self._state_of(held), self.now)

    def accept(self, upload: S) -> Outcome:
        """Count the upload, if it may."""
        outcome = self.judge(upload)
        if outcome is Outcome.ACCEPTED:
            held = self._leases[upload.lease]
            window = (held.lease.round, held.lease.task)
            position = self._counts.get(window, self._rounds[window].accepted) + 1
            self._counts[window] = position
            self.accepted.append((held.lease, position, upload))
            self._leases[upload.lease] = LeaseRecord(held.lease, upload.digest, ended=self.now)
            self._at_work.pop(held.lease.task, None)
        return outcome

    def grant(self, order: Grant) -> Lease | None:
        """The lease that the client has, or a new one."""
        record = self._rounds.get((order.round, order.task))
        if record is None or record.state != "open":
            return None
        held = self._leases.get(self._newest.get((order.round, order.task, order.client), b""))
        if held is not None and held.digest is not None:
            return None
        if held is not None and lives(held, record.state, self.now):
            return held.lease
        if order.most is not None:
            at_work = self._at_work[order.task] = self._at_work.get(order.task) or self._living(order.task)
            if order.client in at_work or len(at_work) >= order.most:
                return at_work.get(order.client)
        if held is not None:
            self.replaced.append(held.lease.id)
            self._keep(replace(held, replaced=True))
        id, expires = secrets.token_bytes(16), self._later(order.seconds)
        lease = Lease(id, order.round, order.task, order.client, expires, given=self.now)
        self.granted.append(lease)
        self._keep(LeaseRecord(lease))
        self._at_work.get(order.task, {})[order.client] = lease
        return lease

    def renew(self, order: Renewal) -> Lease | None:
        """The lease with another end."""
        held = self._leases.get(order.lease)
        if held is None or not lives(held, self._state_of(held), self.now):
            return None
        lease = replace(held.lease, expires=self._later(order.seconds))
        self.renewed.append(lease)
        self._keep(replace(held, lease=lease))
        return lease

    def end(self, order: Ending) -> None:
        """Note it, unless more is known already, or the machine was started anew since, which ended it."""
        held = self._leases.get(order.lease)
        if held is None or held.digest is not None or held.lease.expires.boot != self.now.boot:
            return
        if held.late or (held.ended is not None and not order.late):
            return
        self.ended.append(order)
        self._leases[order.lease] = replace(held, ended=self.now, late=order.late)

    def _living(self, task: Task) -> dict[int, Lease]:
        """The living leases of a task, by client, in whichever window."""
        every = (self._leases[id] for id in self._newest.values())
        return {
            held.lease.client: held.lease
            for held in every
            if held.lease.task == task and lives(held, self._state_of(held), self.now)
        }

    def _keep(self, held: LeaseRecord) -> None:
        lease = held.lease
        self._leases[lease.id] = held
        if not held.replaced:
            self._newest[lease.round, lease.task, lease.client] = lease.id

    def _state_of(self, held: LeaseRecord | None) -> State:
        record = None if held is None else self._rounds.get((held.lease.round, held.lease.task))
        return "abandoned" if record is None else record.state

    def _later(self, seconds: float) -> Instant:
        return Instant(self.now.boot, self.now.seconds + seconds)
