"""DeviceTimes: what visits took of their devices, told once each: in the report of the round in which they ended.

A visit begins when its lease is given. It ends when its update is accepted; when the device is told that nothing comes
of it, its update being late or refused; or, of a device that is never heard of again, when it was last heard of. What
is late comes after the report of its round, and is in the next one. The journal knows all of this; a file a round,
``ROUND-train.told``, says up to when it was told, so that a process that was killed tells the same again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.cohort import Cohort
from fedtower.core.journal import Accepted, Instant, Journal, LeaseRecord, between
from fedtower.core.transport import DeviceTime


@dataclass
class DeviceTimes:
    """The times of a run's training. A silent device is heard of ``lease_seconds`` before its lease runs out."""

    folder: Path
    journal: Journal
    lease_seconds: float
    _accepted: list[Accepted] = field(default_factory=list, init=False, repr=False)

    def note(self, accepted: Accepted) -> Accepted:
        """The same; it is of the round that is reported next."""
        self._accepted.append(replace(accepted, payload=b""))
        return accepted

    def spent(self, counted: Cohort) -> DeviceTime:
        """What visits took that were taken for this round, or brought nothing and ended since the report of the one
        before.
        """
        after, until = _told(self.folder, counted.round - 1), self._until(counted.round)
        over = self.journal.over("train", after, until)
        lost = sum(lost_seconds(held, self.lease_seconds, after, until) for held in over)
        late = sum(held.late and held.ended is not None and between(held.ended, after, until) for held in over)
        seconds = np.array([each.seconds or 0.0 for each in self._accepted])
        used = np.isin([each.client for each in self._accepted], counted.clients)
        self._accepted = []
        return DeviceTime(
            seconds=float(seconds.sum()) + lost, wasted=float(seconds[~used].sum()) + lost, late=int(late)
        )

    def _until(self, round: int) -> Instant:
        """Up to when this round tells; it says so once."""
        told = _told(self.folder, round)
        if told is None:
            told = self.journal.now()
            path = _path(self.folder, round)
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(asdict(told)), encoding="ascii")
                unfinished.replace(path)
        return told


def lost_seconds(held: LeaseRecord, lease_seconds: float, after: Instant | None, until: Instant) -> float:
    """The seconds of a visit that brought nothing, as far as they are to be told between two moments; none where it is
    not known when the lease was given.

    What was told when the lease had run out is not told again when more of its device is heard.
    """
    lease, seconds = held.lease, 0.0
    if lease.given is None:
        return seconds
    begun, heard = lease.given.seconds, max(lease.expires.seconds - lease_seconds, lease.given.seconds)
    if held.ended is None or held.ended.seconds > lease.expires.seconds:
        if between(lease.expires, after, until):
            seconds += heard - begun
        begun = heard
    if held.ended is not None and between(held.ended, after, until):
        seconds += held.ended.seconds - begun
    return seconds


def _path(folder: Path, round: int) -> Path:
    return folder / f"{round:06d}-train.told"


def _told(folder: Path, round: int) -> Instant | None:
    """Up to when a round has told; nothing if it has not, or a machine that stopped took it away."""
    try:
        values = json.loads(_path(folder, round).read_text(encoding="ascii"))
        return Instant(str(values["boot"]), float(values["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
