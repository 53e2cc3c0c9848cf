"""Which segments are still needed, and what a kill has left of others."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from fedtower.plugins.journals.sqlite.index import Index
from fedtower.plugins.journals.sqlite.segments import is_written, segment_path


def unused(connection: sqlite3.Connection, folder: Path) -> list[int]:
    """The segments in which nothing counts and which nobody writes."""
    rows = connection.execute("SELECT number FROM segments WHERE number NOT IN (SELECT segment FROM uploads)")
    return [number for (number,) in rows if not is_written(segment_path(folder, number))]


def tidy(folder: Path, index: Index) -> None:
    """Cut off or remove what a kill has left behind; segments that a living process writes are left alone."""
    with index.write() as connection:
        extents = dict(connection.execute("SELECT number, extent FROM segments").fetchall())
        for path in folder.glob("*.segment"):
            if is_written(path):
                continue
            extent = extents.get(int(path.stem), 0)
            if not extent:
                path.unlink()
                connection.execute("DELETE FROM segments WHERE number = ?", (int(path.stem),))
            elif path.stat().st_size > extent:
                os.truncate(path, extent)
