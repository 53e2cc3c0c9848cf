"""From arrival to what counts: updates in time, decoded, checked, and refused one client at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checking import WORDS, CheckSettings, Reason, check
from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.deadline import ARRIVED
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import Plan
from fedtower.core.tally import Tally
from fedtower.core.transform import Transform, decode
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]


def in_time(
    blocks: Iterable[Updates], started: float, deadline: float | None, clock: Callable[[], float]
) -> Iterator[Updates]:
    """The blocks that arrive within ``deadline`` seconds of the start; without one, all of them."""
    for block in blocks:
        if deadline is not None and clock() - started >= deadline:
            return
        yield block


def stamped(blocks: Iterable[Updates], started: float, clock: Callable[[], float]) -> Iterator[Updates]:
    """The blocks with when they came, where their transport does not say when each of their updates did."""
    for block in blocks:
        came = np.full(len(block), clock() - started)
        yield replace(block, metrics={ARRIVED: came, **block.metrics})


def until_enough(blocks: Iterable[Updates], target: int | None, tally: Tally) -> Iterator[Updates]:
    """The blocks until so many clients count as ``target``: who is later is not asked."""
    for block in blocks:
        yield block
        if target is not None and tally.heard >= target:
            return


@dataclass(frozen=True)
class Reception:
    """Takes a round's updates in. One client's mistake costs that client's update, and never the round. What comes
    beyond ``target`` updates is surplus.

    ``cohort`` and ``stalest`` are as :func:`fedtower.core.checking.check` wants them.
    """

    plan: Plan
    cohort: Cohort | None
    transforms: Sequence[Transform]
    checks: CheckSettings
    client: ClientSide
    hooks: Hooks
    tally: Tally
    target: int | None = None
    stalest: int | None = None

    def accepted(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """What counts of the blocks, decoded, each with its bytes on the way as the metric ``bytes_up``. What a client
        keeps is written once its update counts.
        """
        for block in blocks:
            sized = replace(block, metrics={**block.metrics, "bytes_up": block.sizes.astype(np.float64)})
            for decoded in self._decoded(sized):
                counted = self._judged(decoded)
                if decoded.clients is not None:
                    self.client.settle(decoded.clients, counted)
                if np.any(counted):
                    update = decoded if np.all(counted) else decoded.pick(np.flatnonzero(counted))
                    self.hooks.observe("update_received", round=self.plan.round, updates=update)
                    yield update

    def _decoded(self, block: Updates) -> Iterator[Updates]:
        """The block decoded; if that cannot be done, its clients one by one, without those it cannot be done for."""
        try:
            yield decode(self.transforms, block, self.plan)
        except UpdateError as error:
            if len(block) == 1:
                self._refuse(block, 0, Reason.UNDECODABLE, str(error))
            else:
                for client in range(len(block)):
                    yield from self._decoded(block.slice(client, client + 1))

    def _judged(self, block: Updates) -> NDArray[np.bool_]:
        """Whether each client's update counts, (C,); the others are refused."""
        leased = None if block.clients is None else self.client.leased(block.clients)
        verdict = check(block, self.plan, self.cohort, self.checks, leased, self.stalest)
        counted = np.array([reason is None for reason in verdict], dtype=bool)
        for client in np.flatnonzero(~counted).tolist():
            reason = verdict[client] or Reason.PLUGIN
            self._refuse(block, client, reason, WORDS[reason])
        for client in self._again(block, counted).tolist():
            counted[client] = False
            self._refuse(block, client, Reason.REPEATED, WORDS[Reason.REPEATED])
        if self.hooks.implements("accept_update"):
            for client in np.flatnonzero(counted).tolist():
                words = self.hooks.decide("accept_update", update=block.slice(client, client + 1), plan=self.plan)
                counted[client] = words is None
                if words is not None:
                    self._refuse(block, client, Reason.PLUGIN, words)
        if self.target is not None:
            for client in np.flatnonzero(counted)[max(self.target - self.tally.heard, 0) :].tolist():
                counted[client] = False
                self._refuse(block, client, Reason.SURPLUS, WORDS[Reason.SURPLUS])
        return counted

    def _again(self, block: Updates, counted: NDArray[np.bool_]) -> IntArray:
        """The positions of clients of whom an update counts already, or stands earlier in the block."""
        if block.clients is None:
            return np.zeros(0, dtype=np.int64)
        left = np.flatnonzero(counted)
        again = self.tally.has(block.clients[left])
        first = np.unique(block.clients[left], return_index=True)[1]
        again |= ~np.isin(np.arange(len(left)), first)
        return left[again]

    def _refuse(self, block: Updates, position: int, reason: Reason, words: str) -> None:
        """Say and count that a client's update does not count."""
        clients = np.zeros(0, dtype=np.int64) if block.clients is None else block.clients[position : position + 1]
        self.tally.refuse(clients, reason)
        round = self.plan.round
        for client in clients.tolist():
            self.hooks.observe("update_refused", round=round, client=client, reason=reason.value, words=words)
        if reason is not Reason.REPEATED:  # the client's first update counts
            self.hooks.observe("client_dropped", round=round, clients=clients, reason=f"refused: {words}")
