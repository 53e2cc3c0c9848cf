"""What an intake asks of the journal: leases and uploads, many in one transaction."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedtower.core.journal import (
    Clock,
    Instant,
    Lease,
    LeaseRecord,
    Outcome,
    RoundRecord,
    State,
    Task,
    Upload,
    WrongState,
    judge,
    lives,
)
from fedtower.plugins.journals.sqlite.index import LEASE, Index, lease_record
from fedtower.plugins.journals.sqlite.segments import Place
from fedtower.plugins.journals.sqlite.windows import find_round


@dataclass(frozen=True)
class Grant:
    """Asks for a lease."""

    round: int
    task: Task
    client: int
    seconds: float


@dataclass(frozen=True)
class Renewal:
    """Asks for a longer lease."""

    lease: bytes
    seconds: float


@dataclass(frozen=True)
class Placed:
    """An upload whose payload is durable and counts for nothing yet."""

    lease: bytes
    digest: bytes
    place: Place


Order = Grant | Renewal | Upload
Prepared = Grant | Renewal | Placed | Outcome
Answer = Lease | Outcome | None


def prepare(
    orders: Sequence[Order], index: Index, clock: Clock, append: Callable[[Sequence[Upload]], list[Place]]
) -> list[Prepared]:
    """Write the payloads that look acceptable, and answer the other uploads: none of these answers can change later."""
    now = clock()
    with index.read() as connection:
        window = Window(connection, now)
        outcomes = {at: window.judge(order.lease, order.digest) for at, order in _uploads(orders)}
    fresh = [(at, order) for at, order in _uploads(orders) if outcomes[at] is Outcome.ACCEPTED]
    places = dict(zip((at for at, _ in fresh), append([upload for _, upload in fresh]) if fresh else (), strict=True))
    return [
        order
        if not isinstance(order, Upload)
        else (Placed(order.lease, order.digest, places[at]) if at in places else outcomes[at])
        for at, order in enumerate(orders)
    ]


def commit(orders: Sequence[Prepared], index: Index, clock: Clock) -> list[Answer]:
    """The answers, all of them durable."""
    if all(isinstance(order, Outcome) for order in orders):
        return [order for order in orders if isinstance(order, Outcome)]
    with index.write() as connection:
        window = Window(connection, clock())
        answers: list[Answer] = []
        for order in orders:
            if isinstance(order, Grant):
                answers.append(window.grant(order))
            elif isinstance(order, Renewal):
                answers.append(window.renew(order))
            elif isinstance(order, Placed):
                answers.append(window.accept(order))
            else:
                answers.append(order)
        window.flush()
    return answers


class Window:
    """The windows and leases that a batch is about, read once, and what the batch adds to them."""

    def __init__(self, connection: sqlite3.Connection, now: Instant) -> None:
        self._connection = connection
        self._now = now
        self._rounds: dict[tuple[int, Task], RoundRecord | None] = {}
        self._counted: dict[tuple[int, Task], int] = {}
        self._extents: dict[int, int] = {}
        self._uploads: list[tuple[object, ...]] = []

    def judge(self, lease: bytes, digest: bytes) -> Outcome:
        """What becomes of an upload."""
        held = self._held(lease)
        return judge(digest, held, self._state_of(held), self._now)

    def grant(self, order: Grant) -> Lease | None:
        """The lease that the client has, or a new one."""
        record = self._round(order.round, order.task)
        if record is None or record.state != "open":
            return None
        row = self._connection.execute(
            f"SELECT {LEASE} FROM leases WHERE round = ? AND task = ? AND client = ? AND NOT replaced",
            (order.round, order.task, order.client),
        ).fetchone()
        if row is not None:
            held = lease_record(row)
            if held.digest is not None:
                return None
            if lives(held, record.state, self._now):
                return held.lease
            self._connection.execute("UPDATE leases SET replaced = 1 WHERE id = ?", (held.lease.id,))
        lease = Lease(secrets.token_bytes(16), order.round, order.task, order.client, later(self._now, order.seconds))
        self._connection.execute(
            f"INSERT INTO leases ({LEASE}) VALUES (?, ?, ?, ?, ?, ?, NULL, 0)",
            (lease.id, lease.round, lease.task, lease.client, lease.expires.boot, lease.expires.seconds),
        )
        return lease

    def renew(self, order: Renewal) -> Lease | None:
        """The lease with another end."""
        held = self._held(order.lease)
        if held is None or not lives(held, self._state_of(held), self._now):
            return None
        renewed = replace(held.lease, expires=later(self._now, order.seconds))
        self._connection.execute("UPDATE leases SET expires = ? WHERE id = ?", (renewed.expires.seconds, renewed.id))
        return renewed

    def accept(self, upload: Placed) -> Outcome:
        """Count an upload whose payload is there, if it still may."""
        held = self._held(upload.lease)
        outcome = judge(upload.digest, held, self._state_of(held), self._now)
        self._extents[upload.place.segment] = max(self._extents.get(upload.place.segment, 0), upload.place.end)
        if outcome is Outcome.ACCEPTED:
            assert held is not None  # without a lease the outcome is another
            key = (held.lease.round, held.lease.task)
            if key not in self._counted:
                record = self._round(*key)
                assert record is not None  # a lease was given in it
                self._counted[key] = record.accepted
            self._counted[key] += 1
            place = upload.place
            self._uploads.append((*key, self._counted[key], upload.lease, place.segment, place.offset, place.length))
            self._connection.execute("UPDATE leases SET digest = ? WHERE id = ?", (upload.digest, upload.lease))
        return outcome

    def flush(self) -> None:
        """Write what was gathered."""
        self._connection.executemany("INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?)", self._uploads)
        self._connection.executemany(
            "UPDATE rounds SET accepted = ? WHERE round = ? AND task = ?",
            [(count, *key) for key, count in self._counted.items()],
        )
        for segment, extent in self._extents.items():
            done = self._connection.execute(
                "UPDATE segments SET extent = max(extent, ?) WHERE number = ?", (extent, segment)
            )
            if done.rowcount != 1:
                raise WrongState(f"the segment {segment} is not in the index any more; was the folder tidied by hand?")

    def _round(self, round: int, task: Task) -> RoundRecord | None:
        key = (round, task)
        if key not in self._rounds:
            self._rounds[key] = find_round(self._connection, round, task)
        return self._rounds[key]

    def _state_of(self, held: LeaseRecord | None) -> State:
        record = None if held is None else self._round(held.lease.round, held.lease.task)
        return "abandoned" if record is None else record.state

    def _held(self, lease: bytes) -> LeaseRecord | None:
        row = self._connection.execute(f"SELECT {LEASE} FROM leases WHERE id = ?", (lease,)).fetchone()
        return None if row is None else lease_record(row)


def later(now: Instant, seconds: float) -> Instant:
    """That many seconds from now on."""
    return Instant(now.boot, now.seconds + seconds)


def _uploads(orders: Sequence[Order]) -> list[tuple[int, Upload]]:
    return [(at, order) for at, order in enumerate(orders) if isinstance(order, Upload)]
