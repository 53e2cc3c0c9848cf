"""JournalReads: what an intake reads of its journal, in a thread of its own: one that is away holds up no loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fedtower.core.journal import Busy

Answer = TypeVar("Answer")
COME_BACK_SECONDS = 2.0


class JournalReads:
    """Asks one question after the other. While one has had no answer for ``patience_seconds``, all others are told so
    at once: they would stand behind it.

    A read takes a millisecond, and a journal elsewhere tries for many seconds to reach its server before it says that
    it is away.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._thread = ThreadPoolExecutor(1, "journal reads")
        self._lock = threading.Lock()
        self._open: dict[Future[Any], float] = {}  # since when, the oldest first

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer.

        Raises:
            Busy: there is none yet.
        """
        waited = self._waited()
        if waited > self._patience:
            raise _busy(waited)
        asked = self._thread.submit(question)
        with self._lock:
            self._open[asked] = time.monotonic()
        asked.add_done_callback(self._answered)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(asked), self._patience)
        except TimeoutError as error:
            raise _busy(self._patience) from error

    def _waited(self) -> float:
        """For how long the oldest question has had no answer, in seconds."""
        now = time.monotonic()
        with self._lock:
            return now - next(iter(self._open.values()), now)

    def _answered(self, question: Future[Any]) -> None:
        with self._lock:
            self._open.pop(question, None)


def _busy(seconds: float) -> Busy:
    return Busy(
        f"the journal has not answered for {seconds:.1f} s; nothing acknowledged is lost: come back in "
        f"{COME_BACK_SECONDS:g} seconds, and see whether its database runs",
        seconds=COME_BACK_SECONDS,
    )
