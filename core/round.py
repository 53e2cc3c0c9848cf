"""The server's half: one round, and rounds until there is a reason to stop. Read it top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.accounting import Accountant
from fedtower.core.aggregation import Aggregator, Instructed, Rooted, folded
from fedtower.core.checking import WORDS, CheckSettings, Reason
from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.deadline import Arrivals, Deadline, Listening
from fedtower.core.download import Download, kept, publish
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.receiving import Reception, in_time, stamped, until_enough
from fedtower.core.rows import RowStore
from fedtower.core.server import Counting, PublicTraining, Schedule, ServerOptimizer, ServerState, step
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.tally import RoundReport, Tally
from fedtower.core.transform import Transform, finish
from fedtower.core.transport import Abandoned, KeepsTime, OwnTime, TellsTime, Transport
from fedtower.core.updates import Updates

__all__ = ["Parts", "RoundReport", "run_round", "run_rounds", "stopped"]

PATIENCE = 3
"""Rounds on end whose every update is refused, after which a run ends: one may be bad luck with a small cohort."""


@dataclass(frozen=True)
class Parts:
    """What a round is made of. So many updates as ``target`` end a round; without it, all of the cohort."""

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
    checks: CheckSettings = field(default_factory=CheckSettings)
    accountant: Accountant | None = None
    public: PublicTraining | None = None
    deadline: Deadline | None = None
    target: int | None = None
    asynchronous: AsynchronousSettings | None = None
    download: Download | None = None
    root: Callable[[Plan], Updates] | None = None  # what the server makes of a plan itself, from public data


def run_rounds(
    state: ServerState, parts: Parts, one: Callable[[ServerState, Parts], tuple[ServerState, RoundReport]] | None = None
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Round after round, each with the state it leaves, until all are done, the accountant cannot afford another, or a
    plugin's ``stop_run`` gives a reason. ``one`` is what a round is, when it is not :func:`run_round`.

    Raises:
        UpdateError: whatever came in several rounds on end was refused: that is nobody's own mistake.
    """
    in_vain = 0
    while state.round < parts.rounds and affords(state, parts):
        state, report = (one or run_round)(state, parts)
        yield state, report
        if stopped(report, parts.hooks):
            return
        in_vain = in_vain + 1 if report.refused and not report.clients else 0
        if in_vain == PATIENCE:
            raise UpdateError(
                f"every update of the rounds {report.round - PATIENCE + 1} to {report.round} was refused: "
                f"{', '.join(WORDS[Reason(reason)] for reason in report.refused)}. Nothing more would be learnt"
            )


def affords(state: ServerState, parts: Parts) -> bool:
    """Whether the accountant can afford another round; without one there is nothing to spend."""
    if parts.accountant is None or parts.accountant.affords(state.accountant, parts.transforms):
        return True
    spent = ", ".join(f"{name} {value:.4g}" for name, value in parts.accountant.spent(state.accountant).items())
    parts.hooks.observe(
        "warned", message=f"stopped after round {state.round} of {parts.rounds}: another would cost too much ({spent})"
    )
    return False


def stopped(report: RoundReport, hooks: Hooks) -> bool:
    """Whether a plugin ends the run after this round; its reason is passed on."""
    reason = hooks.decide("stop_run", report=report)
    if reason:
        hooks.observe("warned", message=f"stopped after round {report.round} of {report.total_rounds}: {reason}")
    return bool(reason)


def run_round(state: ServerState, parts: Parts) -> tuple[ServerState, RoundReport]:
    """Send the plan out, fold what comes back and counts, and move one step.

    A round in which no update counts changes nothing but the round's number, and what an accountant recorded.
    """
    if isinstance(parts.transport, OwnTime):
        parts.transport.begin(state.transport)
    started = parts.clock()
    cohort = choose(state.round + 1, parts)
    plan = make_plan(state, parts)
    parts.hooks.observe("round_started", round=plan.round, cohort=cohort)
    deadline = deadline_of(state, parts)

    tally, listening = Tally(cohort), Listening(cohort)
    arriving = parts.transport.exchange(plan, cohort, parts.client.visit, parts.draws, deadline)
    target = None if keeps_time(parts.transport) else cohort.target
    if not keeps_time(parts.transport):
        arriving = stamped(in_time(arriving, started, deadline, parts.clock), started, parts.clock)
        arriving = until_enough(arriving, target, tally)
    reception = Reception(plan, cohort, parts.transforms, parts.checks, parts.client, parts.hooks, tally, target)
    blocks = tally.count(reception.accepted(listening.noted(arriving)))

    aggregator = aggregator_of(plan, parts)
    try:
        total, memory = parts.hooks.wrap("aggregate", lambda: fold(aggregator, blocks, state), round=plan.round)
    except Abandoned as reason:
        parts.hooks.observe("warned", message=f"round {plan.round} was abandoned: {reason}")
        total, memory, tally = None, state.aggregator, Tally(cohort)
    parts.client.discard()  # of those who were late
    state = replace(moved(state, total, memory, tally.survivors(), parts), download=kept(plan))

    seconds = parts.clock() - started
    spent = parts.transport.spent(tally.survivors()) if isinstance(parts.transport, TellsTime) else None
    if isinstance(parts.transport, OwnTime):
        state = replace(state, transport=parts.transport.state())
    state = learn(state, listening.heard(seconds, deadline), parts)
    report = tally.report(plan.round, parts.rounds, seconds, spent)
    announce(report, tally, parts.hooks)
    return state, report


def deadline_of(state: ServerState, parts: Parts) -> float | None:
    """How many seconds the next round may take: what a plugin decides, or else what the recipe's deadline says."""
    decided: float | None = parts.hooks.decide("round_deadline", round=state.round + 1)
    if decided is not None or parts.deadline is None:
        return decided
    return parts.deadline.limit(state.deadline or parts.deadline.init())


def learn(state: ServerState, arrivals: Arrivals, parts: Parts) -> ServerState:
    """The state with what the deadline learnt of a round; if that changed it, everybody is told why."""
    if parts.deadline is None:
        return state
    memory, why = parts.deadline.learn(state.deadline or parts.deadline.init(), arrivals)
    if why:
        seconds = parts.deadline.limit(memory)
        parts.hooks.observe("deadline_changed", round=arrivals.round, seconds=seconds, why=why)
    return replace(state, deadline=memory)


def keeps_time(transport: Transport) -> bool:
    """Whether what a transport hands over has come in time, whenever it is read."""
    return isinstance(transport, KeepsTime) and transport.keeps_time


def moved(
    state: ServerState, total: Updates | None, memory: Mapping[str, NDArray[Any]], counted: Cohort, parts: Parts
) -> ServerState:
    """The state after the step that ``total`` makes; without one it is the next round's all the same."""
    state = account(state, counted, parts)
    if total is None:
        return replace(state, round=state.round + 1)
    return step(
        replace(state, aggregator=memory),
        finish(parts.transforms, total, counted),
        optimizer_of(counted, parts),
        parts.store,
        lr=parts.lr,
        lr_scale=parts.schedule(state.round + 1),
        rows=parts.rows,
        public=parts.public,
        share=len(counted) / parts.population,
    )


def account(state: ServerState, counted: Cohort, parts: Parts) -> ServerState:
    """The state with this round in the privacy ledger, before anything of the round can be seen."""
    if parts.accountant is None:
        return state
    ledger = parts.accountant.record(state.accountant, counted, parts.transforms)
    parts.hooks.observe("privacy_spent", round=counted.round, spent=parts.accountant.spent(ledger))
    return replace(state, accountant=ledger)


def announce(report: RoundReport, tally: Tally, hooks: Hooks) -> None:
    """Tell who is missing, what was everybody's mistake, and how the round went."""
    missing, mistake = tally.missing(), tally.mistake()
    if len(missing):
        hooks.observe("client_dropped", round=report.round, clients=missing, reason=tally.why_missing)
    if mistake is not None:
        hooks.observe("warned", message=mistake)
    hooks.observe("round_finished", report=report)


def choose(round: int, parts: Parts) -> Cohort:
    """The cohort that a plugin decides on, or else the sampler's."""
    decided = parts.hooks.decide("select_clients", round=round, population=parts.population, draws=parts.draws)
    if decided is not None:
        return Cohort(round, np.unique(np.asarray(decided, dtype=np.int64)), parts.population)
    cohort = parts.sampler.sample(round, parts.population, parts.draws)
    if parts.target is None or cohort.target is not None:
        return cohort
    return replace(cohort, target=min(parts.target, len(cohort)))


def make_plan(state: ServerState, parts: Parts) -> Plan:
    """What the cohort of the next round is sent."""
    plan = Plan(state.round + 1, state.parameters, parts.local, train_rows=parts.rows.train == "device_updates")
    if parts.download is None:
        return plan
    draws = parts.draws.under("download")
    parameters, publication = publish(parts.download, plan.round, plan.parameters, state.download, draws)
    return replace(plan, parameters=parameters, publication=publication)


def optimizer_of(counted: Cohort, parts: Parts) -> ServerOptimizer:
    """The server optimiser, told which share of all clients counted where it asks for that."""
    optimizer = parts.optimizer
    return optimizer.counted(len(counted) / parts.population) if isinstance(optimizer, Counting) else optimizer


def aggregator_of(plan: Plan, parts: Parts) -> Aggregator:
    """The aggregator, told of the plan and of the server's own update where it asks for them."""
    aggregator = parts.aggregator
    if isinstance(aggregator, Instructed):
        aggregator = aggregator.instructed(plan)
    if isinstance(aggregator, Rooted):
        assert parts.root is not None  # a run without public data was refused before its first round
        aggregator = aggregator.rooted(parts.root(plan))
    return aggregator


def fold(
    aggregator: Aggregator, blocks: Iterator[Updates], state: ServerState
) -> tuple[Updates | None, Mapping[str, NDArray[Any]]]:
    """The total of ``blocks`` and the aggregator's memory; no total if not one client brings weight."""
    weightless: list[Updates] = []  # they are folded too: the first to arrive are treated as the last
    for first in blocks:
        if np.any(first.weights != 0):
            return folded(aggregator, chain(weightless, [first], blocks), state.aggregator)
        weightless.append(first)
    return None, state.aggregator
