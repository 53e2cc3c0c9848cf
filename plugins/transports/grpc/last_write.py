"""LastWrite: whether anybody has written to an SQLite database since, found out without asking SQLite."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

_HEADERS_BYTES = 96


@dataclass
class _Shared:
    """The memory that the processes of a database share, and how many in this process look at it."""

    file: int
    memory: mmap.mmap
    lookers: int = 0


_open: dict[tuple[int, int], _Shared] = {}
_lock = threading.Lock()


class LastWrite:
    """The header of a database's write-ahead log as it stands in memory that all its processes share: a counter in it
    goes up with every transaction of any of them (https://www.sqlite.org/walformat.html, section 2.1: iChange).

    To look is to read 96 bytes: no system call, and no lock. It is made while a connection is open that has read in WAL
    mode, and closed after that connection.
    """

    def __init__(self, database: Path) -> None:
        path = Path(f"{database}-shm")
        with _lock:
            found = path.stat()
            self._key = (found.st_dev, found.st_ino)
            if self._key not in _open:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                _open[self._key] = _Shared(file, mmap.mmap(file, mmap.PAGESIZE, access=mmap.ACCESS_READ))
            self._shared = _open[self._key]
            self._shared.lookers += 1

    def __call__(self) -> bytes:
        """Where it is equal to what it was, nothing was written in between. Both copies of the header are in it: while
        it is being written they differ, from each other and from before and after.
        """
        return self._shared.memory[:_HEADERS_BYTES]

    def close(self) -> None:
        """Let go of it. The file is closed with the last one in this process: whoever closes a file lets go of all
        locks that the process has on it (POSIX), those of another connection's SQLite too.
        """
        with _lock:
            self._shared.lookers -= 1
            if not self._shared.lookers:
                del _open[self._key]
                self._shared.memory.close()
                os.close(self._shared.file)
