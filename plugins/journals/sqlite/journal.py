"""SQLite: the journal of a federation whose processes share one machine; nothing to install, nothing to start.

Payloads are appended to segments and flushed; then one transaction makes the whole batch count, and its clients are
answered. A kill between the two leaves bytes that nobody was told about: they are cut off when a journal is opened.
Large values in the database itself would go through its log and its pages, that is twice to the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import DISK_ERRORS, StorageError
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
    check_open,
    check_retirable,
    ends_of,
    since_boot,
)
from fedtower.plugins.journals.sqlite.batches import Order, Placed, Prepared, commit, prepare
from fedtower.plugins.journals.sqlite.index import LEASE, Index, lease_record
from fedtower.plugins.journals.sqlite.retention import tidy, unused
from fedtower.plugins.journals.sqlite.segments import ADVICE, Place, Segment, read_payload, segment_path, sync_folder
from fedtower.plugins.journals.sqlite.windows import check_epoch_in, find_round, get_round, rounds_in

_PAGE = 64


@dataclass(frozen=True)
class SQLite:
    """A journal in a folder: ``index.sqlite`` and ``segments/``. The folder is on a local disk: SQLite's log needs
    memory that the processes share.
    """

    segment_bytes: int = field(default=64 << 20, metadata={"help": "a new segment is begun when one is this long"})
    delay_seconds: float = field(default=0.001, metadata={"help": "how long a batch gathers at most"})
    busy_seconds: float = field(default=5.0, metadata={"help": "how long another process's lock is waited for"})
    keep_rounds: int = field(default=100, metadata={"help": "retired rounds whose leases are still known"})

    def open(self, folder: Path, federation: str, clock: Clock | None = None) -> SQLiteJournal:
        """The journal in ``folder``."""
        with storage_errors(folder):
            (folder / "segments").mkdir(parents=True, exist_ok=True)
        index, reader = (Index(folder / "index.sqlite", self.busy_seconds) for _ in range(2))
        with ExitStack() as undo, storage_errors(folder):
            for each in (index, reader):
                undo.callback(each.close)
            index.prepare(federation)
            tidy(folder / "segments", index)
            sync_folder(folder.parent)  # SQLite does so for what is in the folder
            undo.pop_all()
        return SQLiteJournal(folder, self, index, reader, clock or since_boot)


class SQLiteJournal:
    """An open journal; see :class:`fedtower.core.journal.Journal`."""

    def __init__(self, folder: Path, settings: SQLite, index: Index, reader: Index, clock: Clock) -> None:
        self._folder = folder / "segments"
        self._settings = settings
        self._index, self._reader = index, reader
        self._clock = clock
        self._segment: Segment | None = None
        self._finished: list[Segment] = []
        self._orders: GroupCommit[Order, Prepared, Answer] = GroupCommit(
            "journal",
            lambda orders: prepare(orders, reader, clock, self._append),
            self._commit,
            Limits(settings.delay_seconds),
        )

    def claim(self) -> int:
        """A new epoch."""
        with self._index.write() as connection:
            (epoch,) = connection.execute("UPDATE federation SET epoch = epoch + 1 RETURNING epoch").fetchone()
        return int(epoch)

    def open_round(self, epoch: int, round: int, task: Task, plan: str) -> RoundRecord:
        """The window, open."""
        with self._index.write() as connection:
            check_epoch_in(connection, epoch)
            found = find_round(connection, round, task)
            if found is None:
                values = (round, task, epoch, plan)
                connection.execute("INSERT INTO rounds VALUES (?, ?, 'open', ?, ?, '', 0, 0)", values)
            else:
                check_open(found, plan)
        return found or RoundRecord(round, task, "open", epoch, plan)

    def advance(self, epoch: int, round: int, task: Task, state: State, reason: str = "") -> RoundRecord:
        """The window in its next state."""
        with self._index.write() as connection:
            check_epoch_in(connection, epoch)
            record = get_round(connection, round, task)
            if check_advance(record, state):
                connection.execute(
                    "UPDATE rounds SET state = ?, epoch = ?, reason = ? WHERE round = ? AND task = ?",
                    (state, epoch, reason, round, task),
                )
            return get_round(connection, round, task)

    def rounds(self) -> list[RoundRecord]:
        """The windows."""
        with self._reader.read() as connection:
            return rounds_in(connection)

    def record(self, round: int, task: Task) -> RoundRecord:
        """One window."""
        with self._reader.read() as connection:
            return get_round(connection, round, task)

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
        with self._reader.read() as connection:
            rows = connection.execute(
                f"SELECT {LEASE} FROM leases WHERE task = ? AND digest IS NULL "
                "AND (boot <> ? OR max(expires, coalesce(ended, expires)) > ?) "
                "AND (boot <> ? OR min(expires, coalesce(ended, expires)) <= ?)",
                (task, since.boot, since.seconds, until.boot, until.seconds),
            ).fetchall()
        return [held for held in map(lease_record, rows) if any(between(end, after, until) for end in ends_of(held))]

    def now(self) -> Instant:
        """What time it is."""
        return self._clock()

    def find(self, lease: bytes) -> LeaseRecord | None:
        """A lease by its id."""
        with self._reader.read() as connection:
            row = connection.execute(f"SELECT {LEASE} FROM leases WHERE id = ?", (lease,)).fetchone()
        return None if row is None else lease_record(row)

    def accepted(self, round: int, task: Task, after: int = 0) -> Iterator[Accepted]:
        """The uploads of a window, each read when it is asked for."""
        if self.record(round, task).retired:
            raise WrongState(f"the uploads of round {round} ({task}) are gone: a checkpoint holds what came of them")
        with ExitStack() as stack:
            files: dict[int, int] = {}
            while rows := self._page(round, task, after):
                for position, client, lease, digest, seconds, *place in rows:
                    whose = Place(*place)
                    path = segment_path(self._folder, whose.segment)
                    named = f"{path}: the upload of client {client} in round {round} ({task}), at position {position}"
                    if whose.segment not in files:
                        files[whose.segment] = _open(path, named)
                        stack.callback(os.close, files[whose.segment])
                    payload = read_payload(files[whose.segment], whose, lease, digest, named)
                    yield Accepted(round, task, position, client, lease, payload, seconds)
                    after = position

    def retire(self, epoch: int, through: int) -> None:
        """Remove the payloads of these rounds, segment by segment, as soon as nothing else is in one."""
        with self._index.write() as connection:
            check_epoch_in(connection, epoch)
            check_retirable(rounds_in(connection), through)
            connection.execute("UPDATE rounds SET retired = 1 WHERE round <= ?", (through,))
            connection.execute("DELETE FROM uploads WHERE round <= ?", (through,))
            for table in ("leases", "rounds"):
                connection.execute(f"DELETE FROM {table} WHERE round <= ?", (through - self._settings.keep_rounds,))
            empty = unused(connection, self._folder)
            connection.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in empty])
        for number in empty:  # a kill before this leaves files that the index does not have: see tidy
            segment_path(self._folder, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Commit what waits, and let go of the files; a second time is no error."""
        self._orders.close()
        for segment in [*self._finished, *([self._segment] if self._segment else [])]:
            segment.close()
        self._finished, self._segment = [], None
        for index in (self._index, self._reader):
            index.close()

    def _append(self, uploads: Sequence[Upload]) -> list[Place]:
        """Where the payloads lie now, durably; only one thread calls this."""
        if self._segment is None or self._segment.end >= self._settings.segment_bytes:
            self._begin_segment()
        assert self._segment is not None  # it was just begun
        try:
            return self._segment.append(uploads)
        except OSError as error:
            # What a failed write or flush has left is unknown, so nothing is ever added behind it.
            failed, self._segment = self._segment, None
            self._finished.append(failed)
            with suppress(OSError):
                failed.cut()
            raise _storage_error(failed.path, error) from error

    def _commit(self, orders: Sequence[Prepared]) -> list[Answer]:
        answers = commit(orders, self._index, self._clock)
        # Batches come in order: once one counts that lies in a later segment, an earlier one has no more to come. Until
        # then its lock keeps others from cutting off what is not in the index yet.
        newest = max((order.place.segment for order in orders if isinstance(order, Placed)), default=0)
        while self._finished and self._finished[0].number < newest:
            self._finished.pop(0).close()
        return answers

    def _begin_segment(self) -> None:
        if self._segment is not None:
            self._finished.append(self._segment)
            self._segment = None
        begun: list[Segment] = []
        try:
            with self._index.write() as connection:
                number = connection.execute("INSERT INTO segments (extent) VALUES (0)").lastrowid
                assert number is not None  # of the row just made
                begun.append(_new_segment(self._folder, number))
        except StorageError:
            # The index does not have it, and gives its number to the next one.
            for segment in begun:
                segment.close()
            raise
        (self._segment,) = begun

    def _page(self, round: int, task: Task, after: int) -> list[tuple[Any, ...]]:
        with self._reader.read() as connection:
            return connection.execute(
                "SELECT position, client, lease, digest, ended - given, segment, offset, length "
                "FROM uploads JOIN leases ON id = lease "
                "WHERE uploads.round = ? AND uploads.task = ? AND position > ? ORDER BY position LIMIT ?",
                (round, task, after, _PAGE),
            ).fetchall()


def _open(path: Path, whose: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamagedRecord(f"{whose}: the file is gone. {ADVICE}") from error


def _new_segment(folder: Path, number: int) -> Segment:
    try:
        return Segment(folder, number)
    except OSError as error:
        raise _storage_error(segment_path(folder, number), error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    why = DISK_ERRORS.get(error.errno or 0, f"the disk reports an error ({error}); look at the system's log")
    return StorageError(
        f"cannot write to {path}: {why}. What was acknowledged before is safe; the uploads of this moment are not "
        f"acknowledged, and will be accepted when they are sent again"
    )
