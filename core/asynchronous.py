"""Asynchronous rounds: nobody is waited for. A version is a round; every so many updates make a step to the next.

FedBuff: Nguyen et al., 2022, https://arxiv.org/abs/2106.06639. Clients work from the version that was the newest when
they began. What comes is discounted by how many versions it is behind, and refused when it is too far behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checking import Reason
from fedtower.core.cohort import Cohort
from fedtower.core.errors import RecipeError
from fedtower.core.receiving import Reception
from fedtower.core.round import Parts, aggregator_of, announce, choose, fold, make_plan, moved, run_rounds
from fedtower.core.server import ServerState
from fedtower.core.staleness import AsynchronousSettings, discounted
from fedtower.core.tally import RoundReport, Tally
from fedtower.core.transport import Abandoned, Asked, Buffers, DeviceTime, OwnTime
from fedtower.core.updates import Updates
from fedtower.core.versions import Versions

IntArray = NDArray[np.int64]


def run_async(state: ServerState, parts: Parts) -> Iterator[tuple[ServerState, RoundReport]]:
    """Version after version, each with the state it leaves; it ends as :func:`fedtower.core.round.run_rounds` does."""
    return run_rounds(state, parts, run_version)


def run_version(state: ServerState, parts: Parts) -> tuple[ServerState, RoundReport]:
    """Publish a version, fold what comes until enough of it counts, and move one step.

    Raises:
        RecipeError: the transport is for rounds that wait.
    """
    settings, transport = parts.asynchronous, parts.transport
    if settings is None or not isinstance(transport, Buffers):
        raise RecipeError("asynchronous rounds need [asynchronous] in the recipe, and a transport that has them")
    if isinstance(transport, OwnTime):
        transport.begin(state.transport)
    started = parts.clock()
    cohort = choose(state.round + 1, parts)
    plan = make_plan(state, parts)
    parts.hooks.observe("round_started", round=plan.round, cohort=cohort)

    tally = Buffer(plan.round, parts.population)
    versions = Versions(plan, parts.client, state.transport)
    asked = Asked(
        settings=settings,
        needed=lambda: settings.buffer - len(tally),
        visit=versions.visit,
        draws=parts.draws,
        deadline=parts.hooks.decide("round_deadline", round=plan.round),
        flight=state.transport,
    )
    version = transport.version(plan, cohort, asked)
    reception = Reception(
        plan, None, parts.transforms, parts.checks, parts.client, parts.hooks, tally, stalest=settings.max_staleness
    )
    blocks = _discounted(tally.count(reception.accepted(version.arrivals())), plan.round, settings)

    aggregator = aggregator_of(plan, parts)
    try:
        total, memory = parts.hooks.wrap("aggregate", lambda: fold(aggregator, blocks, state), round=plan.round)
    except Abandoned as reason:
        parts.hooks.observe("warned", message=f"version {plan.round} was abandoned: {reason}")
        total, memory, tally = None, state.aggregator, Buffer(plan.round, parts.population)
    # Before the step: who is on the way has rows as they are now.
    state = replace(state, transport=versions.left(version.flight(), settings.max_staleness))
    state = moved(state, total, memory, tally.survivors(), parts)

    spent = version.spent(tally.survivors())
    report = tally.report(plan.round, parts.rounds, parts.clock() - started, spent)
    announce(report, tally, parts.hooks)
    return state, report


def _discounted(blocks: Iterable[Updates], newest: int, settings: AsynchronousSettings) -> Iterator[Updates]:
    """The blocks, each client's deltas discounted by how far behind it is."""
    for block in blocks:
        assert block.rounds is not None  # checked when it was received
        yield discounted(block, settings.factors(newest - block.rounds))


class Buffer(Tally):
    """Counts what makes a step. Its cohort is whoever comes: nobody is missed who is still at work.

    ``len`` is how many updates count.
    """

    def __init__(self, round: int, population: int) -> None:
        super().__init__(Cohort(round, np.zeros(0, dtype=np.int64), population))
        self._behind: list[IntArray] = []

    def __len__(self) -> int:
        return int(self._counted.sum())

    def count(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """The same blocks, counted, and how far behind they are."""
        for block in blocks:
            assert block.clients is not None
            assert block.rounds is not None  # both were checked when it was received
            self._admit(block.clients)
            self._behind.append(self._cohort.round - block.rounds)
            yield from super().count([block])

    def refuse(self, clients: IntArray, reason: Reason) -> None:
        """Take note of updates that were refused."""
        self._admit(clients)
        super().refuse(clients, reason)

    def report(self, round: int, rounds: int, seconds: float, spent: DeviceTime | None = None) -> RoundReport:
        """The version in figures, with how stale its updates were."""
        return replace(super().report(round, rounds, seconds, spent), staleness=self._staleness())

    def _staleness(self) -> Mapping[str, float]:
        if not self._behind:
            return {}
        behind = np.concatenate(self._behind)
        return {"mean": float(behind.mean()), "max": float(behind.max())}

    def _admit(self, clients: IntArray) -> None:
        """Make these clients part of the cohort."""
        held = self._cohort
        everyone = np.union1d(held.clients, clients)
        places = np.searchsorted(everyone, held.clients)
        population = max(held.population, int(everyone.max(initial=-1)) + 1)
        self._cohort = Cohort(held.round, everyone, population)
        self._counted, self._told = (_spread(marks, places, len(everyone)) for marks in (self._counted, self._told))


def _spread(marks: NDArray[np.bool_], places: IntArray, size: int) -> NDArray[np.bool_]:
    wider = np.zeros(size, dtype=bool)
    wider[places] = marks
    return wider
