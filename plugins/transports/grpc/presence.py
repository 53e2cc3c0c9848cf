"""Presence: which clients have called lately. An intake writes it down, and the table process chooses among them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedtower.core.journal import Clock, since_boot
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


def present(folder: Path, within_seconds: float, clock: Clock = since_boot) -> IntArray:
    """The clients that called any intake within so many seconds, sorted; files that nobody writes any more go."""
    seen = _seen(folder, within_seconds, clock)
    for path, clients in seen:
        if not len(clients):
            path.unlink(missing_ok=True)
            path.with_suffix(".listening").unlink(missing_ok=True)
    return _distinct(seen)


def look(folder: Path, within_seconds: float, clock: Clock = since_boot) -> IntArray:
    """The same, for somebody who only looks: no file goes."""
    return _distinct(_seen(folder, within_seconds, clock))


def silent(folder: Path, clients: IntArray, seconds: float, clock: Clock = since_boot) -> IntArray:
    """Those of ``clients`` that have called no intake for so many seconds, although one listened all the while."""
    now, listened, heard = clock(), False, [np.zeros(0, dtype=np.int64)]
    for path in folder.glob("*.listening"):
        if path.name.rpartition("-")[0] != now.boot:
            path.unlink(missing_ok=True)
            continue
        try:
            times = json.loads(path.read_text(encoding="ascii"))
            held = np.load(path.with_suffix(".npy"), allow_pickle=False)
        except (OSError, ValueError):
            continue
        until = float(times["until"])
        if now.seconds - until > _GONE_SECONDS + seconds:
            path.unlink(missing_ok=True)  # of a process that has ended
        listened |= until - float(times["since"]) >= seconds and now.seconds - until <= _GONE_SECONDS
        heard.append(held[now.seconds - held[:, 1] <= seconds, 0].astype(np.int64))
    return np.setdiff1d(clients, np.concatenate(heard)) if listened else clients[:0]


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
