"""Answers: what other threads finish, waited for in an event loop, which is woken once for many of them."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Answers:
    """Like ``asyncio.wrap_future``, which wakes the loop for each future. A journal answers a batch at a time, and each
    wake-up is a system call, after which the loop may have to wait until another thread lets go of the interpreter.
    """

    def __init__(self) -> None:
        self._come: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._told = False

    def of(self, promised: Future[Result]) -> asyncio.Future[Result]:
        """The same, for this loop; who no longer waits for it calls it off, if it has not begun."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Result] = loop.create_future()

        def come(done: Future[Result]) -> None:
            self._come.append((waiting, done))
            if not self._told:  # it is set before what has come is looked at: nothing stays behind
                self._told = True
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._tell)

        waiting.add_done_callback(lambda gone: promised.cancel() if gone.cancelled() else None)
        promised.add_done_callback(come)
        return waiting

    def _tell(self) -> None:
        self._told = False
        while self._come:
            waiting, done = self._come.popleft()
            if waiting.done():
                continue
            if done.cancelled():
                waiting.cancel()
            elif (error := done.exception()) is not None:
                waiting.set_exception(error)
            else:
                waiting.set_result(done.result())
