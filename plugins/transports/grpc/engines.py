"""Engines: the graphs of a bundle, opened once for all devices that live in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock

from fedtower.core.plan import FloatArray, LocalSettings, Plan
from fedtower.core.runtime import Work
from fedtower.core.updates import Updates
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.device import BundleScorer, DeviceRuntime, Format


@dataclass
class Engines:
    """Opens runtimes; those of the newest bundle stay. A process with one device needs one, a swarm shares one too.

    An engine does one thing at a time, so :meth:`alone` is held while it works.
    """

    format: Format
    _held: dict[tuple[str, LocalSettings], DeviceRuntime] = field(default_factory=dict, repr=False)
    _scorers: dict[str, BundleScorer] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)
    _turn: RLock = field(default_factory=RLock, repr=False)

    def runtime(self, bundle: Bundle, local: LocalSettings) -> InTurns:
        """The runtime of a bundle and a visit."""
        with self._lock:
            key = (bundle.digest, local)
            if key not in self._held:
                self._held = {other: held for other, held in self._held.items() if other[0] == bundle.digest}
                self._held[key] = DeviceRuntime(bundle, local, self.format)
            return InTurns(self._held[key], self)

    def scorer(self, bundle: Bundle, newer: Mapping[str, FloatArray]) -> BundleScorer:
        """What scores with a bundle and newer parameters; :meth:`alone` is held while it does."""
        with self._lock:
            if bundle.digest not in self._scorers:
                self._scorers = {bundle.digest: BundleScorer(bundle, self.format)}
            return self._scorers[bundle.digest].updated(newer)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else's graph runs meanwhile."""
        with self._turn:
            yield


@dataclass(frozen=True)
class InTurns:
    """A runtime that devices of one process use in turns."""

    runtime: DeviceRuntime
    engines: Engines

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """What the runtime makes of a visit."""
        with self.engines.alone():
            return self.runtime.train(plan, work)
