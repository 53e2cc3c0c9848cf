"""Room: memory for uploads. Who does not fit waits in a line, and when that is long is told when to come back; who is
slow gives way to those who wait, and goes on later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fedtower.core.journal import Busy
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

_LOOK_SECONDS = 0.5  # how often the first one that waits looks for somebody slow
_LONGEST_SECONDS = 60.0  # that somebody is sent away for


class Room:
    """Room for so many bytes, so that many large uploads do not come to lie beside one another.

    An upload takes its place before its bytes come. One that takes longer than ``slow_seconds`` to come is cut off when
    another waits: what came of it is kept (staging), so that it goes on there when it is its turn again. Otherwise a
    few who announce much and send little would keep everybody out.

    A call that waits costs memory too: at most ``line`` of them do. Those who are sent away are given times one after
    another, at the pace at which uploads have gone lately, so that they do not come back all at once.
    """

    def __init__(self, size: int, slow_seconds: float, line: int = 512) -> None:
        self._size, self._slow_seconds, self._line, self._used = size, slow_seconds, line, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._coming: dict[bytes, _Coming] = {}
        self._pace, self._gone = 0.01, float("-inf")  # seconds from one to the next while some wait; when one went last
        self._turn = float("-inf")  # when the last of those comes who were sent away

    @asynccontextmanager
    async def room(self, wanted: int) -> AsyncIterator[Room]:
        """A place for so many bytes; one that is larger than all of it has it alone.

        Raises:
            Busy: too many wait.
        """
        if self._waiting or not self._fits(wanted):
            await self._wait(wanted)
        else:
            self._used += wanted
        try:
            yield self
        finally:
            self._used -= wanted
            self._measure()
            self._let_in()

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

    def _fits(self, wanted: int) -> bool:
        return self._used == 0 or self._used + wanted <= self._size

    async def _wait(self, wanted: int) -> None:
        """Wait for a turn; when this returns the place is taken."""
        if len(self._waiting) >= self._line:
            raise self._busy()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        try:
            while not turn.done():
                if self._waiting[0][1] is turn:
                    self._hurry()
                await asyncio.wait([turn], timeout=_LOOK_SECONDS)
        except asyncio.CancelledError:
            if turn.done():  # let in, and gone in the same moment
                self._used -= wanted
            else:
                self._waiting.remove((wanted, turn))
            self._let_in()
            raise

    def _let_in(self) -> None:
        """Give places to those who have waited longest, as far as there are any."""
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not self._fits(wanted):
                return
            self._waiting.popleft()
            self._used += wanted
            turn.set_result(None)

    def _measure(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._waiting:
            self._pace += 0.05 * (min(now - self._gone, 1.0) - self._pace)
        self._gone = now

    def _busy(self) -> Busy:
        now = asyncio.get_running_loop().time()
        first = now + self._pace * len(self._waiting)  # when those who wait will have gone
        self._turn = min(max(self._turn, first) + self._pace, now + _LONGEST_SECONDS)
        seconds = self._turn - now
        return Busy(f"{len(self._waiting)} uploads wait here already; come back in {seconds:.1f} s", seconds=seconds)

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
