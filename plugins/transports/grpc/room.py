"""Room: memory for uploads. Who does not fit waits; who is slow gives way to those who wait, and goes on later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fedtower.plugins.transports.grpc.refusals import Reason, Refused

_LOOK_SECONDS = 0.5  # how often one that waits looks for somebody slow


class Room:
    """Room for so many bytes, so that many large uploads do not come to lie beside one another.

    An upload takes its place before its bytes come. One that takes longer than ``slow_seconds`` to come is cut off when
    another waits: what came of it is kept (staging), so that it goes on there when it is its turn again. Otherwise a
    few who announce much and send little would keep everybody out.
    """

    def __init__(self, size: int, slow_seconds: float) -> None:
        self._size, self._slow_seconds, self._used = size, slow_seconds, 0
        self._freed = asyncio.Condition()
        self._coming: dict[bytes, _Coming] = {}

    @asynccontextmanager
    async def room(self, wanted: int) -> AsyncIterator[Room]:
        """A place for so many bytes; one that is larger than all of it has it alone."""
        async with self._freed:
            while self._used and self._used + wanted > self._size:
                self._hurry()
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._freed.wait()
                except TimeoutError:
                    continue
            self._used += wanted
        try:
            yield self
        finally:
            async with self._freed:
                self._used -= wanted
                self._freed.notify_all()

    @asynccontextmanager
    async def receiving(self, lease: bytes, whose: str) -> AsyncIterator[None]:
        """The bytes of an upload under a lease come meanwhile; another one under the same lease ends it.

        Raises:
            Refused: ``TRUNCATED``, with when to come back, when it was cut off.
        """
        before = self._coming.pop(lease, None)
        if before is not None:
            before.cut("another upload under the same lease has taken its place")
        coming = _Coming(asyncio.timeout(None), asyncio.get_running_loop().time())
        try:
            async with coming.patience:
                self._coming[lease] = coming
                try:
                    yield
                finally:
                    if self._coming.get(lease) is coming:
                        del self._coming[lease]
        except TimeoutError:
            if not coming.why:
                raise
            raise Refused(
                Reason.TRUNCATED,
                f"the upload of {whose} was cut off: {coming.why}; ask (Resume) what is here, and send the rest",
                retry_after_seconds=1.0,
            ) from None

    def _hurry(self) -> None:
        """Cut off who has been coming for too long."""
        now = asyncio.get_running_loop().time()
        for coming in self._coming.values():
            if now - coming.since > self._slow_seconds:
                coming.cut(f"it took more than {self._slow_seconds:g} s, and others wait")


@dataclass
class _Coming:
    """An upload whose bytes are on their way."""

    patience: asyncio.Timeout
    since: float
    why: str = ""

    def cut(self, why: str) -> None:
        """End it."""
        if not self.why:
            self.why = why
            self.patience.reschedule(asyncio.get_running_loop().time())
