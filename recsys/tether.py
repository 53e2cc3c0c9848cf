"""Tether: a process that serves ends with the one that started it, however that ends, so that nobody is left behind.

The one that starts holds the writing end of a pipe and never writes; the others wait at the reading end for its end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

TETHER = "FEDTOWER_TETHER"
"""The variable of the environment that names the reading end."""


@contextmanager
def hold() -> Iterator[int]:
    """The reading end, for children; they end in order when this process does, or leaves the block."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def end_with_starter() -> None:
    """Send this process SIGTERM when the one that started it has ended; nothing if it was started without a tether."""
    held = os.environ.pop(TETHER, "")
    if held:
        Thread(target=_wait, args=(int(held),), name="tether", daemon=True).start()


def _wait(reading: int) -> None:
    os.read(reading, 1)  # nothing ever comes but the end
    os.kill(os.getpid(), signal.SIGTERM)
