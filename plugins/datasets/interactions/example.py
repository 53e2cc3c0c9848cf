"""A made-up CSV file: what the data set is tried with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_USERS, _ITEMS, _EACH = 60, 130, 24


def write(folder: Path) -> dict[str, Any]:
    """Write the file, and return the settings that use it."""
    lines = ["who,what,stars,when,kind,town"]
    for user in range(_USERS):
        for k in range(_EACH):
            item = (user * 7 + 11 * k + k * k) % _ITEMS
            kind = f"{'abc'[item % 3]}|{'xyz'[item % 3]}"
            lines.append(
                f"ann{user},thing{item},{1 + (user + item) % 5},2024-05-01T10:{k:02d}:00,{kind},{'NS'[user % 2]}"
            )
    path = folder / "visits.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "path": str(path),
        "user": "who",
        "item": "what",
        "rating": "stars",
        "timestamp": "when",
        "item_features": ["kind"],
        "user_features": ["town"],
    }
