"""Buffered: asynchronous rounds seen from the process that trains: a window for each version, several of them open.

A client works from the newest version when it is given a lease; its update may come as long as the version is not too
old. What is accepted is taken in the order in which it is found, and written down before the step (:mod:`steps`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.journal import Accepted, RoundRecord
from fedtower.core.plan import Plan
from fedtower.core.transport import Abandoned, Asked, DeviceTime
from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.codec import decode_submission
from fedtower.plugins.transports.grpc.plans import decode_plan
from fedtower.plugins.transports.grpc.steps import Step, Taken, forget_steps, read_step, read_steps
from fedtower.plugins.transports.grpc.table import TableSide, elapsed
from fedtower.plugins.transports.grpc.windows import forget_windows, read_window

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02


@dataclass(frozen=True)
class Buffered:
    """The windows of all versions in use."""

    side: TableSide

    @property
    def steps(self) -> Path:
        """Where it is written what was taken."""
        return self.side.folder / "steps"

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> OpenVersion:
        """Open the window of a version, and close those that are too old now."""
        settings = asked.settings
        if read_step(self.steps, plan.round) is None:  # and is not made once more, after a kill
            self.side.current.set()
        self.side.opened(plan, "train", cohort.clients, settings.buffer, self.side.terms, settings.concurrency)
        for record in self.unfinished():
            if record.state == "open" and record.round < plan.round - settings.max_staleness:
                self.side.journal.advance(self.side.epoch, record.round, "train", "closed")
        return OpenVersion(self, plan, asked)

    def unfinished(self) -> list[RoundRecord]:
        """The windows of training that may still have something to take, oldest first."""
        records = self.side.journal.rounds()
        return [each for each in records if each.task == "train" and each.state in ("open", "closed")]

    def taken(self) -> Mapping[int, set[int]]:
        """The positions that steps have taken, by window."""
        taken: dict[int, set[int]] = defaultdict(set)
        for step in read_steps(self.steps):
            for window, position in step.taken:
                taken[window].add(position)
        return taken

    def committed(self) -> None:
        """What came of every step so far is in the state: windows that are closed and taken whole are done with."""
        taken = self.taken()
        for record in self.unfinished():
            if record.state == "closed" and len(taken.get(record.round, ())) == record.accepted:
                self.side.journal.advance(self.side.epoch, record.round, "train", "committed")

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after this version; the steps that may have to be made again keep what they
        took.
        """
        needed = [window for step in read_steps(self.steps) if step.version > round for window, _ in step.taken]
        needed += [record.round for record in self.unfinished()]
        through = min([round + 1, *needed]) - 1
        if through > 0:
            self.side.journal.retire(self.side.epoch, through)
            forget_steps(self.steps, through)
            forget_windows(self.side.windows, through)
        self.side.artefacts.keep_only(self._in_use())

    def trained(self) -> None:
        """Nothing is taken any more: all windows close. What was accepted since the last step is told of."""
        taken, unused = self.taken(), 0
        for record in self.unfinished():
            if record.state == "open":
                record = self.side.journal.advance(self.side.epoch, record.round, "train", "closed")
            unused += record.accepted - len(taken.get(record.round, ()))
            self.side.journal.advance(self.side.epoch, record.round, "train", "committed")
        if unused:
            self.side.said(f"{unused} updates were accepted after the last step and are not used: training is over")

    def _in_use(self) -> set[bytes]:
        """The digests of all that somebody may still fetch: of the plans of open windows."""
        kept: set[bytes] = set()
        for record in self.unfinished():
            window = read_window(self.side.windows, record.round, "train")
            if window is not None:
                plan = decode_plan(self.side.artefacts.path(window.digest).read_bytes())
                kept |= {window.digest, *(each.digest for each in plan.artefacts)}
        return kept


@dataclass
class OpenVersion:
    """One version, from the opening of its window to its step."""

    buffered: Buffered
    plan: Plan
    asked: Asked
    _taken: list[Taken] = field(default_factory=list)

    def arrivals(self) -> Iterator[Updates]:
        """Updates one at a time: those that were taken before a kill, or what is accepted from now on."""
        made = read_step(self.buffered.steps, self.plan.round)
        if made is None:
            yield from self._found()
        elif made.abandoned:
            raise Abandoned(made.abandoned)
        else:
            yield from map(self._decoded, self._again(made))

    def flight(self) -> Mapping[str, NDArray[Any]]:
        """Nothing: the journal knows who has a lease."""
        return {}

    def spent(self, counted: Cohort) -> DeviceTime:
        """What visits took whose updates this version took, or that brought nothing and ended since the last one."""
        return self.buffered.side.times.spent(counted)

    def _again(self, made: Step) -> Iterator[Accepted]:
        for window, position in made.taken:
            yield next(self.buffered.side.journal.accepted(window, "train", position - 1))

    def _found(self) -> Iterator[Updates]:
        side, steps = self.buffered.side, self.buffered.steps
        seconds = side.terms.deadline_seconds if self.asked.deadline is None else self.asked.deadline
        looks = self._looks()
        while self.asked.needed() > 0:
            found = _within(looks, seconds, side)
            if found is None:
                reason = (
                    f"for {seconds:g} s nothing came; {self.asked.settings.buffer - self.asked.needed()} of "
                    f"{self.asked.settings.buffer} updates are there, and wait for the next version"
                )
                Step(self.plan.round, (), reason).write(steps)
                raise Abandoned(reason)
            self._taken.append((found.round, found.position))
            yield self._decoded(found)
        Step(self.plan.round, tuple(self._taken), "").write(steps)

    def _looks(self) -> Iterator[Accepted | None]:
        """What is accepted and no step has taken, oldest window first; ``None`` when there is nothing now.

        A client counts once in a step: what else it sent waits for the next.
        """
        taken, journal = self.buffered.taken(), self.buffered.side.journal
        after = {window: _in_a_row(positions) for window, positions in taken.items()}
        clients: set[int] = set()
        while True:
            for record in self.buffered.unfinished():
                too_old = record.round < self.plan.round - self.asked.settings.max_staleness
                if record.round > self.plan.round or record.accepted <= after.get(record.round, 0):
                    continue
                for each in journal.accepted(record.round, "train", after.get(record.round, 0)):
                    after[record.round] = each.position
                    if each.position not in taken.get(record.round, ()) and (too_old or each.client not in clients):
                        if not too_old:
                            clients.add(each.client)
                        yield each
            yield None

    def _decoded(self, found: Accepted) -> Updates:
        self.buffered.side.times.note(found)
        return decode_submission(found.payload, found.client, most_bytes=self.buffered.side.most_bytes).updates


def _within(looks: Iterator[Accepted | None], seconds: float, side: TableSide) -> Accepted | None:
    """The next update, if one comes within so many seconds; it is looked for every 20 ms at least."""
    since, pause = side.clock(), _FIRST_PAUSE
    while (found := next(looks)) is None and elapsed(since, side.clock()) < seconds:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return found


def _in_a_row(positions: set[int]) -> int:
    """How many positions there are from the first on without a gap.

    >>> _in_a_row({1, 2, 4})
    2
    """
    missing = np.setdiff1d(np.arange(1, len(positions) + 2), sorted(positions))
    return int(missing[0]) - 1
