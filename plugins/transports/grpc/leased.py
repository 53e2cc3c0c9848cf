"""LeasedRows: what is known of a lease besides the journal: which rows were given out under it, of how many examples.

An update is held to both. They lie in files that are not flushed: an intake that is killed forgets nothing, and when a
machine loses its power the leases end with it.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.journal import RoundRecord, Task
from fedtower.core.rows import IntArray

_EXAMPLES = ""  # no table has this name


def folder_of(round: int, task: Task) -> str:
    """What the folder of a window's leases is called."""
    return f"{round:06d}-{task}"


def remove_ended(folder: Path, records: Sequence[RoundRecord]) -> None:
    """Remove the folders of windows in which nobody has a lease any more: those that have ended, and those that the
    journal has forgotten. What it did not have yet may have been opened since, and another intake writes there.
    """
    ended = {folder_of(record.round, record.task) for record in records if record.state != "open"}
    oldest = min((record.round for record in records), default=0)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in ended or int(path.name.partition("-")[0]) < oldest:
            shutil.rmtree(path, ignore_errors=True)


Given = tuple[Mapping[str, IntArray], int | None]

_MOST_KNOWN = 1 << 20  # numbers in memory, 8 MB
_ENTRY = 64  # what an array, and what it lies in, takes besides


@dataclass(frozen=True)
class LeasedRows:
    """One file a lease, appended to, in a folder a window; what this process gave out lately, it knows without."""

    folder: Path
    _lately: _Lately = field(default_factory=lambda: _Lately(), repr=False)

    def note(self, window: tuple[int, Task], lease: bytes, source: str, ids: IntArray) -> None:
        """Rows of a source are given out."""
        self._append(window, lease, source, ids)

    def note_examples(self, window: tuple[int, Task], lease: bytes, count: int) -> None:
        """The device says how many examples it has."""
        self._append(window, lease, _EXAMPLES, np.array([count], dtype=np.int64))

    def known(self, window: tuple[int, Task], lease: bytes) -> Given:
        """As :meth:`of`, but of what this process has given out lately, if it was asked from the beginning: another
        process may have given out more.
        """
        given = _given(self._lately.of(window, lease))
        return self.of(window, lease) if given[1] is None else given

    def of(self, window: tuple[int, Task], lease: bytes) -> Given:
        """The distinct ids that were given out, sorted, by source; and how many examples the device said it has."""
        found: list[tuple[str, IntArray]] = []
        try:
            lines = (self.folder / folder_of(*window) / lease.hex()).read_bytes().splitlines()
        except FileNotFoundError:
            return {}, None
        for line in lines:
            try:
                source, ids = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            found.append((source, np.array(ids, dtype=np.int64)))
        return _given(found)

    def _append(self, window: tuple[int, Task], lease: bytes, source: str, values: IntArray) -> None:
        line = json.dumps([source, values.tolist()]).encode() + b"\n"
        place = self.folder / folder_of(*window)
        with storage_errors(self.folder):
            try:
                file = (place / lease.hex()).open("ab")
            except FileNotFoundError:
                place.mkdir(parents=True, exist_ok=True)
                file = (place / lease.hex()).open("ab")
            with file:
                file.write(line)
        self._lately.add(window, lease, source, values)

    def forget(self, window: tuple[int, Task]) -> None:
        """A window has ended: nobody will ask what was given out in it."""
        self._lately.forget(window)


class _Lately:
    """What was given out under the leases that were heard of last: some numbers a lease, and so many in all."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[tuple[int, Task], bytes], list[tuple[str, IntArray]]] = OrderedDict()
        self._count = 0

    def add(self, window: tuple[int, Task], lease: bytes, source: str, values: IntArray) -> None:
        self._held.setdefault((window, lease), []).append((source, values))
        self._held.move_to_end((window, lease))
        self._count += _ENTRY + len(values)
        while self._count > _MOST_KNOWN:
            self._drop(next(iter(self._held)))

    def of(self, window: tuple[int, Task], lease: bytes) -> Iterable[tuple[str, IntArray]]:
        return self._held.get((window, lease), ())

    def forget(self, window: tuple[int, Task]) -> None:
        for key in [key for key in self._held if key[0] == window]:
            self._drop(key)

    def _drop(self, key: tuple[tuple[int, Task], bytes]) -> None:
        self._count -= sum(_ENTRY + len(each) for _, each in self._held.pop(key))


def _distinct(several: list[IntArray]) -> IntArray:
    ids = several[0] if len(several) == 1 else np.concatenate(several)
    return ids if np.all(ids[1:] > ids[:-1]) else np.unique(ids)  # mostly they are sorted and distinct: devices ask so


def _given(found: Iterable[tuple[str, IntArray]]) -> Given:
    by_source: dict[str, list[IntArray]] = defaultdict(list)
    for source, ids in found:
        by_source[source].append(ids)
    said = by_source.pop(_EXAMPLES, None)
    given = {source: _distinct(several) for source, several in by_source.items()}
    return given, None if said is None else int(np.concatenate(said).max())
