"""Virtual time: a simulation in which every visit takes as long as it would on its device, and no longer here.

A round asks for the updates of a cohort in the order in which they would come. When each would come follows from the
traces, before anything is trained: so only those are trained that count, and a slow device costs nothing but virtual
seconds. How long devices worked for nothing is told all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedtower.core.cohort import Cohort, IntArray, Sampler, among
from fedtower.core.deadline import ARRIVED, State
from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.plan import Plan
from fedtower.core.traces import HOUR, DeviceSettings, FloatArray, Load, Traces, generated, read_traces
from fedtower.core.transport import Asked, Costs, DeviceTime, Visit, parts_of
from fedtower.core.updates import Updates
from fedtower.plugins.transports.virtual_clock.flight import Task, VirtualVersion

_LOOK_SECONDS = 60.0  # how often the server looks whether somebody is there, when nobody was


@dataclass(frozen=True)
class VirtualClock:
    """A clock of the run's own, and devices that are as fast, as reliable and as often there as their traces say."""

    traces: str = field(default="", metadata={"help": "a CSV file of traces; none: devices are generated"})
    devices: DeviceSettings = field(
        default_factory=DeviceSettings, metadata={"help": "the distributions that devices are generated from"}
    )
    start_hour: float = field(default=0.0, metadata={"help": "hour of the day at which the run begins"})
    upload_share: float = field(
        default=1.0, metadata={"help": "bytes that an update has on its way, as a share of it without any transform"}
    )
    block: int = field(
        default=32, metadata={"help": "clients visited together; it changes the memory used and nothing else"}
    )

    def __post_init__(self) -> None:
        if self.block < 1:
            raise RecipeError(f"transport.block must be at least 1, not {self.block}")
        if not 0 <= self.start_hour < 24 or not self.upload_share > 0:
            raise RecipeError(
                f"transport.start_hour must be from 0 to below 24 and upload_share above 0, not {self.start_hour:g} "
                f"and {self.upload_share:g}"
            )

    def over(self, costs: Costs, sampler: Sampler) -> VirtualLine:
        """The transport of a run."""
        return VirtualLine(self, costs, sampler)

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """The updates of one round by itself, of whose visits no more is known than the plan says."""
        line = VirtualLine(self, _as_planned)
        line.begin({})
        return line.exchange(plan, cohort, visit, draws, deadline)


@dataclass(frozen=True, eq=False)
class Visits:
    """A round as its devices live it: the cohort, when each update comes (infinity: never), and how long each works,
    all (C,), in seconds after the start.
    """

    clients: IntArray
    arrival: FloatArray
    seconds: FloatArray

    def in_order(self, deadline: float | None) -> IntArray:
        """The positions of those who come before the deadline, the first one first."""
        order = np.argsort(self.arrival, kind="stable")
        return order[self.arrival[order] < (np.inf if deadline is None else deadline)]


@dataclass(eq=False)
class VirtualLine:
    """A run's transport, its sampler among those who are there, and its clock."""

    settings: VirtualClock
    costs: Costs
    sampler: Sampler | None = None
    _now: float = 0.0
    _visits: Visits | None = field(default=None, repr=False)
    _traces: dict[int, Traces] = field(default_factory=dict, repr=False)
    _ahead: dict[tuple[int, int], Updates] = field(default_factory=dict, repr=False)

    def begin(self, state: State) -> None:
        """Be at the time that ``state`` says."""
        self._now = float(state["now"]) if state else self.settings.start_hour * HOUR
        self._visits = None

    def state(self) -> State:
        """What time it is."""
        return {"now": np.array(self._now)}

    def now(self) -> float:
        """Seconds since the midnight before the run."""
        return self._now

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        """The cohort that the recipe's sampler chooses among those who are there; if nobody is, it waits.

        Raises:
            DataError: nobody comes for a whole day.
        """
        assert self.sampler is not None
        traces, waited = self.traces(population, draws), 0.0
        while not np.any(there := traces.there(population, self._now)):
            self._now, waited = self._now + _LOOK_SECONDS, waited + _LOOK_SECONDS
            if waited > 24 * HOUR:
                raise DataError(f"nobody of {population} clients is there at any hour, say the traces")
        present = np.flatnonzero(there)
        chosen = among(self.sampler, present).sample(round, len(present), draws)
        return Cohort(round, present[chosen.clients], population)

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """The updates in the order in which they come, those of the target in as few blocks as may be. The clock goes
        on with each block; when no more comes in time, to the deadline.
        """
        started, self._visits = self._now, self.visits(plan, cohort, draws)
        arrival, order = self._visits.arrival, self._visits.in_order(deadline)
        for part in parts_of(len(order), self.settings.block, cohort.target):
            clients = np.sort(cohort.clients[order[part]])
            updates = visit(plan, clients)
            self._now = started + float(arrival[order[part.stop - 1]])
            came = arrival[cohort.places(clients)]
            yield replace(updates, metrics={**updates.metrics, ARRIVED: came})
        if deadline is not None and len(order) < len(cohort):
            self._now = started + deadline

    def spent(self, counted: Cohort) -> DeviceTime:
        """What the round took of its devices. Who is late learns so when handing in; who vanishes worked until then."""
        if self._visits is None:
            return DeviceTime()
        visits = self._visits
        wasted = ~np.isin(visits.clients, counted.clients)
        return DeviceTime(
            seconds=float(visits.seconds.sum()),
            wasted=float(visits.seconds[wasted].sum()),
            late=int(np.count_nonzero(np.isfinite(visits.arrival[wasted]))),
        )

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> VirtualVersion:
        """A version that the clients of ``cohort`` may work from, beside those who are on the way."""

        def begin(clients: IntArray) -> list[Task]:
            durations, until = self._lived(plan, clients, cohort.population, asked.draws)
            seconds = durations * np.minimum(until, 1.0)
            each = zip(seconds.tolist(), clients.tolist(), np.isfinite(until).tolist(), strict=True)
            return [Task(s, client, plan.round, s, vanishes) for s, client, vanishes in each]

        return VirtualVersion(plan, cohort, asked, begin, self.settings.block, self._set_now, self._now, self._ahead)

    def visits(self, plan: Plan, cohort: Cohort, draws: Draws) -> Visits:
        """The visits of a cohort that begin now. Who is not there never begins."""
        clients = cohort.clients
        durations, until = self._lived(plan, clients, cohort.population, draws)
        there = self.traces(cohort.population, draws).there(cohort.population, self._now)[clients]
        until = np.where(there, until, 0.0)
        return Visits(clients, np.where(np.isinf(until), durations, np.inf), durations * np.minimum(until, 1.0))

    def _lived(self, plan: Plan, clients: IntArray, population: int, draws: Draws) -> tuple[FloatArray, FloatArray]:
        """How long the visit of each client would take, and the share of it after which it vanishes, (C,)."""
        traces, load = self.traces(population, draws), self.costs(plan, clients)
        durations = traces.durations(clients, replace(load, bytes_up=self.settings.upload_share * load.bytes_up))
        return durations, traces.vanish(plan.round, clients, draws)

    def _set_now(self, now: float) -> None:
        self._now = now

    def traces(self, population: int, draws: Draws) -> Traces:
        """The devices: those of the file, or as many as there are clients."""
        if population not in self._traces:
            self._traces[population] = (
                read_traces(Path(self.settings.traces))
                if self.settings.traces
                else generated(self.settings.devices, population, draws.under("virtual_clock"))
            )
        return self._traces[population]


def _as_planned(plan: Plan, clients: IntArray) -> Load:
    """What a visit takes as far as the plan says: its parameters both ways, and ``local.steps``, or a step an epoch."""
    same = np.ones(len(clients))
    steps = plan.local.steps or plan.local.epochs or 1
    return Load(plan.nbytes * same, steps * same, (plan.nbytes + 8) * same)
