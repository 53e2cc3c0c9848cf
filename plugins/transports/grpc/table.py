"""TableSide: a window's life, seen from the process that trains: publish the plan, read what was accepted, close.

The journal stands between this process and the intakes. What they have accepted is read from it one update at a time,
so memory does not grow with the cohort; a process that was killed reads the same updates again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from fedtower.core.cohort import Cohort
from fedtower.core.deadline import ARRIVED
from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError
from fedtower.core.journal import Accepted, Clock, Instant, Journal, RoundRecord, Task, WrongState, since_boot, wait
from fedtower.core.plan import Plan
from fedtower.core.publication import Publication
from fedtower.core.rows import IntArray
from fedtower.core.signing import Signer
from fedtower.core.transport import Abandoned, Visit
from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.arrivals import ArrivalTimes
from fedtower.plugins.transports.grpc.artefact_store import ArtefactStore
from fedtower.plugins.transports.grpc.artefacts import encode_parameter
from fedtower.plugins.transports.grpc.bell import INTAKES, ring
from fedtower.plugins.transports.grpc.codec import decode_submission
from fedtower.plugins.transports.grpc.device_times import DeviceTimes
from fedtower.plugins.transports.grpc.plans import Messages, PublishedPlan, sign_plan
from fedtower.plugins.transports.grpc.presence import silent
from fedtower.plugins.transports.grpc.windows import Window, forget_windows, read_window
from fedtower.recsys.evaluation import MetricSum


@dataclass(frozen=True)
class Terms:
    """How long a window waits, and for how much.

    ``target`` updates are enough to close it; at the deadline, ``quorum`` (a share of the target) is, and so it is when
    everybody else has been silent for ``lease_seconds``. An evaluation, for which the training waits, then ends with
    whatever there is, and after ``evaluation_seconds`` at the latest.
    """

    lease_seconds: float
    heartbeat_seconds: float
    deadline_seconds: float
    quorum: float
    evaluation_seconds: float | None = None


@dataclass
class TableSide:
    """Opens windows and reads what was accepted in them; the :class:`~fedtower.core.transport.Transport` of a deployed
    run.

    ``template`` is the plan of any round without what changes: round and parameters. ``epoch`` fences an older process.
    ``current`` is set once this process stands where the devices do: one that was killed first does again what they
    have left behind, and what it has meanwhile is not what they train on.
    """

    folder: Path
    journal: Journal
    epoch: int
    signer: Signer
    template: PublishedPlan
    terms: Terms
    said: Callable[[str], None]
    most_bytes: int = 1 << 30
    clock: Clock = since_boot
    target: int | None = None
    current: Event = field(default_factory=Event, repr=False)
    pause: Callable[[float], Any] = time.sleep
    _living: dict[tuple[int, Task], set[bytes]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.times = DeviceTimes(self.windows, self.journal, self.terms.lease_seconds)

    @property
    def artefacts(self) -> ArtefactStore:
        """What the intakes give out."""
        return ArtefactStore(self.folder / "artefacts")

    @property
    def windows(self) -> Path:
        """Where the windows' files are."""
        return self.folder / "windows"

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """The accepted updates of a cohort, one at a time, as they come. ``visit`` is the devices' own matter."""
        terms = self.terms if deadline is None else replace(self.terms, deadline_seconds=deadline)
        target = min(self.target or cohort.target or len(cohort), len(cohort))
        times = ArrivalTimes(self.windows / f"{plan.round:06d}-train.arrived", self._accepted_before(plan.round))
        window = self.opened(plan, "train", cohort.clients, target, terms)
        for each in map(self.times.note, self._accepted(window, terms)):
            updates = decode_submission(each.payload, each.client, most_bytes=self.most_bytes).updates
            came = times.seen(each.position, elapsed(window.opened, self.clock()))
            yield replace(updates, metrics={**updates.metrics, ARRIVED: np.array([came])})

    def judged(self, plan: Plan, clients: IntArray) -> dict[str, MetricSum]:
        """The metrics of the devices' own held-out items: sums and counts over all that answered in time."""
        terms = replace(self.terms, deadline_seconds=self.terms.evaluation_seconds or self.terms.deadline_seconds)
        window = self.opened(plan, "evaluate", clients, len(clients), terms)
        totals: dict[str, MetricSum] = {}
        for upload in self._in_vain(self._accepted(window, terms)):
            for name, each in decode_submission(upload.payload, upload.client, most_bytes=self.most_bytes).sums.items():
                held = totals.get(name, MetricSum(0.0, 0))
                totals[name] = MetricSum(held.total + each.total, held.cases + each.cases)
        self.committed(window.round, "evaluate")
        return totals

    def chosen(self, round: int) -> IntArray | None:
        """The clients of a round that was opened before a kill; nothing if it was not."""
        window = read_window(self.windows, round, "train")
        return None if window is None else window.clients

    def committed(self, round: int, task: Task = "train") -> None:
        """What came of a window's updates is in the state of the training."""
        self._living.pop((round, task), None)
        record = self.journal.record(round, task)
        if record.state != "abandoned":
            self.journal.advance(self.epoch, round, task, "committed")

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after this round: what led to it may go."""
        self.journal.retire(self.epoch, round)
        forget_windows(self.windows, round)

    def opened(
        self,
        plan: Plan,
        task: Task,
        clients: IntArray,
        target: int,
        terms: Terms,
        concurrency: int | None = None,
    ) -> Window:
        """The window of a round: as it was opened before a kill, or a new one."""
        published = self._published(plan)
        data, signed = sign_plan(published, self.signer)
        digest = self.artefacts.put("plan", data).digest
        held = read_window(self.windows, plan.round, task)
        if held is not None and held.digest != digest:
            raise CheckpointError(
                f"round {plan.round} ({task}) was opened with another plan than this process makes of its checkpoint: "
                f"the recipe, the data or the checkpoint was changed; start the federation again, in a new folder"
            )
        is_new = held is None
        if held is None:
            held = Window(
                round=plan.round,
                task=task,
                plan=signed,
                clients=np.sort(clients),
                target=target,
                lease_seconds=terms.lease_seconds,
                heartbeat_seconds=terms.heartbeat_seconds,
                deadline_seconds=terms.deadline_seconds,
                opened=self.clock(),
                concurrency=concurrency,
            )
            held.write(self.windows)
        if concurrency is None:  # else many windows are open, and who opens them knows which
            self._living[plan.round, task] = self._named(published, digest)
        if is_new and task == "train" and concurrency is None:
            # What rounds that are over were sent is of no use: a parameter of every round would fill the disk. One that
            # is done again after a kill takes nothing away: devices are at a later one.
            self.artefacts.keep_only(set[bytes]().union(*self._living.values()))
        try:
            record = self.journal.record(plan.round, task)
        except WrongState:  # it is not there
            record = self.journal.open_round(self.epoch, plan.round, task, digest.hex())
        if record.state == "open" and concurrency is None:
            self.current.set()
        ring(self.folder / "bells", INTAKES)
        return held

    def _accepted_before(self, round: int) -> int:
        """How many updates a round has that an earlier process opened; none of a new one."""
        try:
            return self.journal.record(round, "train").accepted
        except WrongState:
            return 0

    def _accepted(self, window: Window, terms: Terms) -> Iterator[Accepted]:
        """Every accepted upload; the window is closed when this ends.

        Raises:
            Abandoned: the deadline came before the quorum; the window was abandoned.
        """
        round, task, after, answered = window.round, window.task, 0, set[int]()
        while True:
            left = window.deadline_seconds - elapsed(window.opened, self.clock())
            record = wait(self.journal, round, task, after, min(max(left, 0.0), 1.0), self.pause)
            for each in self.journal.accepted(round, task, after):
                yield each
                after = each.position
                answered.add(each.client)
            if record.state != "open":
                break
            accepted = max(record.accepted, after)  # what came while the others were read counts as well
            if accepted >= window.target or left <= 0:
                record = self._closed(window, accepted, terms, f"after {window.deadline_seconds:g} s")
            elif self._is_deserted(window, accepted, answered, terms):
                why = f"when the others had been silent for {terms.lease_seconds:g} s"
                record = self._closed(window, accepted, terms, why)
        if record.state == "abandoned":
            raise Abandoned(record.reason)
        # What was accepted between the last look and the closing.
        yield from self.journal.accepted(round, task, after)

    def _in_vain(self, accepted: Iterator[Accepted]) -> Iterator[Accepted]:
        """The same; that there were too few is said, and what came is used: a mean is one of those that answered."""
        try:
            yield from accepted
        except Abandoned as reason:
            self.said(f"not all devices judged: {reason}")

    def _is_deserted(self, window: Window, accepted: int, answered: set[int], terms: Terms) -> bool:
        """Whether what there is is enough, and nobody is left who could bring more."""
        is_enough = window.task == "evaluate" or accepted >= _needed(window, terms)
        if not is_enough or elapsed(window.opened, self.clock()) < terms.lease_seconds:
            return False
        missing = np.setdiff1d(window.clients, np.fromiter(answered, dtype=np.int64))
        return len(silent(self.folder / "present", missing, terms.lease_seconds, self.clock)) == len(missing)

    def _closed(self, window: Window, accepted: int, terms: Terms, when: str) -> RoundRecord:
        needed = _needed(window, terms)
        if accepted >= needed:
            return self.journal.advance(self.epoch, window.round, window.task, "closed")
        reason = f"{when} there were {accepted} of {window.target} updates, and the quorum is {needed}"
        return self.journal.advance(self.epoch, window.round, window.task, "abandoned", reason)

    def _published(self, plan: Plan) -> PublishedPlan:
        """The plan, with one artefact a parameter: in the order of their names, as a checkpoint may give them back in
        another order than a model does.
        """
        store, parameters = self.artefacts, sorted(plan.parameters.items())
        named = tuple(store.put(name, encode_parameter(name, value)) for name, value in parameters)
        return replace(
            self.template,
            round=plan.round,
            parameters=named,
            local=plan.local,
            train_rows=plan.train_rows,
            messages=self._messages(plan.publication),
        )

    def _messages(self, publication: Publication | None) -> Messages | None:
        """What was published, as artefacts, each under the round that it leads to."""
        template = self.template.messages
        if publication is None or template is None:
            return None
        first = publication.round - len(publication.messages) + 1
        named = tuple(self.artefacts.put(str(round), data) for round, data in enumerate(publication.messages, first))
        return replace(template, round=publication.round, differences=publication.differences, artefacts=named)

    def _named(self, plan: PublishedPlan, digest: bytes) -> set[bytes]:
        """The digests of all that a plan names, and its own."""
        return {digest, *(each.digest for each in plan.artefacts)}


def _needed(window: Window, terms: Terms) -> int:
    """How many updates are a quorum."""
    return max(int(np.ceil(terms.quorum * window.target)), 1)


def elapsed(since: Instant, now: Instant) -> float:
    """Seconds since an instant; a machine that was started anew has waited long enough."""
    return now.seconds - since.seconds if since.boot == now.boot else float("inf")
