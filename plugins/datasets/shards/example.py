"""A folder of made-up shards: what the data set is tried with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedtower.core.draws import Draws
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.shards import write_shards
from fedtower.recsys.splits import make_split
from fedtower.recsys.vocabulary import Vocabulary

_USERS, _ITEMS, _EACH = 60, 130, 24


def write(folder: Path) -> dict[str, Any]:
    """Write the folder, and return the settings that use it."""
    user, k = np.divmod(np.arange(_USERS * _EACH), _EACH)
    table = EventTable.build(
        "made up",
        users=Vocabulary(np.array([f"ann{number}" for number in range(_USERS)]), "user"),
        items=Vocabulary(np.arange(_ITEMS), "item"),
        client_rows=user,
        item_rows=(user * 7 + 11 * k + k * k) % _ITEMS,
        times=k,
    )
    split = make_split("leave_one_out", table, validation=True, draws=Draws(7))
    write_shards(folder / "shards", table, split, np.arange(_USERS, dtype=np.int64), lambda done: None)
    return {"path": str(folder / "shards")}
