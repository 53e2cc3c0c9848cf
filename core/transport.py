"""Transport: the seam that reaches a cohort and yields its updates as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.core.plan import Plan
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.traces import Load
from fedtower.core.updates import Updates

Visit = Callable[[Plan, NDArray[np.int64]], Updates]
Costs = Callable[[Plan, NDArray[np.int64]], Load]
State = Mapping[str, NDArray[Any]]


@runtime_checkable
class KeepsTime(Protocol):
    """A transport that says itself which updates came in time: what it has acknowledged counts, whenever it is read."""

    keeps_time: ClassVar[bool]


@dataclass(frozen=True)
class DeviceTime:
    """What a round took of its devices, in seconds of theirs: in all, and of visits that did not count. ``late`` visits
    were finished, and came when the round was over; over a network, in the round before or earlier.
    """

    seconds: float = 0.0
    wasted: float = 0.0
    late: int = 0


@runtime_checkable
class TellsTime(Protocol):
    """A transport that knows how long devices work."""

    def spent(self, counted: Cohort) -> DeviceTime:
        """What the visits took that ended in this round, if of its cohort ``counted`` counts: once a round, when it is
        over.
        """
        ...


@runtime_checkable
class OwnTime(TellsTime, Protocol):
    """A transport in whose world time goes otherwise than here. Its time is part of the server's state: a round begins
    at the one, and leaves the next.
    """

    def begin(self, state: State) -> None:
        """Be where ``state`` says; at the beginning, if it is empty."""
        ...

    def state(self) -> State:
        """Where it stands."""
        ...

    def now(self) -> float:
        """Seconds since some midnight."""
        ...


@runtime_checkable
class Simulates(Protocol):
    """A transport that has to know what visits cost: it opens to one that chooses clients, reaches them, and keeps the
    time.
    """

    def over(self, costs: Costs, sampler: Sampler) -> Simulation:
        """The transport of a run; ``sampler`` chooses among the clients that are there."""
        ...


class Simulation(OwnTime, Sampler, Protocol):
    """What such a transport opens to: a :class:`Transport`, too."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """As :meth:`Transport.exchange`."""
        ...


def parts_of(count: int, width: int, target: int | None) -> Iterator[slice]:
    """The blocks in which ``count`` clients are visited here: ``width`` at a time up to the target, and then one by
    one, as some of those may not count.

    >>> [(part.start, part.stop) for part in parts_of(7, 3, 5)]
    [(0, 3), (3, 5), (5, 6), (6, 7)]
    """
    first = 0
    while first < count:
        room = width if target is None else max(min(width, target - first), 1)
        yield slice(first, min(first + room, count))
        first += room


class Abandoned(FedtowerError):
    """A round came to its end without enough updates: none of them counts. The message says how it stood."""


@dataclass(frozen=True)
class Asked:
    """What asynchronous rounds ask of a transport for one version.

    ``needed()`` is how many more updates the step waits for. ``visit(version, clients)`` trains clients here from a
    version that is in use; who does not simulate has no need of it. ``deadline`` is for how many seconds on end nothing
    may come. ``flight`` is what :meth:`Version.flight` left of the version before.
    """

    settings: AsynchronousSettings
    needed: Callable[[], int]
    visit: Callable[[int, NDArray[np.int64]], Updates]
    draws: Draws
    deadline: float | None
    flight: State


class Version(Protocol):
    """One version of the shared parameters, from its publication to the step that makes the next."""

    def arrivals(self) -> Iterator[Updates]:
        """Updates as they come, trained from this version or an older one, as their ``rounds`` say: blocks of at most
        as many clients as are needed, until none is. No client is among them twice, unless it is refused.

        Whoever uses them has used them all when this ends: what they are is durable by then, where anything is.

        Raises:
            Abandoned: nothing comes any more; the version changes nothing, and what came waits for the next.
        """
        ...

    def flight(self) -> State:
        """Who is on the way now, ``clients`` (N,) from ``versions`` (N,), and whatever else the transport wants to be
        handed back; nothing where clients work elsewhere.
        """
        ...

    def spent(self, counted: Cohort) -> DeviceTime | None:
        """What visits that came to their end in this version took of their devices, if of those ``counted`` counts;
        nothing where that is not known.
        """
        ...


@runtime_checkable
class Buffers(Protocol):
    """A transport over which clients may work from several versions at once."""

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> Version:
        """Publish a version. Clients of ``cohort`` may begin to work from it, as far as there is room."""
        ...


class Transport(Protocol):
    """Exchanges a plan for updates. A client whose update never comes is simply missing from the blocks."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """Blocks of updates, lazily, as they come; ``visit`` is the client's half, for transports that run it here.

        ``deadline`` is how many seconds from now on updates are of use; who waits for a network stops waiting then.
        ``None`` sets no limit.

        Raises:
            Abandoned: too few came; the round changes nothing.
        """
        ...
