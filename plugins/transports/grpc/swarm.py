"""Swarm: many devices in one process, each with its shard, its token, its folder and its calls, in a thread of its own.

They share lines to the server and an engine. How they fare is counted, and said every now and then in one line.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import grpc

from fedtower.core.errors import FedtowerError
from fedtower.plugins.transports.grpc.device import Device
from fedtower.plugins.transports.grpc.vanishing import Vanished, VanishingDevice

EVERY_SECONDS = 5.0
_START_SECONDS = 0.002  # a device: they do not all call in the same moment
_STACK_BYTES = 512 << 10


class Stopped(Exception):
    """The swarm was told to end."""


@dataclass
class Tally:
    """What the devices of a swarm are doing, and what has come of it."""

    devices: int
    working: set[int] = field(default_factory=set)
    away: int = 0
    over: int = 0
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    vanished: Counter[str] = field(default_factory=Counter)
    failed: list[FedtowerError] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else counts meanwhile."""
        with self._lock:
            yield

    def told(self, client: int, word: str, values: Mapping[str, Any]) -> None:
        """Count what a device says."""
        with self._lock:
            if word == "task":
                self.working.add(client)
                return
            self.working.discard(client)
            if word == "done":
                self.done[str(values["task"])] += 1
            elif word in ("refused", "failed", "round over"):
                self.refused[str(values.get("reason", word)) if word == "refused" else word] += 1

    def counts(self) -> dict[str, Any]:
        """How they fare, for programs."""
        with self._lock:
            busy = len(self.working) + self.away + self.over + len(self.failed)
            return {
                "devices": self.devices,
                "waiting": self.devices - busy,
                "working": len(self.working),
                "away": self.away,
                "over": self.over,
                "failed": len(self.failed),
                "done": dict(self.done),
                "refused": dict(self.refused),
                "vanished": dict(self.vanished),
            }

    def line(self) -> str:
        """How they fare, in one line."""
        counts = self.counts()
        now = [f"{counts[word]} {word}" for word in ("waiting", "working", "away", "over", "failed") if counts[word]]
        been = [f"{word}: {_listed(counts[word])}" for word in ("done", "refused", "vanished") if counts[word]]
        return "; ".join([f"{self.devices} devices: {', '.join(now)}", *been])


@dataclass
class Swarm:
    """Devices that run together."""

    devices: Sequence[Device]
    tally: Tally
    say: Callable[[Tally], None]
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def wait(self, seconds: float) -> None:
        """What a device of this swarm waits with. Raises Stopped when the swarm ends."""
        if self._stop.wait(seconds):
            raise Stopped

    def run(self, channels: Sequence[grpc.Channel], *, most_tasks: int | None = None) -> None:
        """Run them all to their end; they share the lines to the server out among them.

        Raises:
            KeyboardInterrupt: the swarm was interrupted; no device runs any more.
        """
        threading.stack_size(_STACK_BYTES)  # a thousand of them lie in memory
        with ThreadPoolExecutor(len(self.devices), "device") as threads:
            try:
                pairs = zip(self._one_by_one(), cycle(channels), strict=False)
                running = [threads.submit(self._live, device, line, most_tasks) for device, line in pairs]
                self._watch(running)
            except BaseException:
                self._stop.set()
                for channel in channels:  # whoever is in a call comes out of it
                    channel.close()
                raise
        for each in running:
            each.result()

    def _one_by_one(self) -> Iterator[Device]:
        for device in self.devices:
            yield device
            time.sleep(_START_SECONDS)

    def _watch(self, running: Sequence[Future[None]]) -> None:
        said: dict[str, Any] = {}
        while wait(running, EVERY_SECONDS).not_done:
            if (counts := self.tally.counts()) != said:
                self.say(self.tally)
            said = counts

    def _live(self, device: Device, channel: grpc.Channel, most_tasks: int | None) -> None:
        """One device, as often as it comes back."""
        try:
            while True:
                try:
                    device.run(channel, most_tasks=most_tasks)
                    break
                except Vanished as vanished:
                    self._be_away(device, vanished)
        except FedtowerError as error:
            device.said("gave up", {"kind": type(error).__name__, "message": str(error)})
            with self.tally.changing():
                self.tally.failed.append(error)
        except Stopped:
            pass
        except ValueError:  # a call on a line that was closed
            if not self._stop.is_set():
                raise
        else:
            with self.tally.changing():
                self.tally.over += 1

    def _be_away(self, device: Device, vanished: Vanished) -> None:
        assert isinstance(device, VanishingDevice)
        with self.tally.changing():
            self.tally.working.discard(device.fate.client)
            self.tally.away += 1
            self.tally.vanished[vanished.stage] += 1
        try:
            self.wait(device.fate.away_seconds())
        finally:
            vanished.come_back()
            with self.tally.changing():
                self.tally.away -= 1


def summary(failed: Sequence[FedtowerError], devices: int) -> str:
    """What went wrong, each kind once: its number, and what the first of them was told."""
    kinds = Counter(type(error).__name__ for error in failed)
    firsts = {kind: next(error for error in failed if type(error).__name__ == kind) for kind in kinds}
    lines = [f"{count} of {devices} devices ({kind}): {firsts[kind]}" for kind, count in kinds.most_common()]
    return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in Counter(counts).most_common())
