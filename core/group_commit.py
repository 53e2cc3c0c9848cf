"""Group commit: what many callers ask for at about the same time becomes durable together.

To make something durable costs milliseconds, however little it is. While one batch is on its way to the disk the next
one gathers, so a busy journal commits as much at once as it has callers, and an idle one commits at once. A batch goes
through two stages with a thread each: while one is committed, the next one is prepared.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedtower.core.journal import Busy

Order = TypeVar("Order")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """How long a batch gathers at most, how much is committed at once, and how much may wait."""

    delay_seconds: float = 0.001
    orders: int = 512
    nbytes: int = 16 << 20
    waiting_nbytes: int = 64 << 20


@dataclass
class _Waiting(Generic[Order, Answer]):
    order: Order
    nbytes: int
    future: Future[Answer] = field(default_factory=Future)


class GroupCommit(Generic[Order, Prepared, Answer]):
    """Answers each order when ``commit`` has made it durable.

    ``prepare`` makes one of each order, and ``commit`` an answer for each of these, in their order. When one of them
    raises, that is the answer to the whole batch; of a ``commit`` that raised nothing may have stayed.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[Sequence[Order]], Sequence[Prepared]],
        commit: Callable[[Sequence[Prepared]], Sequence[Answer]],
        limits: Limits,
    ) -> None:
        self._prepare, self._commit, self._limits = prepare, commit, limits
        self._waiting: deque[_Waiting[Order, Answer]] = deque()
        self._nbytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._ready: queue.Queue[tuple[Sequence[Future[Answer]], Sequence[Prepared]] | None] = queue.Queue(maxsize=1)
        self._threads = [
            threading.Thread(target=work, name=f"{name} {work.__name__.strip('_')}", daemon=True)
            for work in (self._preparing, self._committing)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, order: Order, nbytes: int = 0) -> Future[Answer]:
        """The answer to come; ``nbytes`` is what the order holds in memory.

        Raises:
            Busy: so much is waiting that memory would grow without a bound.
        """
        waiting: _Waiting[Order, Answer] = _Waiting(order, nbytes)
        with self._changed:
            if self._closed:
                raise RuntimeError("the journal is closed")
            if self._nbytes and self._nbytes + nbytes > self._limits.waiting_nbytes:
                raise Busy(
                    f"{self._nbytes} bytes wait for the journal already, and {nbytes} more would be over its limit of "
                    f"{self._limits.waiting_nbytes}; come back in a second",
                    seconds=1.0,
                )
            self._waiting.append(waiting)
            self._nbytes += nbytes
            if len(self._waiting) == 1 or self._is_full():  # nobody is woken to find that there is more to wait for
                self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Commit what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    def _preparing(self) -> None:
        while batch := self._gather():
            alive = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            futures = [waiting.future for waiting in alive]
            try:
                prepared = self._prepare([waiting.order for waiting in alive])
            except Exception as error:  # whoever waits must hear of it, whatever it is
                _fail(futures, error)
            else:
                self._ready.put((futures, prepared))
            with self._changed:
                self._nbytes -= sum(waiting.nbytes for waiting in batch)
            del batch, alive  # the next batch is long in coming, and these hold payloads
        self._ready.put(None)

    def _committing(self) -> None:
        while (ready := self._ready.get()) is not None:
            futures, prepared = ready
            try:
                for future, answer in zip(futures, self._commit(prepared), strict=True):
                    future.set_result(answer)
            except Exception as error:
                _fail(futures, error)
            del ready, futures, prepared

    def _gather(self) -> list[_Waiting[Order, Answer]]:
        """The next batch, or nothing when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + self._limits.delay_seconds
            # A little patience: those who were answered by the batch before come again at once.
            while not (self._is_full() or self._closed) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._take()

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._limits.orders or self._nbytes >= self._limits.nbytes

    def _take(self) -> list[_Waiting[Order, Answer]]:
        batch: list[_Waiting[Order, Answer]] = []
        nbytes = 0
        while self._waiting and len(batch) < self._limits.orders:
            nbytes += self._waiting[0].nbytes
            if batch and nbytes > self._limits.nbytes:
                break
            batch.append(self._waiting.popleft())
        return batch


def _fail(futures: Sequence[Future[Answer]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
