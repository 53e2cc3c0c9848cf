"""The server's half: one round, and rounds until there is a reason to stop. Read it top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
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
WeightArray = NDArray[np.float64]


@dataclass(frozen=True)
class RoundReport:
    """What a round did: who took part, what it cost, and how it went.

    ``loss`` and ``metrics`` are means over the examples of the updates that counted; ``bytes_up`` and ``bytes_down``
    are theirs too: what was sent to clients that dropped out is not known here.
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
        if stopped(report, parts.hooks):
            return


def stopped(report: RoundReport, hooks: Hooks) -> bool:
    """Whether a plugin ends the run after this round; its reason is passed on."""
    reason = hooks.decide("stop_run", report=report)
    if reason:
        hooks.observe("warned", message=f"stopped after round {report.round} of {report.total_rounds}: {reason}")
    return bool(reason)


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
    blocks = tally.count(accepted(in_time(blocks, started, plan, parts), plan, parts, tally))
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
        parts.hooks.observe("client_dropped", round=plan.round, clients=missing, reason="sent no update in time")
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
        if seconds is not None and parts.clock() - started >= seconds:
            return
        yield block


def accepted(blocks: Iterable[Updates], plan: Plan, parts: Parts, tally: Tally) -> Iterator[Updates]:
    """The updates that no plugin's ``accept_update`` gives a reason to refuse; without such a plugin, all of them."""
    asked = parts.hooks.implements("accept_update")
    for block in blocks:
        for update in (block.slice(i, i + 1) for i in range(len(block))) if asked else (block,):
            reason = parts.hooks.decide("accept_update", update=update, plan=plan) if asked else None
            if reason is None:
                parts.hooks.observe("update_received", round=plan.round, updates=update)
                yield update
            else:
                tally.refuse(update)
                parts.hooks.observe(
                    "client_dropped", round=plan.round, clients=update.clients, reason=f"refused: {reason}"
                )


def fold(
    aggregator: Aggregator, blocks: Iterator[Updates], state: ServerState
) -> tuple[Updates | None, Mapping[str, NDArray[Any]]]:
    """The total of ``blocks`` and the aggregator's memory; no total if not one client brings weight."""
    weightless: list[Updates] = []  # they are folded too: the first to arrive are treated as the last
    for first in blocks:
        if np.any(first.weights != 0):
            return aggregator.fold(chain(weightless, [first], blocks), state.aggregator)
        weightless.append(first)
    return None, state.aggregator


class Tally:
    """Counts what passes: who answered, the bytes, and the mean of each metric over examples.

    The means are the same to the last bit for any order and any width of blocks.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._heard: list[IntArray] = []
        self._refused: list[IntArray] = []
        self._up = 0
        self._down = 0.0
        self._metrics: dict[str, list[tuple[WeightArray, WeightArray]]] = {}  # by name, values and their weights

    def count(self, blocks: Iterable[Updates]) -> Iterator[Updates]:
        """The same blocks, counted."""
        for block in blocks:
            if block.clients is not None:
                self._heard.append(block.clients)
            self._up += block.nbytes
            self._down += float(block.metrics.get("bytes_down", np.zeros(1)).sum())
            weighty = block.weights > 0  # a client without examples has no loss, whatever it says
            for name, values in block.metrics.items():
                if name != "bytes_down":
                    self._metrics.setdefault(name, []).append((values[weighty], block.weights[weighty]))
            yield block

    def refuse(self, update: Updates) -> None:
        """Take note of a client whose update was refused; those who were told so are not told again."""
        if update.clients is not None:
            self._refused.append(update.clients)

    def missing(self) -> IntArray:
        """The clients of the cohort from whom nothing came in time."""
        return np.setdiff1d(self._cohort.clients, _ids(self._heard + self._refused))

    def report(self, round: int, rounds: int, seconds: float) -> RoundReport:
        """The round in figures; the loss is the mean over examples, or NaN when there were none."""
        means = {name: _mean(parts) for name, parts in self._metrics.items()}
        heard = len(np.intersect1d(self._cohort.clients, _ids(self._heard)))
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


def _ids(parts: list[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _mean(parts: list[tuple[WeightArray, WeightArray]]) -> float:
    """The mean of values by weight, from sums that are rounded once; NaN without weight."""
    values, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    terms = values * weights
    if not len(terms) or not np.all(np.isfinite(terms)):
        return float("nan")
    return math.fsum(terms) / math.fsum(weights)
