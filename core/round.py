"""The server's half: one round, and rounds until there is a reason to stop. Read it top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import Aggregator
from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.rows import RowStore
from fedtower.core.server import Schedule, ServerOptimizer, ServerState, step
from fedtower.core.transform import Transform, decode, finish
from fedtower.core.transport import Transport
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RoundReport:
    """What a round did: who took part, what it cost, and how it went."""

    round: int
    total_rounds: int
    loss: float
    clients: int
    dropped: int
    bytes_up: int
    bytes_down: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a round is made of."""

    population: int
    rounds: int
    sampler: Sampler
    transport: Transport
    client: ClientSide
    transforms: Sequence[Transform]
    aggregator: Aggregator
    optimizer: ServerOptimizer
    store: RowStore | None
    local: LocalSettings
    rows: RowSettings
    lr: float
    schedule: Schedule
    hooks: Hooks
    draws: Draws
    clock: Callable[[], float]


def run_rounds(state: ServerState, parts: Parts) -> Iterator[tuple[ServerState, RoundReport]]:
    """Round after round, each with the state it leaves, until all are done or a plugin's ``stop_run`` gives a
    reason.
    """
    while state.round < parts.rounds:
        state, report = run_round(state, parts)
        yield state, report
        if parts.hooks.decide("stop_run", report=report):
            return


def run_round(state: ServerState, parts: Parts) -> tuple[ServerState, RoundReport]:
    """Send the plan out, fold what comes back, and move one step.

    A round in which nobody answers changes nothing but the round's number.
    """
    started = parts.clock()
    cohort = choose(state.round + 1, parts)
    plan = make_plan(state, parts)
    parts.hooks.observe("round_started", round=plan.round, cohort=cohort)

    tally = Tally(cohort)
    blocks = parts.transport.exchange(plan, cohort, parts.client.visit, parts.draws)
    blocks = tally.count(accepted(in_time(blocks, started, plan, parts), plan, parts))
    blocks = decode(parts.transforms, blocks)

    total, memory = parts.hooks.wrap("aggregate", lambda: fold(parts.aggregator, blocks, state), round=plan.round)
    if total is None:
        state = replace(state, round=plan.round)
    else:
        total = finish(parts.transforms, total, cohort)
        state = replace(state, aggregator=memory)
        lr_scale = parts.schedule(plan.round)
        state = step(state, total, parts.optimizer, parts.store, lr=parts.lr, lr_scale=lr_scale, rows=parts.rows)

    missing = tally.missing()
    if len(missing):
        parts.hooks.observe("client_dropped", round=plan.round, clients=missing, reason="sent no update that counted")
    report = tally.report(plan.round, parts.rounds, parts.clock() - started)
    parts.hooks.observe("round_finished", report=report)
    return state, report


def choose(round: int, parts: Parts) -> Cohort:
    """The cohort that a plugin decides on, or else the sampler's."""
    decided = parts.hooks.decide("select_clients", round=round, population=parts.population, draws=parts.draws)
    if decided is not None:
        return Cohort(round, np.unique(np.asarray(decided, dtype=np.int64)), parts.population)
    return parts.sampler.sample(round, parts.population, parts.draws)


def make_plan(state: ServerState, parts: Parts) -> Plan:
    """What the cohort of the next round is sent."""
    return Plan(state.round + 1, state.parameters, parts.local, train_rows=parts.rows.train == "device_updates")


def in_time(blocks: Iterable[Updates], started: float, plan: Plan, parts: Parts) -> Iterator[Updates]:
    """The blocks that arrive before the deadline that a plugin's ``round_deadline`` sets; without one, all of them."""
    seconds = parts.hooks.decide("round_deadline", round=plan.round)
    for block in blocks:
        if seconds is not None and parts.clock() - started > seconds:
            return
        yield block


def accepted(blocks: Iterable[Updates], plan: Plan, parts: Parts) -> Iterator[Updates]:
    """The updates that no plugin's ``accept_update`` gives a reason to refuse; without such a plugin, all of them."""
    asked = parts.hooks.implements("accept_update")
    for block in blocks:
        for update in (block.slice(i, i + 1) for i in range(len(block))) if asked else (block,):
            reason = parts.hooks.decide("accept_update", update=update, plan=plan) if asked else None
            if reason is None:
                parts.hooks.observe("update_received", round=plan.round, updates=update)
                yield update
            else:
                parts.hooks.observe(
                    "client_dropped", round=plan.round, clients=update.clients, reason=f"refused: {reason}"
                )


def fold(
    aggregator: Aggregator, blocks: Iterator[Updates], state: ServerState
) -> tuple[Updates | None, Mapping[str, NDArray[Any]]]:
    """The total of ``blocks`` and the aggregator's memory; no total if not one client brings weight."""
    for first in blocks:
        if first.weights.sum() > 0:
            return aggregator.fold(_chain(first, blocks), state.aggregator)
    return None, state.aggregator


def _chain(first: Updates, rest: Iterator[Updates]) -> Iterator[Updates]:
    yield first
    yield from rest


class Tally:
    """Counts what passes: who answered, the bytes, and the mean loss."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._clients: list[IntArray] = []
        self._up = 0
        self._down = 0.0
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    def count(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """The same blocks, counted."""
        for block in blocks:
            if block.clients is not None:
                self._clients.append(block.clients)
            self._up += block.nbytes
            self._down += float(block.metrics.get("bytes_down", np.zeros(1)).sum())
            for name, values in block.metrics.items():
                if name != "bytes_down":
                    self._sums[name] = self._sums.get(name, 0.0) + float((values * block.weights).sum())
            self._weight += float(block.weights.sum())
            yield block

    def missing(self) -> IntArray:
        """The clients of the cohort whose update did not count."""
        heard = np.concatenate(self._clients) if self._clients else np.zeros(0, dtype=np.int64)
        return np.setdiff1d(self._cohort.clients, heard)

    def report(self, round: int, rounds: int, seconds: float) -> RoundReport:
        """The round in figures; the loss is the mean over examples, or NaN when there were none."""
        means = {name: total / self._weight if self._weight else float("nan") for name, total in self._sums.items()}
        heard = len(self._cohort) - len(self.missing())
        return RoundReport(
            round=round,
            total_rounds=rounds,
            loss=means.pop("loss", float("nan")),
            clients=heard,
            dropped=len(self._cohort) - heard,
            bytes_up=self._up,
            bytes_down=int(self._down),
            seconds=seconds,
            metrics=means,
        )
