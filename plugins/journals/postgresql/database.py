"""The database: one connection that comes back when the server does, the tables, and what errors mean."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import errors, sql

from fedtower.core.errors import StorageError
from fedtower.core.journal import Busy, DamagedRecord, JournalError

FORMAT = 2
T = TypeVar("T")
Cursor = psycopg.Cursor[tuple[Any, ...]]

# Payloads are not compressed: they are floats, and compressing them would cost more than it saves.
SCHEMA = """
CREATE TABLE federation (id text NOT NULL, format integer NOT NULL, epoch bigint NOT NULL);
CREATE TABLE rounds (
    round bigint, task text, state text NOT NULL, epoch bigint NOT NULL, plan text NOT NULL, reason text NOT NULL,
    accepted bigint NOT NULL, retired boolean NOT NULL, PRIMARY KEY (round, task)
);
CREATE TABLE leases (
    id bytea PRIMARY KEY, round bigint NOT NULL, task text NOT NULL, client bigint NOT NULL, boot text NOT NULL,
    expires double precision NOT NULL, digest bytea, replaced boolean NOT NULL,
    given double precision, ended double precision, late boolean NOT NULL DEFAULT false
);
CREATE UNIQUE INDEX current_leases ON leases (round, task, client) WHERE NOT replaced;
CREATE TABLE uploads (
    round bigint, task text, position bigint, client bigint NOT NULL, lease bytea NOT NULL, digest bytea NOT NULL,
    payload bytea NOT NULL, PRIMARY KEY (round, task, position)
);
ALTER TABLE uploads ALTER COLUMN payload SET STORAGE EXTERNAL;
"""

# What an older format has to be given, by what it becomes. Of what is there already nobody knows when it was given.
STEPS = {
    2: (
        "ALTER TABLE leases ADD COLUMN given double precision, ADD COLUMN ended double precision, "
        "ADD COLUMN late boolean NOT NULL DEFAULT false",
    )
}

_AGAIN = (errors.SerializationFailure, errors.DeadlockDetected)
_FULL = (errors.DiskFull,)
_WAITED = (errors.LockNotAvailable, errors.QueryCanceled)
_FORBIDDEN = (errors.InsufficientPrivilege, errors.InvalidCatalogName, errors.ReadOnlySqlTransaction)
_DAMAGE = (errors.DataCorrupted, errors.IndexCorrupted)


class Database:
    """One connection for any thread; one transaction at a time."""

    def __init__(self, dsn: str, federation: str, busy_seconds: float) -> None:
        self._dsn = dsn
        self._schema = f"fedtower_{hashlib.sha256(federation.encode()).hexdigest()[:24]}"
        self._federation = federation
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    def transaction(self, work: Callable[[Cursor], T]) -> T:
        """What ``work`` gives, once it is durable. It is done again from the start when the connection was lost, so it
        must bear that it was done already.

        Raises:
            Busy: the server is away, or somebody holds a lock, for longer than the journal waits.
            StorageError: its disk is full, or it does not let us.
        """
        until, pause = time.monotonic() + self._busy_seconds, 0.01
        with self._lock:
            while True:
                try:
                    return self._attempt(work)
                except (*_FULL, *_WAITED, *_FORBIDDEN, *_DAMAGE) as error:
                    raise self._explained(error) from error
                except (psycopg.OperationalError, psycopg.InterfaceError, *_AGAIN) as error:
                    if not isinstance(error, _AGAIN):
                        self._disconnect()
                    if time.monotonic() + pause > until:
                        raise Busy(
                            f"the database has been away for {self._busy_seconds:g} s ({_first_line(error)}); nothing "
                            f"acknowledged is lost: come back in 2 seconds, and see whether PostgreSQL runs",
                            seconds=2.0,
                        ) from error
                time.sleep(pause)
                pause = min(2 * pause, 0.5)

    def prepare(self) -> None:
        """Make the tables, bring older ones up to date, or see that they are those of this federation.

        Raises:
            JournalError: they are of another format, or another federation's.
        """
        found = self.transaction(self._make_tables)
        if found != (self._federation, FORMAT):
            raise JournalError(
                f"the schema {self._schema} has a journal of format {found[1]} for the federation {found[0]!r}, not of "
                f"format {FORMAT} for {self._federation!r}; use the fedtower that wrote it, or another database"
            )

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            self._disconnect()

    def _attempt(self, work: Callable[[Cursor], T]) -> T:
        if self._connection is None:
            self._connection = self._connect()
        with self._connection.transaction(), self._connection.cursor() as cursor:
            return work(cursor)

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        wait = max(2, round(self._busy_seconds))
        connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=wait, application_name="fedtower")
        # Each statement sees what was committed before it: a lock is waited for, and then everything is read anew.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        milliseconds = round(1000 * self._busy_seconds)
        # Whatever the server's own settings are, a commit that returns is on its disk.
        for name, value in (
            ("synchronous_commit", "on"),
            ("lock_timeout", str(milliseconds)),
            ("search_path", self._schema),
        ):
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _make_tables(self, cursor: Cursor) -> tuple[Any, ...]:
        # Two that open a new journal at once: the second one waits here, and finds the tables.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (self._schema,))
        cursor.execute("SELECT to_regclass(%s)", (f"{self._schema}.federation",))
        if cursor.fetchone() == (None,):
            cursor.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
            for statement in SCHEMA.strip().split(";\n"):
                cursor.execute(statement.encode())
            cursor.execute("INSERT INTO federation VALUES (%s, %s, 0)", (self._federation, FORMAT))
        owner, version = one(cursor.execute("SELECT id, format FROM federation"))
        if owner == self._federation and 0 < version < FORMAT:
            for statement in (each for step in range(version + 1, FORMAT + 1) for each in STEPS[step]):
                cursor.execute(statement)
            version = FORMAT
            cursor.execute("UPDATE federation SET format = %s", (version,))
        return owner, version

    def _explained(self, error: psycopg.Error) -> StorageError | DamagedRecord:
        said = _first_line(error)
        if isinstance(error, _DAMAGE):
            return DamagedRecord(f"the database is damaged ({said}); bring it back from a backup")
        if isinstance(error, _WAITED):
            return Busy(
                f"somebody has held a lock in {self._schema} for more than {self._busy_seconds:g} s ({said}); nothing "
                f"is lost: come back in a second",
                seconds=1.0,
            )
        if isinstance(error, _FULL):
            return StorageError(
                f"the database's disk is full ({said}); free some space there. What was acknowledged before is intact"
            )
        return StorageError(f"the database refuses this ({said}); see to the role's permissions and the dsn")


def one(cursor: Cursor) -> tuple[Any, ...]:
    """The row that must be there."""
    row = cursor.fetchone()
    assert row is not None  # the statement always gives one
    return row


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
