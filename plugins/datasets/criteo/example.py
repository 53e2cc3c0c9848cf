"""A made-up file in the layout of Criteo's: what the data set is tried with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtower.plugins.datasets.criteo.reader import CATEGORIES, INTEGERS

_LINES, _EVERY = 150, 7


def write(folder: Path) -> dict[str, Any]:
    """Write the file, and return the settings that use it."""
    lines = []
    for line in range(_LINES):
        label = int((line * line) % 5 == 1)
        integers = [
            "" if (line + place) % _EVERY == 0 else str((line * place) % 50 - 2) for place in range(len(INTEGERS))
        ]
        words = [
            "" if (line * place) % (_EVERY + 4) == 1 else f"{(line % (place + 2)) * 2_654_435 + place:08x}"
            for place in range(len(CATEGORIES))
        ]
        lines.append("\t".join([str(label), *integers, *words]))
    path = folder / "train.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "path": str(path),
        "train_rows": 110,
        "validation_rows": 20,
        "test_rows": 20,
        "hash_size": 50,
        "clients": 10,
        "smallest": 5,
    }
