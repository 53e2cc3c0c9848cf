"""LeasedRows: what is known of a lease besides the journal: which rows were given out under it, of how many examples.

An update is held to both. They lie in files that are not flushed: an intake that is killed forgets nothing, and when a
machine loses its power the leases end with it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.journal import Task
from fedtower.core.rows import IntArray

_EXAMPLES = ""  # no table has this name


def folder_of(round: int, task: Task) -> str:
    """What the folder of a window's leases is called."""
    return f"{round:06d}-{task}"


def keep_only(folder: Path, windows: Collection[tuple[int, Task]]) -> None:
    """Remove the folders of all other windows: nobody has a lease there any more."""
    kept = {folder_of(*window) for window in windows}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class LeasedRows:
    """One file a lease, appended to, in a folder a window."""

    folder: Path

    def note(self, window: tuple[int, Task], lease: bytes, source: str, ids: IntArray) -> None:
        """Rows of a source are given out."""
        self._append(window, lease, source, ids.tolist())

    def note_examples(self, window: tuple[int, Task], lease: bytes, count: int) -> None:
        """The device says how many examples it has."""
        self._append(window, lease, _EXAMPLES, [count])

    def of(self, window: tuple[int, Task], lease: bytes) -> tuple[Mapping[str, IntArray], int | None]:
        """The distinct ids that were given out, sorted, by source; and how many examples the device said it has."""
        found: dict[str, list[int]] = defaultdict(list)
        try:
            lines = (self.folder / folder_of(*window) / lease.hex()).read_bytes().splitlines()
        except FileNotFoundError:
            return {}, None
        for line in lines:
            try:
                source, ids = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            found[source].extend(ids)
        said = found.pop(_EXAMPLES, None)
        given = {source: np.unique(np.array(ids, dtype=np.int64)) for source, ids in found.items()}
        return given, None if said is None else max(said)

    def _append(self, window: tuple[int, Task], lease: bytes, source: str, values: list[int]) -> None:
        line = json.dumps([source, values]).encode() + b"\n"
        place = self.folder / folder_of(*window)
        with storage_errors(self.folder):
            place.mkdir(parents=True, exist_ok=True)
            with (place / lease.hex()).open("ab") as file:
                file.write(line)
