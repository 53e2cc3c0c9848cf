"""Presence: which clients have called lately. An intake writes it down, and the table process chooses among them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedtower.core.journal import Clock, Instant, since_boot
from fedtower.core.rows import IntArray

EVERY_SECONDS = 0.5
_GONE_SECONDS = 3.0  # without a word of an intake


@dataclass
class Presence:
    """Who called this intake, and when; written to a file of its own under ``folder`` every now and then.

    It is no promise and survives nothing: who is forgotten calls again.
    """

    folder: Path
    clock: Clock = since_boot
    _seen: dict[int, float] = field(default_factory=dict)
    _written: float = -np.inf
    _since: float | None = None

    def saw(self, client: int) -> None:
        """A client has called."""
        self._seen[client] = self.clock().seconds

    def left(self, client: int) -> None:
        """A client has been told that it is over: it calls no more."""
        self._seen.pop(client, None)

    def awaits(self, within_seconds: float) -> bool:
        """Whether anybody is there who called within so many seconds, and has not left."""
        now = self.clock().seconds
        return any(now - at <= within_seconds for at in self._seen.values())

    def write(self, *, within_seconds: float) -> None:
        """Write the clients down that called within so many seconds; not more often than every half second."""
        now = self.clock()
        if now.seconds - self._written < EVERY_SECONDS:
            return
        held = np.empty((len(self._seen), 2))  # of many thousands of clients, and nobody is answered meanwhile
        held[:, 0], held[:, 1] = list(self._seen), list(self._seen.values())
        gone = now.seconds - held[:, 1] > within_seconds
        for client in held[gone, 0].astype(np.int64).tolist():
            del self._seen[client]
        self._written = now.seconds
        if self._since is None:
            self._since = now.seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{now.boot}-{os.getpid()}.npy"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.save(file, held[~gone], allow_pickle=False)
        unfinished.replace(path)
        unfinished.write_text(json.dumps({"since": self._since, "until": now.seconds}), encoding="ascii")
        unfinished.replace(path.with_suffix(".listening"))


def present(folder: Path, within_seconds: float, keep_seconds: float = 0.0, clock: Clock = since_boot) -> IntArray:
    """The clients that called any intake within so many seconds, sorted; files that nobody has written for longer than
    that, and for ``keep_seconds``, go.
    """
    seen, now = _seen(folder, within_seconds, clock), clock()
    for path, clients in seen:
        if not len(clients) and _is_old(path.with_suffix(".listening"), now, keep_seconds):
            path.unlink(missing_ok=True)
            path.with_suffix(".listening").unlink(missing_ok=True)
    return _distinct(seen)


def look(folder: Path, within_seconds: float, clock: Clock = since_boot) -> IntArray:
    """The same, for somebody who only looks: no file goes."""
    return _distinct(_seen(folder, within_seconds, clock))


def silent(folder: Path, clients: IntArray, seconds: float, clock: Clock = since_boot) -> IntArray:
    """Those of ``clients`` that have called no intake, although one or another has listened for so many seconds up to
    now. Time in which none did does not count, and what those had heard that were killed since does.
    """
    now, spells, heard = clock(), list[tuple[float, float]](), [np.zeros((0, 2))]
    for path in folder.glob("*.listening"):
        try:
            since, until = _listened(path, now)
            held = np.load(path.with_suffix(".npy"), allow_pickle=False)
        except (OSError, ValueError, KeyError):
            continue  # taken away, or of a machine that was started anew
        spells.append((since, now.seconds if now.seconds - until <= _GONE_SECONDS else until))
        heard.append(held)
    begun = _listening_since(spells, now.seconds, seconds)
    if begun is None:
        return clients[:0]
    held = np.concatenate(heard)
    return np.setdiff1d(clients, held[held[:, 1] >= begun, 0].astype(np.int64))


def _listened(path: Path, now: Instant) -> tuple[float, float]:
    """From when until when an intake has listened. Raises ValueError for one of an earlier start of the machine."""
    if path.name.rpartition("-")[0] != now.boot:
        raise ValueError(f"{path} is of another start of the machine")
    times = json.loads(path.read_text(encoding="ascii"))
    return float(times["since"]), float(times["until"])


def _is_old(path: Path, now: Instant, seconds: float) -> bool:
    try:
        return now.seconds - _listened(path, now)[1] > seconds
    except (OSError, ValueError, KeyError):
        return True


def _listening_since(spells: Sequence[tuple[float, float]], now: float, seconds: float) -> float | None:
    """When the last so many seconds of listening began; nothing if there were fewer, or nobody listens now.

    >>> _listening_since([(0.0, 40.0), (50.0, 60.0)], now=60.0, seconds=15.0)
    35.0
    >>> _listening_since([(0.0, 40.0)], now=60.0, seconds=15.0) is None
    True
    """
    begun, left = now, seconds
    for since, until in sorted(spells, key=lambda spell: -spell[1]):
        if begun == now and until < now:
            return None
        end = min(until, begun)  # some listen at the same time
        if end - since >= left:
            return end - left
        if end > since:
            begun, left = since, left - (end - since)
    return None


def _seen(folder: Path, within_seconds: float, clock: Clock) -> list[tuple[Path, IntArray]]:
    """Each file, and the clients in it that called lately."""
    now, found = clock(), list[tuple[Path, IntArray]]()
    for path in folder.glob("*.npy"):
        boot = path.name.rpartition("-")[0]
        try:
            held = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            continue  # taken away, or of a process that was killed in the middle
        fresh = held[now.seconds - held[:, 1] <= within_seconds] if boot == now.boot else held[:0]
        found.append((path, fresh[:, 0].astype(np.int64)))
    return found


def _distinct(seen: list[tuple[Path, IntArray]]) -> IntArray:
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(clients for _, clients in seen)]))
