"""Seat: an intake's own place in the folder of a run, and what was counted by those who had it before.

Several intakes may work on one folder, and each has files that it alone writes. Which seat is taken is said by a lock
that a kill lets go of, so that who is started again sits where it sat, and goes on counting from there.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from fedtower.core.checkpoint import storage_errors

SEATS = "intakes"

Counted = Mapping[str, list[tuple[dict[str, str], float]]]
"""By counter, its labels and values."""


@dataclass(frozen=True)
class Seat:
    """A place that is taken until :meth:`leave`; ``name`` is ``intake``, of a second one ``intake-2``."""

    folder: Path
    name: str
    lock: IO[str]

    @classmethod
    def take(cls, folder: Path) -> Seat:
        """The first seat in the run's folder that is free."""
        with storage_errors(folder):
            (folder / SEATS).mkdir(parents=True, exist_ok=True)
            for number in count(1):
                name = "intake" if number == 1 else f"intake-{number}"
                lock = (folder / SEATS / f"{name}.lock").open("w")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return cls(folder / SEATS, name, lock)
                except BlockingIOError:
                    lock.close()
        raise AssertionError("there is always another number")

    def counted(self) -> Counted:
        """What those who sat here have counted."""
        return read_counted(self.folder / f"{self.name}.json")

    def write(self, counted: Counted) -> None:
        """Write down what is counted, for the next one who sits here, and for whoever looks.

        Raises:
            StorageError: the disk does not take it.
        """
        path = self.folder / f"{self.name}.json"
        unfinished = path.with_suffix(".unfinished")
        with storage_errors(self.folder):
            unfinished.write_text(json.dumps(counted), encoding="utf-8")
            unfinished.replace(path)

    def leave(self) -> None:
        """Let somebody else sit here."""
        self.lock.close()


def all_counted(folder: Path) -> list[Counted]:
    """What was counted at each seat of a run's folder."""
    return [read_counted(path) for path in sorted((folder / SEATS).glob("*.json"))]


def read_counted(path: Path) -> Counted:
    """What a file says was counted; nothing where there is none that can be read."""
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): [({str(k): str(v) for k, v in labels.items()}, float(value)) for labels, value in of]
            for name, of in held.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
