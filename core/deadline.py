"""Deadline: the seam that says how many seconds a round may take, and learns from when updates came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.updates import Updates

FloatArray = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]

ARRIVED = "arrived_seconds"
"""The metric under which a transport says when each client's update came, in seconds after the round's start; not a
number where that is not known. It goes no further than :class:`Listening`.
"""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When a round's updates came, in seconds after its start: ``seconds`` (A,), sorted, of ``asked`` clients.

    Whoever is not among them, and whose time is not ``unknown``, comes after ``ended``, the round's end, or never.
    ``target`` updates would have ended the round; ``deadline`` is what it was given, if it was given one.
    """

    round: int
    asked: int
    target: int
    seconds: FloatArray
    ended: float
    deadline: float | None = None
    unknown: int = 0

    def when(self, needed: int) -> float:
        """When the ``needed``-th update had come; infinity if so many did not come before the end."""
        return float(self.seconds[needed - 1]) if 1 <= needed <= len(self.seconds) else float("inf")


class Deadline(Protocol):
    """Says how long rounds may take. State goes in, and comes out: it is saved with the server's."""

    def init(self) -> State:
        """The state before the first round."""
        ...

    def limit(self, state: State) -> float:
        """How many seconds after the start of the next round updates are of use."""
        ...

    def learn(self, state: State, arrivals: Arrivals) -> tuple[State, str]:
        """The state after a round, and, if :meth:`limit` is another now, a sentence that says so and why; else
        nothing.
        """
        ...


@dataclass
class Listening:
    """Takes note of when a round's updates come."""

    cohort: Cohort
    _seconds: list[FloatArray] = field(default_factory=list)

    def noted(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """The blocks, without what their transport says of their arrival."""
        for block in blocks:
            metrics = dict(block.metrics)
            seconds = metrics.pop(ARRIVED, np.full(len(block), np.nan))
            self._seconds.append(seconds)
            yield replace(block, metrics=metrics)

    def heard(self, ended: float, deadline: float | None) -> Arrivals:
        """What was heard until the end."""
        seconds = np.concatenate([np.zeros(0), *self._seconds])
        known = np.sort(seconds[np.isfinite(seconds)])
        asked = len(self.cohort)
        target = self.cohort.target or asked
        return Arrivals(self.cohort.round, asked, target, known, ended, deadline, len(seconds) - len(known))
