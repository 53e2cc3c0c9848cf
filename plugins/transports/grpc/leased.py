"""LeasedRows: which rows were given out under a lease, so that an update can be held to them."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.rows import IntArray


@dataclass(frozen=True)
class LeasedRows:
    """One file a lease, appended to: an intake that is killed forgets nothing, a machine that is may.

    It needs no flush to the disk: what a lost power supply takes with it are leases too.
    """

    folder: Path

    def note(self, lease: bytes, source: str, ids: IntArray) -> None:
        """Rows of a source are given out."""
        line = json.dumps([source, ids.tolist()]).encode() + b"\n"
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / lease.hex()).open("ab") as file:
                file.write(line)

    def of(self, lease: bytes) -> Mapping[str, IntArray]:
        """The distinct ids that were given out, sorted, by source."""
        found: dict[str, list[int]] = defaultdict(list)
        try:
            lines = (self.folder / lease.hex()).read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        for line in lines:
            try:
                source, ids = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            found[source].extend(ids)
        return {source: np.unique(np.array(ids, dtype=np.int64)) for source, ids in found.items()}

    def forget(self, lease: bytes) -> None:
        """Nobody will ask for this lease again."""
        (self.folder / lease.hex()).unlink(missing_ok=True)

    def clear(self) -> None:
        """Nobody will ask for any."""
        shutil.rmtree(self.folder, ignore_errors=True)
