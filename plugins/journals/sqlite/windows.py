"""The windows in the index."""

from __future__ import annotations

import sqlite3

from fedtower.core.journal import RoundRecord, Task, check_epoch, unknown_window
from fedtower.plugins.journals.sqlite.index import ROUND, round_record


def check_epoch_in(connection: sqlite3.Connection, epoch: int) -> None:
    """Raise Fenced unless ``epoch`` is the newest."""
    check_epoch(epoch, *connection.execute("SELECT epoch FROM federation").fetchone())


def rounds_in(connection: sqlite3.Connection) -> list[RoundRecord]:
    """All windows that are known."""
    return [round_record(row) for row in connection.execute(f"SELECT {ROUND} FROM rounds ORDER BY round, task")]


def find_round(connection: sqlite3.Connection, round: int, task: Task) -> RoundRecord | None:
    """One window, if it is there."""
    row = connection.execute(f"SELECT {ROUND} FROM rounds WHERE round = ? AND task = ?", (round, task)).fetchone()
    return None if row is None else round_record(row)


def get_round(connection: sqlite3.Connection, round: int, task: Task) -> RoundRecord:
    """One window, which must be there."""
    record = find_round(connection, round, task)
    if record is None:
        raise unknown_window(round, task)
    return record
