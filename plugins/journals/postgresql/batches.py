"""What an intake asks of the journal: leases and uploads, many in one transaction.

A transaction first locks the windows that it is about, in their order: so intakes take turns, position by position, and
cannot wait for each other in a circle. Payloads are sent last, and only those that count.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedtower.core.journal import (
    Instant,
    Lease,
    LeaseRecord,
    Outcome,
    RoundRecord,
    State,
    Task,
    Upload,
    judge,
    lives,
)
from fedtower.plugins.journals.postgresql.database import Cursor

ROUND = "round, task, state, epoch, plan, reason, accepted, retired"
LEASE = "id, round, task, client, boot, expires, digest, replaced"


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


Order = Grant | Renewal | Upload
Answer = Lease | Outcome | None


def commit(orders: Sequence[Order], cursor: Cursor, now: Instant) -> list[Answer]:
    """The answers, as they will be when the transaction is over."""
    batch = Batch(cursor, orders, now)
    answers: list[Answer] = []
    for order in orders:
        if isinstance(order, Grant):
            answers.append(batch.grant(order))
        elif isinstance(order, Renewal):
            answers.append(batch.renew(order))
        else:
            answers.append(batch.accept(order))
    batch.write()
    return answers


@dataclass
class Batch:
    """The windows and leases that some orders are about, locked and read; and what the orders make of them."""

    cursor: Cursor
    orders: Sequence[Order]
    now: Instant
    rounds: dict[tuple[int, Task], RoundRecord] = field(default_factory=dict)
    leases: dict[bytes, LeaseRecord] = field(default_factory=dict)
    current: dict[tuple[int, Task, int], bytes] = field(default_factory=dict)
    changed: dict[bytes, LeaseRecord] = field(default_factory=dict)
    uploads: list[tuple[LeaseRecord, int, Upload]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = [order.lease for order in self.orders if not isinstance(order, Grant)]
        grants = [order for order in self.orders if isinstance(order, Grant)]
        windows = {(order.round, order.task) for order in grants}
        if named:
            self.cursor.execute("SELECT DISTINCT round, task FROM leases WHERE id = ANY(%s)", (named,))
            windows |= set(self.cursor.fetchall())
        self._lock(sorted(windows))
        if named:
            self.cursor.execute(f"SELECT {LEASE} FROM leases WHERE id = ANY(%s)", (named,))
            self._learn(self.cursor)
        if grants:
            self.cursor.execute(
                f"SELECT {LEASE} FROM leases WHERE NOT replaced AND (round, task, client) IN "
                "(SELECT * FROM unnest(%s::bigint[], %s::text[], %s::bigint[]))",
                ([order.round for order in grants], [order.task for order in grants], [g.client for g in grants]),
            )
            self._learn(self.cursor)

    def grant(self, order: Grant) -> Lease | None:
        """The lease that the client has, or a new one."""
        record = self.rounds.get((order.round, order.task))
        if record is None or record.state != "open":
            return None
        held = self.leases.get(self.current.get((order.round, order.task, order.client), b""))
        if held is not None and held.digest is not None:
            return None
        if held is not None and lives(held, record.state, self.now):
            return held.lease
        if held is not None:
            self._change(replace(held, replaced=True))
        expires = Instant(self.now.boot, self.now.seconds + order.seconds)
        lease = Lease(secrets.token_bytes(16), order.round, order.task, order.client, expires)
        self._change(LeaseRecord(lease))
        return lease

    def renew(self, order: Renewal) -> Lease | None:
        """The lease with another end."""
        held = self.leases.get(order.lease)
        if held is None or not lives(held, self._state_of(held), self.now):
            return None
        lease = replace(held.lease, expires=Instant(self.now.boot, self.now.seconds + order.seconds))
        self._change(replace(held, lease=lease))
        return lease

    def accept(self, upload: Upload) -> Outcome:
        """Count the upload, if it may."""
        held = self.leases.get(upload.lease)
        outcome = judge(upload.digest, held, self._state_of(held), self.now)
        if outcome is Outcome.ACCEPTED:
            assert held is not None  # without a lease the outcome is another
            key = (held.lease.round, held.lease.task)
            self.rounds[key] = replace(self.rounds[key], accepted=self.rounds[key].accepted + 1)
            held = replace(held, digest=upload.digest)
            self.uploads.append((held, self.rounds[key].accepted, upload))
            self._change(held)
        return outcome

    def write(self) -> None:
        """Send what has changed; replaced leases first, as a client has one that is not."""
        rows = sorted(map(_lease_row, self.changed.values()), key=lambda row: not row[-1])
        self.cursor.executemany(
            f"INSERT INTO leases ({LEASE}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO UPDATE "
            "SET expires = excluded.expires, digest = excluded.digest, replaced = excluded.replaced",
            rows,
        )
        if not self.uploads:
            return
        counted = {(held.lease.round, held.lease.task) for held, _, _ in self.uploads}
        self.cursor.executemany(
            "UPDATE rounds SET accepted = %s WHERE round = %s AND task = %s",
            [(self.rounds[key].accepted, *key) for key in sorted(counted)],
        )
        columns = "round, task, position, client, lease, digest, payload"
        with self.cursor.copy(f"COPY uploads ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "text", "int8", "int8", "bytea", "bytea", "bytea"])
            for held, position, upload in self.uploads:
                lease = held.lease
                payload = b"".join(upload.chunks)
                copy.write_row((lease.round, lease.task, position, lease.client, lease.id, upload.digest, payload))

    def _lock(self, windows: Sequence[tuple[int, Task]]) -> None:
        if windows:
            self.cursor.execute(
                f"SELECT {ROUND} FROM rounds WHERE (round, task) IN (SELECT * FROM unnest(%s::bigint[], %s::text[])) "
                "ORDER BY round, task FOR UPDATE",
                ([round for round, _ in windows], [task for _, task in windows]),
            )
            self.rounds = {(row[0], row[1]): RoundRecord(*row) for row in self.cursor}

    def _learn(self, rows: Iterable[tuple[Any, ...]]) -> None:
        for id, round, task, client, boot, expires, digest, replaced in rows:
            held = LeaseRecord(Lease(id, round, task, client, Instant(boot, expires)), digest, replaced)
            self._remember(held)

    def _change(self, held: LeaseRecord) -> None:
        self.changed[held.lease.id] = held
        self._remember(held)

    def _remember(self, held: LeaseRecord) -> None:
        self.leases[held.lease.id] = held
        if not held.replaced:
            self.current[held.lease.round, held.lease.task, held.lease.client] = held.lease.id

    def _state_of(self, held: LeaseRecord | None) -> State:
        record = None if held is None else self.rounds.get((held.lease.round, held.lease.task))
        return "abandoned" if record is None else record.state


def _lease_row(held: LeaseRecord) -> tuple[Any, ...]:
    lease = held.lease
    expires = lease.expires
    return lease.id, lease.round, lease.task, lease.client, expires.boot, expires.seconds, held.digest, held.replaced
