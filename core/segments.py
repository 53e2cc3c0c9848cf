"""Segments: what clients keep, on disk in files that are written once and shared by the checkpoints that hold them.

The newest value of a client is in the last segment that has it. Before a segment is added, those at the end that are
not larger than it are merged into it (Bentley and Saxe, 1980, https://doi.org/10.1016/0196-6774(80)90015-2, the
logarithmic method; O'Neil et al., 1996, https://doi.org/10.1007/s002360050048): each merge at least doubles the segment
that a value is in, so of N clients' values each is written at most log2(N) times, and there are at most log2(N) files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.manifest import digest

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Values = Callable[[IntArray], FloatArray]

_CHUNK = 1 << 24  # bytes in memory at a time


@dataclass(frozen=True)
class Segment:
    """The values of some clients, sorted and distinct, in a file that is named by its SHA-256."""

    file: str
    bytes: int
    clients: IntArray

    @classmethod
    def write(cls, folder: Path, clients: IntArray, shape: tuple[int, ...], values: Values) -> Segment:
        """A new file in ``folder`` with ``values(clients)``, (C, *shape)."""
        records, unnamed = _record(shape), folder / "unnamed"
        header = {"descr": np.lib.format.dtype_to_descr(records), "fortran_order": False, "shape": clients.shape}
        with unnamed.open("wb") as stream:
            np.lib.format.write_array_header_2_0(stream, header)
            for some in _chunks(clients, records.itemsize):
                chunk = np.empty(len(some), dtype=records)
                chunk["client"], chunk["values"] = some, values(some)
                stream.write(chunk.tobytes())
        named = unnamed.rename(folder / f"{digest(unnamed)}.npy")
        return cls(named.name, named.stat().st_size, clients)

    @classmethod
    def open(cls, path: Path) -> Segment:
        """The segment in a file that has been checked."""
        clients: IntArray = np.array(np.load(path, mmap_mode="r", allow_pickle=False)["client"], dtype=np.int64)
        return cls(path.name, path.stat().st_size, clients)

    def share(self, folders: Sequence[Path], place: Path) -> bool:
        """Whether ``place`` has the segment now: as a link to the file in one of ``folders``, or as a copy where the
        disk has no links.
        """
        target = place / self.file
        for source in (folder / self.file for folder in folders):
            if source.is_file() and source.stat().st_size == self.bytes:
                try:
                    target.hardlink_to(source)
                except OSError:
                    shutil.copyfile(source, target)
                    if f"{digest(target)}.npy" != self.file:  # damaged since it was written
                        target.unlink()
                        continue
                return True
        return False


def values_of(path: Path) -> Iterator[tuple[IntArray, FloatArray]]:
    """The clients and values of a segment's file, some at a time."""
    records = np.load(path, mmap_mode="r", allow_pickle=False)
    for some in _chunks(records, records.itemsize):
        yield np.array(some["client"], dtype=np.int64), np.array(some["values"], dtype=np.float32)


def add(
    place: Path,
    held: Sequence[Segment],
    folders: Sequence[Path],
    fresh: IntArray,
    everything: Callable[[], IntArray],
    write: Callable[[IntArray], Segment],
) -> list[Segment]:
    """The segments that ``place`` has now: those ``held``, shared from ``folders``, and one with what is ``fresh`` and
    with those it is merged with. What is shared no longer is written again, with ``everything`` in one segment.
    """
    kept = list(held)
    while kept and len(kept[-1].clients) <= len(fresh):
        fresh = np.union1d(fresh, kept.pop().clients)
    if not all(segment.share(folders, place) for segment in kept):
        kept, fresh = [], everything()
    return [*kept, write(fresh)] if len(fresh) else kept


def _record(shape: tuple[int, ...]) -> np.dtype[Any]:
    return np.dtype([("client", "<i8"), ("values", "<f4", shape)])


def _chunks(array: NDArray[Any], itemsize: int) -> Iterator[NDArray[Any]]:
    step = max(1, _CHUNK // itemsize)
    return (array[start : start + step] for start in range(0, len(array), step))
