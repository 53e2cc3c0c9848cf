"""What torchrun tells each process through its environment, read without torch."""

from __future__ import annotations

import os

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_and_count() -> tuple[int, int]:
    """This process's rank, and how many were started together; 0 of 1 for one that was started by itself."""
    if not all(name in os.environ for name in _TOLD):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
