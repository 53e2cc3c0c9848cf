"""The clients of a folder of shards: the simulation of a deployed federation has the same data as its devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedtower.core.draws import Draws
from fedtower.recsys.shards import ShardedExamples, ShardedHistories, opened, read_folder


@dataclass(frozen=True)
class Shards:
    """A folder that ``fedtower data shard`` wrote; ``data.split = "given"`` keeps the roles that the files hold."""

    path: Path = field(metadata={"help": "the folder of shards"})

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> ShardedHistories | ShardedExamples:
        """The data of all clients of the folder."""
        progress(f"reading the shards of {self.path}")
        return opened(*read_folder(self.path))
