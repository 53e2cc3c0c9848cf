"""Line: the seam of a transport that reaches devices: what it is told of a federation, and what rounds ask of it.

Intakes and devices import this: it knows no tensor library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.draws import Draws
from fedtower.core.journal import Journal, RoundRecord, Task
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowStore
from fedtower.core.settings import Part
from fedtower.core.signing import Signer
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.transport import Transport
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.evaluation import MetricSum, Role


@dataclass(frozen=True)
class Opening:
    """What a transport is told of a federation before its first round."""

    folder: Path
    federation: str
    run: str
    seed: int
    bundle: Bundle
    local: LocalSettings
    rows: RowStore | None
    transforms: tuple[Part, ...]
    evaluation: Mapping[str, Any]
    max_norm: float | None
    cohort_size: int | None
    journal: Journal
    signer: Signer
    said: Callable[[str], None]
    asynchronous: AsynchronousSettings | None = None
    download: Part | None = None


@dataclass(frozen=True)
class Waiting:
    """A window that is open: so many of ``clients`` may answer, ``target`` are enough, ``accepted`` have.

    ``seconds_left`` is the time until its deadline.
    """

    round: int
    task: Task
    clients: int
    target: int
    accepted: int
    seconds_left: float


@dataclass(frozen=True)
class Counts:
    """What was counted at the public port since the run was first served, through all kills: leases and acknowledged
    updates by task, calls and updates refused by reason, and bytes of updates up and of artefacts and rows down.

    A kill forgets what was counted in the second before it.
    """

    leases: Mapping[str, int] = field(default_factory=dict)
    acknowledged: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Standing:
    """How a federation stands, as its transport's files say: the devices that are there, how many a round waits for,
    the windows that are open, and what was counted.
    """

    there: int
    needed: int
    open: Sequence[Waiting]
    counts: Counts


class Line(Transport, Protocol):
    """A transport that is open: devices call it, and rounds go over it."""

    @property
    def rows(self) -> RowStore | None:
        """The rows of the opening, safe to be stepped while devices fetch them."""
        ...

    def choose(self, round: int, sampler: Sampler, draws: Draws) -> Cohort:
        """The cohort of a round, out of the clients that are there; it waits until there are enough."""
        ...

    def judged(self, plan: Plan, role: Role, visit: int | None = None) -> Mapping[str, MetricSum]:
        """Sums and counts of metrics over the held-out items of the devices that are there.

        With ``visit`` each of them first tunes the model for itself alone, by what would be its visit in that round.
        """
        ...

    def committed(self, round: int) -> None:
        """What came of a round's updates is in the state."""
        ...

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after a round: what led to it may go."""
        ...

    def trained(self) -> None:
        """There will be no more steps: nobody need train any more, and the model is judged."""
        ...

    def finished(self, reason: str) -> None:
        """There will be no more rounds: devices are told so."""
        ...

    def close(self) -> None:
        """Let go of what is open; the federation may go on later."""
        ...


class DeployedTransport(Protocol):
    """The seam of a transport that reaches devices: a frozen dataclass of settings.

    Its door says (capability ``intake``) which function serves the public port, in a process of its own.
    """

    def open(self, opening: Opening) -> Line:
        """The line to the devices of a federation."""
        ...

    def standing(self, folder: Path, windows: Sequence[RoundRecord], cohort_size: int | None) -> Standing:
        """How the federation in ``folder`` stands; nothing is changed, whether it is served now or was once.

        ``windows`` are those of its journal.
        """
        ...
