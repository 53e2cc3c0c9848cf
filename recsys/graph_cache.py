"""GraphCache: exported graphs that were verified before, kept on disk for whoever needs the same, up to a size.

An entry is a folder. Who uses one holds a shared lock on it, and only what nobody holds is removed, the least recently
used first: a process never loses the graph under its engine, however many others there are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.errors import StorageError
from fedtower.recsys.bundle import Bundle, BundleError

MOST_BYTES = 64 << 20
"""An entry of a shipped model takes 30 to 120 kB, so this is some hundreds of models and settings."""

_ATTEMPTS = 20  # to put an entry where others of the same key come and go
_LEFT_OVER_SECONDS = 86_400.0  # what is still unfinished after so long was left by a process that was killed


@dataclass(frozen=True)
class GraphCache:
    """The entries under ``folder``, which together hold at most ``most_bytes``, but for those in use."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def find(self, key: str) -> Bundle | None:
        """The entry of that key, held until nobody refers to it any longer; a damaged one is removed."""
        place = self.folder / key
        lock = _hold(place)
        if lock is None:
            return None
        try:
            now = time.time_ns()  # the file system's own clock ticks every few milliseconds only
            os.utime(place, ns=(now, now))
            bundle = Bundle.open(place)
        except (OSError, BundleError):
            os.close(lock)
            self._remove(place)
            return None
        weakref.finalize(bundle, os.close, lock)
        return bundle

    def keep(self, made: Path, key: str) -> Bundle:
        """The entry of that key, which is ``made`` from now on, or another process's that was quicker."""
        lock = _hold(made)  # before anybody else can see it
        try:
            bundle = self._put(made, key)
        finally:
            if lock is not None:
                os.close(lock)
        self.prune()
        return bundle

    def _put(self, made: Path, key: str) -> Bundle:
        for _ in range(_ATTEMPTS):
            try:
                made.rename(self.folder / key)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and made.exists():
                    raise
            bundle = self.find(key)  # ours, or that of a process that was quicker, unless it has gone again meanwhile
            if bundle is not None:
                return bundle
        raise StorageError(f"{self.folder / key} does not stay where it is written; remove {self.folder}")

    def prune(self) -> None:
        """Remove the least recently used entries that nobody holds until the others fit, and what kills have left."""
        entries = []
        for place in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                if not place.name.startswith("."):
                    entries.append((place.stat().st_mtime_ns, _bytes_of(place), place))
                elif place.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, place in sorted(entries):
            if total <= self.most_bytes:
                return
            if self._remove_unused(place):
                total -= size

    def _remove_unused(self, place: Path) -> bool:
        """Whether the entry is gone now."""
        try:
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return not place.exists()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody holds it, or this file system has no locks, and nobody can tell
            return False
        else:
            return self._remove(place)
        finally:
            os.close(lock)

    def _remove(self, place: Path) -> bool:
        """Take an entry off the list in one step, and then file by file off the disk."""
        removed = self.folder / f".{place.name}-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            place.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        return not place.exists()


def _hold(place: Path) -> int | None:
    """A descriptor with a shared lock on a folder, or nothing if it is not there."""
    try:
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever removed from it
        fcntl.flock(lock, fcntl.LOCK_SH)  # who removes it is waited for
    try:
        if os.path.samestat(os.fstat(lock), place.stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _bytes_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir())
