"""Waiting: check-ins that are held until there is something to do for their clients, so that nobody calls in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedtower.core.rows import IntArray


@dataclass
class Waiting:
    """One held call a client, ``most`` in all; whoever calls again lets go of the call before.

    All of it happens in one event loop.
    """

    most: int
    _held: dict[int, asyncio.Future[bool]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether nobody else can wait."""
        return len(self._held) >= self.most

    def clients(self) -> Iterable[int]:
        """Who waits."""
        return self._held.keys()

    async def called(self, client: int, seconds: float) -> bool:
        """Whether the client is called within ``seconds``; ``False`` at once when too many wait."""
        before = self._held.pop(client, None)
        if before is not None:
            _let_go(before, False)
        if seconds <= 0 or self.is_full:
            return False
        held: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._held[client] = held
        timer = held.get_loop().call_later(seconds, _let_go, held, False)
        try:
            return await held
        finally:  # also when the device has hung up
            timer.cancel()
            if self._held.get(client) is held:
                del self._held[client]

    def call(self, clients: IntArray) -> None:
        """Call those of ``clients`` who wait."""
        for client in self._held.keys() & set(clients.tolist()):
            _let_go(self._held[client], True)

    def call_all(self) -> None:
        """Call everybody."""
        for held in self._held.values():
            _let_go(held, True)


def _let_go(held: asyncio.Future[bool], called: bool) -> None:
    if not held.done():
        held.set_result(called)
