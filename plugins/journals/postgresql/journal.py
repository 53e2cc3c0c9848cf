"""PostgreSQL: the journal of a federation with several intakes, which may be on several machines.

Payloads lie in the database: machines share no disk, one commit makes payload and index durable together, and a backup
of the database is one of the journal. The price is speed; ``benchmarks/journal.py`` prints it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fedtower.core.group_commit import GroupCommit, Limits
from fedtower.core.intake import Answer, Ending, Grant, Renewal
from fedtower.core.journal import (
    Accepted,
    Clock,
    DamagedRecord,
    Instant,
    Lease,
    LeaseRecord,
    Outcome,
    RoundRecord,
    State,
    Task,
    Upload,
    WrongState,
    between,
    check_advance,
    check_epoch,
    check_open,
    check_retirable,
    ends_of,
    unknown_window,
)
from fedtower.plugins.journals.postgresql.batches import LEASE, ROUND, Order, commit, find_leases, leases_of
from fedtower.plugins.journals.postgresql.database import Cursor, Database, one


@dataclass(frozen=True)
class PostgreSQL:
    """A journal in a schema of its own for each federation. Leave the server's autovacuum on: it gives back the space
    of retired payloads.

    Leases are measured by the server's clock as it was when the journal was opened, and from there on by a clock that
    nobody can set: intakes on several machines have no other clock in common.
    """

    dsn: str = field(metadata={"help": "where the database is, as libpq reads it; a password belongs in ~/.pgpass"})
    delay_seconds: float = field(default=0.001, metadata={"help": "how long a batch gathers at most"})
    busy_seconds: float = field(
        default=10.0, metadata={"help": "how long a lock, or a server that is away, is waited for"}
    )
    keep_rounds: int = field(default=100, metadata={"help": "retired rounds whose leases are still known"})

    def open(self, folder: Path, federation: str, clock: Clock | None = None) -> PostgreSQLJournal:
        """The journal of ``federation``; it needs no folder."""
        writer, reader = (Database(self.dsn, federation, self.busy_seconds) for _ in range(2))
        with ExitStack() as undo:
            for database in (writer, reader):
                undo.callback(database.close)
            writer.prepare()
            journal = PostgreSQLJournal(self, writer, reader, clock or server_clock(reader))
            undo.pop_all()
        return journal


class PostgreSQLJournal:
    """An open journal; see :class:`fedtower.core.journal.Journal`."""

    def __init__(self, settings: PostgreSQL, writer: Database, reader: Database, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._writer, self._reader = writer, reader
        self._orders: GroupCommit[Order, Order, Answer] = GroupCommit(
            "journal",
            lambda orders: orders,
            lambda orders: writer.transaction(lambda cursor: commit(orders, cursor, clock())),
            Limits(settings.delay_seconds),
        )

    def claim(self) -> int:
        """A new epoch."""
        (epoch,) = self._reader.transaction(
            lambda cursor: one(cursor.execute("UPDATE federation SET epoch = epoch + 1 RETURNING epoch"))
        )
        return int(epoch)

    def open_round(self, epoch: int, round: int, task: Task, plan: str) -> RoundRecord:
        """The window, open."""

        def work(cursor: Cursor) -> RoundRecord:
            _check_epoch(cursor, epoch)
            cursor.execute(
                "INSERT INTO rounds VALUES (%s, %s, 'open', %s, %s, '', 0, false) ON CONFLICT DO NOTHING",
                (round, task, epoch, plan),
            )
            record = _record(cursor, round, task)
            check_open(record, plan)
            return record

        return self._reader.transaction(work)

    def advance(self, epoch: int, round: int, task: Task, state: State, reason: str = "") -> RoundRecord:
        """The window in its next state."""

        def work(cursor: Cursor) -> RoundRecord:
            _check_epoch(cursor, epoch)
            if check_advance(_record(cursor, round, task, lock=True), state):
                cursor.execute(
                    "UPDATE rounds SET state = %s, epoch = %s, reason = %s WHERE round = %s AND task = %s",
                    (state, epoch, reason, round, task),
                )
            return _record(cursor, round, task)

        return self._reader.transaction(work)

    def rounds(self) -> list[RoundRecord]:
        """The windows."""
        return self._reader.transaction(_rounds)

    def record(self, round: int, task: Task) -> RoundRecord:
        """One window."""
        return self._reader.transaction(lambda cursor: _record(cursor, round, task))

    def lease(
        self, round: int, task: Task, client: int, seconds: float, most: int | None = None
    ) -> Future[Lease | None]:
        """A lease, when it is durable."""
        return cast("Future[Lease | None]", self._orders.submit(Grant(round, task, client, seconds, most)))

    def renew(self, lease: bytes, seconds: float) -> Future[Lease | None]:
        """The lease with another end, when it is durable."""
        return cast("Future[Lease | None]", self._orders.submit(Renewal(lease, seconds)))

    def accept(self, upload: Upload) -> Future[Outcome]:
        """What becomes of the upload, when it is durable."""
        return cast("Future[Outcome]", self._orders.submit(upload, upload.nbytes))

    def end(self, lease: bytes, *, late: bool) -> Future[None]:
        """Noted, when it is durable."""
        return cast("Future[None]", self._orders.submit(Ending(lease, late)))

    def over(self, task: Task, after: Instant | None, until: Instant) -> list[LeaseRecord]:
        """The leases that brought nothing, and came to an end between these moments."""
        since = Instant("", float("-inf")) if after is None else after
        held = self._reader.transaction(
            lambda cursor: leases_of(
                cursor.execute(
                    f"SELECT {LEASE} FROM leases WHERE task = %s AND digest IS NULL "
                    "AND (boot <> %s OR greatest(expires, coalesce(ended, expires)) > %s) "
                    "AND (boot <> %s OR least(expires, coalesce(ended, expires)) <= %s)",
                    (task, since.boot, since.seconds, until.boot, until.seconds),
                )
            )
        )
        return [each for each in held if any(between(end, after, until) for end in ends_of(each))]

    def now(self) -> Instant:
        """What time it is."""
        return self._clock()

    def find(self, lease: bytes) -> LeaseRecord | None:
        """A lease by its id."""
        found = self._reader.transaction(lambda cursor: find_leases(cursor, [lease]))
        return found[0] if found else None

    def accepted(self, round: int, task: Task, after: int = 0) -> Iterator[Accepted]:
        """The uploads of a window, each read when it is asked for."""
        if self.record(round, task).retired:
            raise WrongState(f"the uploads of round {round} ({task}) are gone: a checkpoint holds what came of them")
        while row := self._reader.transaction(_next_upload(round, task, after)):
            after, client, lease, digest, payload, seconds = row
            if hashlib.sha256(payload).digest() != digest:
                raise DamagedRecord(
                    f"the upload of client {client} in round {round} ({task}), at position {after}, does not have its "
                    f"SHA-256 any more; bring the database back from a backup, or abandon the round"
                )
            yield Accepted(round, task, after, client, lease, payload, seconds)

    def retire(self, epoch: int, through: int) -> None:
        """Delete the payloads of these rounds."""

        def work(cursor: Cursor) -> None:
            _check_epoch(cursor, epoch)
            check_retirable(_rounds(cursor), through)
            cursor.execute("UPDATE rounds SET retired = true WHERE round <= %s AND NOT retired", (through,))
            cursor.execute("DELETE FROM uploads WHERE round <= %s", (through,))
            forgotten = (through - self._settings.keep_rounds,)
            cursor.execute("DELETE FROM leases WHERE round <= %s", forgotten)
            cursor.execute("DELETE FROM rounds WHERE round <= %s", forgotten)

        self._reader.transaction(work)

    def close(self) -> None:
        """Commit what waits, and let go of the connections; a second time is no error."""
        self._orders.close()
        for database in (self._writer, self._reader):
            database.close()


def server_clock(database: Database) -> Clock:
    """The server's time of now, going on by CLOCK_BOOTTIME."""
    (seconds,) = database.transaction(
        lambda cursor: one(cursor.execute("SELECT extract(epoch FROM clock_timestamp())::double precision"))
    )
    ahead = seconds - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: Instant("postgresql", time.clock_gettime(time.CLOCK_BOOTTIME) + ahead)


def _check_epoch(cursor: Cursor, epoch: int) -> None:
    """Nobody can claim another epoch before this transaction is over."""
    check_epoch(epoch, *one(cursor.execute("SELECT epoch FROM federation FOR SHARE")))


def _rounds(cursor: Cursor) -> list[RoundRecord]:
    return [RoundRecord(*row) for row in cursor.execute(f"SELECT {ROUND} FROM rounds ORDER BY round, task")]


def _record(cursor: Cursor, round: int, task: Task, *, lock: bool = False) -> RoundRecord:
    cursor.execute(
        f"SELECT {ROUND} FROM rounds WHERE round = %s AND task = %s{' FOR UPDATE' if lock else ''}", (round, task)
    )
    row = cursor.fetchone()
    if row is None:
        raise unknown_window(round, task)
    return RoundRecord(*row)


def _next_upload(round: int, task: Task, after: int) -> Callable[[Cursor], tuple[Any, ...] | None]:
    """One at a time: they may be large."""

    def work(cursor: Cursor) -> tuple[Any, ...] | None:
        return cursor.execute(
            "SELECT position, u.client, lease, u.digest, payload, ended - given FROM uploads u LEFT JOIN leases "
            "ON id = lease WHERE u.round = %s AND u.task = %s AND position > %s ORDER BY position LIMIT 1",
            (round, task, after),
            binary=True,
        ).fetchone()

    return work
