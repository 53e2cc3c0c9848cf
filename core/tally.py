"""Tally: what a round counts: who answered, who was refused and why, the bytes, and the mean of each metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checking import WORDS, Reason
from fedtower.core.cohort import Cohort
from fedtower.core.transport import DeviceTime
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]
WeightArray = NDArray[np.float64]

# What the server notes about an update, beside what its client says; they are sums, and not means.
BYTES = ("bytes_up", "bytes_down")


@dataclass(frozen=True)
class RoundReport:
    """What a round did: who took part, what it cost, and how it went.

    ``loss`` and ``metrics`` are means over the examples of the updates that counted; ``bytes_up`` and ``bytes_down``
    are theirs too: what was sent to clients that dropped out is not known here. ``examples`` is how many they trained
    on, each as often as it was taken, as their weights say. ``dropped`` are all clients of the cohort that did not
    count; ``refused`` says of how many updates that was decided, by reason (see
    :class:`fedtower.core.checking.Reason`). ``device_seconds`` is what the round took of its devices, where its
    transport knows that, and ``wasted_seconds`` the part of visits that did not count; ``late`` of those were finished.
    ``staleness`` has the ``mean`` and the ``max`` of how many versions behind the updates were, where rounds are
    asynchronous; those who are still at work then are not ``dropped``.
    """

    round: int
    total_rounds: int
    loss: float
    clients: int
    dropped: int
    bytes_up: int
    bytes_down: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    device_seconds: float = 0.0
    wasted_seconds: float = 0.0
    late: int = 0
    staleness: Mapping[str, float] = field(default_factory=dict)
    examples: float = 0.0


class Tally:
    """Counts what passes.

    The means are the same to the last bit for any order and any width of blocks.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._counted = np.zeros(len(cohort), dtype=bool)
        self._told = np.zeros(len(cohort), dtype=bool)  # that they do not count
        self._refused: dict[Reason, int] = {}
        self._bytes = dict.fromkeys(BYTES, 0.0)
        self._weights: list[WeightArray] = []
        self._metrics: dict[str, list[tuple[WeightArray, WeightArray]]] = {}  # by name, values and their weights

    def count(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """The same blocks, counted."""
        for block in blocks:
            if block.clients is not None:
                self._counted[self._of_cohort(block.clients)] = True
            for name in BYTES:
                self._bytes[name] += float(block.metrics.get(name, np.zeros(1)).sum())
            self._weights.append(block.weights)
            weighty = block.weights > 0  # a client without examples has no loss, whatever it says
            for name, values in block.metrics.items():
                if name not in BYTES:
                    self._metrics.setdefault(name, []).append((values[weighty], block.weights[weighty]))
            yield block

    def refuse(self, clients: IntArray, reason: Reason) -> None:
        """Take note of updates that were refused, and whose they were, where that is known."""
        self._refused[reason] = self._refused.get(reason, 0) + max(len(clients), 1)
        self._told[self._of_cohort(clients)] = True

    def has(self, clients: IntArray) -> NDArray[np.bool_]:
        """For each of ``clients`` (C,) whether an update of it counts already."""
        places = self._cohort.places(clients)
        counted: NDArray[np.bool_] = np.append(self._counted, False)[places]  # the last is for strangers
        return counted

    @property
    def heard(self) -> int:
        """How many clients count."""
        return int(np.count_nonzero(self._counted))

    def survivors(self) -> Cohort:
        """The clients whose update counts."""
        return Cohort(self._cohort.round, self._cohort.clients[self._counted], self._cohort.population)

    def missing(self) -> IntArray:
        """The clients of the cohort from whom nothing came in time."""
        return self._cohort.clients[~self._counted & ~self._told]

    @property
    def why_missing(self) -> str:
        """Why nothing came of them in time, for people."""
        target = self._cohort.target
        if target is not None and self.heard >= target:
            return "the round had the updates that it needed before theirs came"
        return "sent no update in time"

    def mistake(self) -> str | None:
        """What went wrong, if updates came and every one of them was refused."""
        if np.any(self._counted) or not self._refused:
            return None
        reasons = [f"{count} of them: {WORDS[reason]}" for reason, count in self._refused.items()]
        return f"every update of round {self._cohort.round} was refused, and nothing moved; {'; '.join(reasons)}"

    def report(self, round: int, rounds: int, seconds: float, spent: DeviceTime | None = None) -> RoundReport:
        """The round in figures; the loss is the mean over examples, or NaN when there were none."""
        spent = spent or DeviceTime()
        means = {name: _mean(parts) for name, parts in self._metrics.items()}
        heard = self.heard
        return RoundReport(
            round=round,
            total_rounds=rounds,
            loss=means.pop("loss", float("nan")),
            clients=heard,
            dropped=len(self._cohort) - heard,
            bytes_up=int(self._bytes["bytes_up"]),
            bytes_down=int(self._bytes["bytes_down"]),
            seconds=seconds,
            metrics=means,
            refused={reason.value: count for reason, count in sorted(self._refused.items())},
            device_seconds=spent.seconds,
            wasted_seconds=spent.wasted,
            late=spent.late,
            examples=math.fsum(weight for weights in self._weights for weight in weights),
        )

    def _of_cohort(self, clients: IntArray) -> IntArray:
        places = self._cohort.places(clients)
        return places[places >= 0]


def _mean(parts: list[tuple[WeightArray, WeightArray]]) -> float:
    """The mean of values by weight, from sums that are rounded once; NaN without weight."""
    values, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    terms = values * weights
    if not len(terms) or not np.all(np.isfinite(terms)):
        return float("nan")
    return math.fsum(terms) / math.fsum(weights)
