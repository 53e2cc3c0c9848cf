"""The index: windows, leases, and where each payload lies, in an SQLite database that several processes share.

Every commit is on the disk when it returns (write-ahead log, ``synchronous=FULL``); https://www.sqlite.org/wal.html.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import StorageError
from fedtower.core.journal import Busy, DamagedRecord, Instant, JournalError, Lease, LeaseRecord, RoundRecord

FORMAT = 2
APPLICATION = 0x66746A31

# Leases lie in the order in which they were given, so those of one cohort share pages, and a batch writes few.
SCHEMA = """
CREATE TABLE federation (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, epoch INTEGER NOT NULL) STRICT;
CREATE TABLE rounds (
    round INTEGER, task TEXT, state TEXT NOT NULL, epoch INTEGER NOT NULL, plan TEXT NOT NULL, reason TEXT NOT NULL,
    accepted INTEGER NOT NULL, retired INTEGER NOT NULL, PRIMARY KEY (round, task)
) STRICT, WITHOUT ROWID;
CREATE TABLE leases (
    number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, round INTEGER NOT NULL, task TEXT NOT NULL,
    client INTEGER NOT NULL, boot TEXT NOT NULL, expires REAL NOT NULL, digest BLOB, replaced INTEGER NOT NULL,
    given REAL, ended REAL, late INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX current_leases ON leases (round, task, client) WHERE NOT replaced;
CREATE TABLE uploads (
    round INTEGER, task TEXT, position INTEGER, lease BLOB NOT NULL, segment INTEGER NOT NULL,
    offset INTEGER NOT NULL, length INTEGER NOT NULL, PRIMARY KEY (round, task, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE segments (number INTEGER PRIMARY KEY AUTOINCREMENT, extent INTEGER NOT NULL) STRICT;
"""

# What an older format has to be given, by what it becomes. Of what is there already nobody knows when it was given.
STEPS = {
    2: (
        "ALTER TABLE leases ADD COLUMN given REAL",
        "ALTER TABLE leases ADD COLUMN ended REAL",
        "ALTER TABLE leases ADD COLUMN late INTEGER NOT NULL DEFAULT 0",
    )
}

ROUND = "round, task, state, epoch, plan, reason, accepted, retired"
LEASE = "id, round, task, client, boot, expires, digest, replaced, given, ended, late"

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_WAITING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DISK = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_IOERR: "the disk reports an error, or is full; free some space, or look at the system's log",
    sqlite3.SQLITE_READONLY: "the file system or the file is read-only; choose another folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; is the folder there, and ours?",
    sqlite3.SQLITE_PERM: "there is no permission to do that; choose another folder",
}


class Index:
    """A connection for any thread; one transaction at a time."""

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self.path = path
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        with self._errors():
            self._connection = sqlite3.connect(
                path, timeout=busy_seconds, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            self._connection.execute("PRAGMA synchronous=FULL")

    def prepare(self, federation: str) -> None:
        """Make the tables, bring older ones up to date, or see that they are those of this federation.

        Raises:
            JournalError: they are another's, or of another format.
        """
        with self._lock, self._errors():
            self._connection.execute("PRAGMA journal_mode=WAL")
        with self.write() as connection:
            found = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not found:
                for statement in SCHEMA.strip().split(";\n"):
                    connection.execute(statement)
                connection.execute("INSERT INTO federation VALUES (1, ?, 0)", (federation,))
                connection.execute(f"PRAGMA application_id={APPLICATION}")
                connection.execute(f"PRAGMA user_version={FORMAT}")
            application, version = _format(connection)
            if application == APPLICATION and 0 < version < FORMAT:
                for statement in (each for step in range(version + 1, FORMAT + 1) for each in STEPS[step]):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={FORMAT}")
                application, version = _format(connection)
            if (application, version) != (APPLICATION, FORMAT):
                raise JournalError(
                    f"{self.path} is no journal of format {FORMAT} (application {application:#x}, format {version}): "
                    f"use the fedtower that wrote it, or another folder"
                )
            (owner,) = connection.execute("SELECT id FROM federation").fetchone()
        if owner != federation:
            raise JournalError(f"{self.path} is the journal of the federation {owner!r}, not of {federation!r}")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """What is committed now."""
        with self._lock, self._errors():
            yield self._connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes beside; all of it is durable afterwards, or nothing is there."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the database."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What SQLite says, as the error that says what to do."""
        try:
            with storage_errors(self.path):
                yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _WAITING:
                raise Busy(
                    f"another process has held {self.path} for more than {self._busy_seconds:g} s; nothing is lost: "
                    f"come back in a second, and end whatever else has it open",
                    seconds=1.0,
                ) from error
            if code in _DISK:
                raise StorageError(
                    f"cannot write to {self.path}: {_DISK[code]}. What was acknowledged before is intact"
                ) from error
            if code in _DAMAGE:
                raise DamagedRecord(
                    f"{self.path} is damaged ({error}); bring it back from a backup together with its segments, or "
                    f"begin a new journal from the newest checkpoint"
                ) from error
            raise


def _format(connection: sqlite3.Connection) -> tuple[int, int]:
    """Whose tables they are, and in which format."""
    application, version = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version")
    )
    return application, version


def round_record(row: tuple[Any, ...]) -> RoundRecord:
    """A row of ``rounds``, its columns as in :data:`ROUND`."""
    round, task, state, epoch, plan, reason, accepted, retired = row
    return RoundRecord(round, task, state, epoch, plan, reason, accepted, bool(retired))


def lease_record(row: tuple[Any, ...]) -> LeaseRecord:
    """A row of ``leases``, its columns as in :data:`LEASE`."""
    id, round, task, client, boot, expires, digest, replaced, given, ended, late = row
    since, end = (None if seconds is None else Instant(boot, seconds) for seconds in (given, ended))
    lease = Lease(id, round, task, client, Instant(boot, expires), since)
    return LeaseRecord(lease, digest, bool(replaced), end, bool(late))
