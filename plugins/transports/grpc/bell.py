"""Bell: the processes of one machine tell one another that the journal has changed, so that nobody need keep looking.

A ring is a hint: the news is in the journal. One that is lost, or rung on another machine, costs the listener the time
until it looks by itself.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.checkpoint import storage_errors

TABLE = "table"
INTAKES = "intake-*"
_GATHER_SECONDS = 0.001  # what comes together is looked at together


@dataclass(frozen=True)
class Bell:
    """A datagram socket in a folder, which whoever can write there may ring."""

    path: Path
    _socket: socket.socket

    @classmethod
    def hang(cls, folder: Path, name: str) -> Bell:
        """A bell called ``name``; another one of that name is heard no more."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.setblocking(False)
        with _short(folder) as place:
            made.bind(f"{place}/{name}")
        return cls(folder / name, made)

    def fileno(self) -> int:
        """The socket, for an event loop."""
        return self._socket.fileno()

    def wait(self, seconds: float) -> bool:
        """Whether it rang within ``seconds``."""
        if not select.select([self._socket], [], [], max(seconds, 0.0))[0]:
            return False
        time.sleep(_GATHER_SECONDS)
        self.hush()
        return True

    def hush(self) -> None:
        """Forget the rings that have come."""
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    def close(self) -> None:
        """Take it down."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


def ring(folder: Path, whom: str) -> None:
    """Ring the bells in ``folder`` whose names match; those of processes that have ended are taken down."""
    bells = list(folder.glob(whom)) if folder.is_dir() else []
    if not bells:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ringing, _short(folder) as place:
        ringing.setblocking(False)
        for path in bells:
            try:
                ringing.sendto(b"", f"{place}/{path.name}")
            except ConnectionRefusedError:  # nobody has it any more
                path.unlink(missing_ok=True)
            except OSError:  # it rings already, or is being hung
                continue


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A name of a folder that is short enough for a socket's address, which has 108 bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
