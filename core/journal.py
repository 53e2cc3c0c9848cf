"""Journal: what has been accepted, durably: the seam behind which lies all that a kill may not take.

A *window* is one round of one task: clients train in it, or evaluate. The table process opens and closes windows; an
intake hands out leases in them and takes uploads. Nothing but the journal is between the two, and they may be processes
that are killed at any moment, or machines.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from fedtower.core.errors import CheckpointError, StorageError

Task = Literal["train", "evaluate"]
State = Literal["open", "closed", "committed", "abandoned"]

BEFORE: dict[State, tuple[State, ...]] = {
    "open": (),
    "closed": ("open",),
    "committed": ("closed",),
    "abandoned": ("open", "closed"),
}
"""The states from which a window may come to a state."""


class JournalError(CheckpointError):
    """A journal is damaged, belongs to something else, or was asked for what its windows do not allow."""


class Fenced(JournalError):
    """A later table process has claimed the federation; the one that is told so must stop."""


class WrongState(JournalError):
    """A window is not in a state from which this can be done."""


class DamagedRecord(JournalError):
    """What lies in the journal is not what was accepted."""


class Busy(StorageError):
    """The journal cannot take anything now, and lost nothing; ``seconds`` says when to come back."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Instant:
    """A moment: seconds of a clock that never jumps, and which start of the machine it counts from."""

    boot: str
    seconds: float


Clock = Callable[[], Instant]


def since_boot() -> Instant:
    """Now, by CLOCK_BOOTTIME: it goes on while the machine sleeps, and nobody can set it."""
    return Instant(_boot(), time.clock_gettime(time.CLOCK_BOOTTIME))


@cache
def _boot() -> str:
    """Which start of the machine this is: no process sees another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


@dataclass(frozen=True)
class RoundRecord:
    """A window as the journal knows it: how far it is, who wrote that, and how many uploads it has.

    ``plan`` is the digest of what its clients are sent; ``reason`` says why it was abandoned. When it is ``retired``, a
    checkpoint holds what came of its uploads, and they are gone.
    """

    round: int
    task: Task
    state: State
    epoch: int
    plan: str
    reason: str = ""
    accepted: int = 0
    retired: bool = False


@dataclass(frozen=True)
class Lease:
    """One client's right to send one upload in a window. ``id`` is 16 bytes that nobody can guess; ``given`` is when it
    was given, which a journal does not know of leases that are older than that column.
    """

    id: bytes
    round: int
    task: Task
    client: int
    expires: Instant
    given: Instant | None = None

    def seconds_left(self, now: Instant) -> float:
        """How long it lives; nothing once the machine was started anew.

        >>> Lease(bytes(16), 1, "train", 7, Instant("first", 60.0)).seconds_left(Instant("first", 45.0))
        15.0
        >>> Lease(bytes(16), 1, "train", 7, Instant("first", 60.0)).seconds_left(Instant("second", 45.0))
        0.0
        """
        return max(self.expires.seconds - now.seconds, 0.0) if self.expires.boot == now.boot else 0.0


@dataclass(frozen=True)
class Upload:
    """What a client sent under a lease: chunks as they lie in memory, and the SHA-256 over all of them.

    Whoever makes one has checked the digest already; a journal checks it when it reads.
    """

    lease: bytes
    digest: bytes
    chunks: Sequence[bytes | memoryview] = field(repr=False)

    @classmethod
    def of(cls, lease: bytes, payload: bytes) -> Upload:
        """The upload of a payload in one piece."""
        return cls(lease, hashlib.sha256(payload).digest(), (payload,))

    @property
    def nbytes(self) -> int:
        """The length of the payload."""
        return sum(map(len, self.chunks))


class Outcome(StrEnum):
    """What became of an upload. The first two are acknowledged: it is durable, and counts once."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    LATE = "late"
    UNKNOWN = "unknown"

    @property
    def acknowledged(self) -> bool:
        """Whether the client may forget the upload."""
        return self in (Outcome.ACCEPTED, Outcome.DUPLICATE)


@dataclass(frozen=True)
class Accepted:
    """An accepted upload, read back; ``position`` counts those of its window from 1, in the order of acceptance.

    ``seconds`` is how long after its lease was given it was accepted, where that is known.
    """

    round: int
    task: Task
    position: int
    client: int
    lease: bytes
    payload: bytes = field(repr=False)
    seconds: float | None = None


class Journal(Protocol):
    """An open journal. Any thread may call it; what gives a Future returns at once, and the Future is done when all is
    durable. Many share one commit. ``asyncio.wrap_future`` waits for it in an event loop.

    Raises:
        Busy: by any of them, when somebody else holds the storage for too long, or too much is waiting.
        StorageError: the disk is full, or not ours to write; whatever was acknowledged is safe.
    """

    def claim(self) -> int:
        """A new epoch, higher than all before: from now on, who writes windows under an older one is fenced."""
        ...

    def open_round(self, epoch: int, round: int, task: Task, plan: str) -> RoundRecord:
        """Open a window, or find it open with the same plan.

        Raises:
            Fenced, WrongState: a later epoch was claimed; the window is there already, otherwise than asked for.
        """
        ...

    def advance(self, epoch: int, round: int, task: Task, state: State, reason: str = "") -> RoundRecord:
        """The window in its next state; to say so twice is no error.

        Raises:
            Fenced, WrongState: a later epoch was claimed; the window cannot come to that state from where it is.
        """
        ...

    def rounds(self) -> list[RoundRecord]:
        """The windows, by round and task; long retired ones are forgotten."""
        ...

    def record(self, round: int, task: Task) -> RoundRecord:
        """One window.

        Raises:
            WrongState: it was never opened, or is forgotten.
        """
        ...

    def lease(
        self, round: int, task: Task, client: int, seconds: float, most: int | None = None
    ) -> Future[Lease | None]:
        """A lease of that many seconds, or the living one that the client has; ``None`` where the window is not open,
        or the client's upload has been accepted.

        With ``most`` the open windows of a task are seen as one: at most so many clients have a living lease in any of
        them, and a client that has one is given that one.
        """
        ...

    def renew(self, lease: bytes, seconds: float) -> Future[Lease | None]:
        """The lease with ``seconds`` from now on, or ``None``: an upload under it would not be accepted any more."""
        ...

    def accept(self, upload: Upload) -> Future[Outcome]:
        """What becomes of the upload: see :func:`judge`."""
        ...

    def end(self, lease: bytes, *, late: bool) -> Future[None]:
        """Note that a visit has ended now and brought nothing: its client was told so, or its update was refused or
        came too ``late``. What is accepted under the lease afterwards counts all the same; of several endings the first
        is kept, and one that was late before all others. One that is noted after the machine was started anew is not.
        """
        ...

    def over(self, task: Task, after: Instant | None, until: Instant) -> list[LeaseRecord]:
        """The leases that brought nothing, and came to an end (:func:`ends_of`) after one moment (``None``: at any) and
        not after another.
        """
        ...

    def now(self) -> Instant:
        """What time it is by the clock that leases are measured by."""
        ...

    def find(self, lease: bytes) -> LeaseRecord | None:
        """A lease that was given out, and the digest of what was accepted under it; ``None`` for an unknown one."""
        ...

    def accepted(self, round: int, task: Task, after: int = 0) -> Iterator[Accepted]:
        """The uploads of a window at positions beyond ``after``, in order, each checked and read when it is asked for.

        Raises:
            DamagedRecord, WrongState: one is not what was accepted; the window is unknown or retired.
        """
        ...

    def retire(self, epoch: int, through: int) -> None:
        """Let go of the uploads of all rounds up to ``through``: a checkpoint on disk holds what came of them.

        Raises:
            Fenced, WrongState: a later epoch was claimed; one of these windows is still open or closed.
        """
        ...

    def close(self) -> None:
        """Commit what waits, and let go of all files and connections; a second time is no error."""
        ...


class JournalFactory(Protocol):
    """The seam of a journal plugin: a frozen dataclass of settings that opens the journal of a federation."""

    def open(self, folder: Path, federation: str, clock: Clock | None = None) -> Journal:
        """The journal of ``federation``, made if it is not there; many processes may have it open.

        ``folder`` is the run's place for it; one that lies elsewhere needs none. ``clock`` is what leases are measured
        by, when it is not the journal's own.

        Raises:
            JournalError: the journal is damaged, another federation's, or of another format.
        """
        ...


@dataclass(frozen=True)
class LeaseRecord:
    """A lease, the digest of the upload accepted under it, and whether a newer one has taken its place.

    ``ended`` is when its upload was accepted, or when it was noted that nothing comes of it, ``late`` or otherwise.
    """

    lease: Lease
    digest: bytes | None = None
    replaced: bool = False
    ended: Instant | None = None
    late: bool = False


def judge(digest: bytes, held: LeaseRecord | None, state: State, now: Instant) -> Outcome:
    """What becomes of an upload with this digest under a lease in a window that is in this state: the one rule that
    every journal follows, inside of the transaction that makes it true.
    """
    if held is None:
        return Outcome.UNKNOWN
    if held.digest is not None:
        return Outcome.DUPLICATE if held.digest == digest else Outcome.CONFLICT
    return Outcome.ACCEPTED if lives(held, state, now) else Outcome.LATE


def lives(held: LeaseRecord, state: State, now: Instant) -> bool:
    """Whether a first upload under this lease would be accepted."""
    return state == "open" and held.digest is None and not held.replaced and held.lease.seconds_left(now) > 0


def between(moment: Instant, after: Instant | None, until: Instant) -> bool:
    """Whether a moment lies after one and not after another. One of an earlier start of the machine lies before all of
    a later one.

    >>> between(Instant("first", 60.0), Instant("first", 50.0), Instant("first", 60.0))
    True
    >>> between(Instant("first", 60.0), Instant("first", 50.0), Instant("second", 1.0))
    True
    >>> between(Instant("first", 60.0), Instant("second", 1.0), Instant("second", 2.0))
    False
    """
    if moment.boot == until.boot:
        return moment.seconds <= until.seconds and (
            after is None or after.boot != moment.boot or moment.seconds > after.seconds
        )
    return after is None or (after.boot == moment.boot and moment.seconds > after.seconds)


def ends_of(held: LeaseRecord) -> list[Instant]:
    """When a lease that brought nothing came to an end: when it expired, and when that was noted, which may be later;
    no expiry where it was noted before.
    """
    noted, expired = held.ended, held.lease.expires
    if noted is None:
        return [expired]
    return [expired, noted] if noted.boot == expired.boot and noted.seconds > expired.seconds else [noted]


def check_open(record: RoundRecord, plan: str) -> None:
    """Raise :class:`WrongState` unless the window is open, and with this plan."""
    if (record.state, record.plan) != ("open", plan):
        raise WrongState(
            f"round {record.round} ({record.task}) is there already: {record.state}, with plan {record.plan[:12]!r}, "
            f"and it was to be opened with plan {plan[:12]!r}; go on with the round that the journal has"
        )


def check_advance(record: RoundRecord, state: State) -> bool:
    """Whether there is a step to make; ``False`` when the window is in that state already.

    Raises:
        WrongState: the step is not allowed.
    """
    if record.state == state:
        return False
    if record.state not in BEFORE[state]:
        raise WrongState(
            f"round {record.round} ({record.task}) is {record.state}, and cannot become {state}; only a window that is "
            f"{' or '.join(BEFORE[state]) or 'new'} can. Read the window again before going on"
        )
    return True


def check_retirable(records: Sequence[RoundRecord], through: int) -> None:
    """Raise :class:`WrongState` if one of the windows up to that round has not come to its end."""
    going_on = [record for record in records if record.round <= through and record.state in ("open", "closed")]
    if going_on:
        first = going_on[0]
        raise WrongState(
            f"round {first.round} ({first.task}) is still {first.state}: its uploads cannot be let go of; commit or "
            f"abandon it first"
        )


def check_epoch(epoch: int, newest: int) -> None:
    """Raise :class:`Fenced` unless ``epoch`` is the newest."""
    if epoch != newest:
        raise Fenced(
            f"this table process has epoch {epoch}, but epoch {newest} has been claimed since: another table process "
            f"serves this federation, and this one must stop"
        )


def unknown_window(round: int, task: Task) -> WrongState:
    """The error for a window that is not there."""
    return WrongState(f"round {round} ({task}) was never opened, or was retired long ago and is forgotten")


def wait(
    journal: Journal, round: int, task: Task, after: int, seconds: float, pause: Callable[[float], Any] = time.sleep
) -> RoundRecord:
    """The window as soon as it has more than ``after`` uploads or is not open any more, or after ``seconds``.

    It looks again after 1 ms at first, and every 20 ms later on: nothing can be missed, whoever is killed. A ``pause``
    that is told of news may end before its seconds are over.
    """
    until, step = time.monotonic() + seconds, 0.001
    while True:
        record = journal.record(round, task)
        left = until - time.monotonic()
        if record.accepted > after or record.state != "open" or left <= 0:
            return record
        pause(min(step, left))
        step = min(2 * step, 0.02)
