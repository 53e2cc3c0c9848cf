"""Step: which accepted updates a version's step was made of, on the disk before the step is made.

The journal says what was accepted, in each window; when the table process came to look is nobody's to repeat. So it is
written down: a process that was killed makes the same steps of the same updates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import CheckpointError
from fedtower.core.manifest import flush

Taken = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """What version ``version`` took: the window and the position in it of each update, in the order of folding.

    Of an abandoned one, ``abandoned`` says why; it took nothing.
    """

    version: int
    taken: tuple[Taken, ...]
    abandoned: str = ""

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all; it is on the disk when this returns."""
        path = _path(folder, self.version)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"taken": self.taken, "abandoned": self.abandoned}), encoding="utf-8")
            flush(unfinished)
            unfinished.replace(path)
            flush(folder)


def read_step(folder: Path, version: int) -> Step | None:
    """The step of a version, or nothing if it was not made.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = _path(folder, version)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        taken = tuple((int(window), int(position)) for window, position in values["taken"])
        return Step(version, taken, str(values["abandoned"]))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the step {path} cannot be read: {type(error).__name__}: {error}") from error


def read_steps(folder: Path) -> list[Step]:
    """All steps that are known, by version."""
    versions = sorted(int(path.stem) for path in folder.glob("*.json"))
    return [step for version in versions if (step := read_step(folder, version)) is not None]


def forget_steps(folder: Path, through: int) -> None:
    """Remove those of versions up to ``through``."""
    for path in folder.glob("*.json"):
        if int(path.stem) <= through:
            path.unlink(missing_ok=True)


def _path(folder: Path, version: int) -> Path:
    return folder / f"{version:06d}.json"
