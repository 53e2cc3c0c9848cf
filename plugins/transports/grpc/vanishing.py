"""Vanishing: devices that are gone from one moment to the next, at any stage of a visit, and come back later.

A server that is tried with them meets what it will meet: a lease of which nobody speaks again, an upload that ends in
its middle, an update that was taken and whose device never heard of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event
from typing import Any, Literal, get_args

import grpc

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import FloatArray, LocalSettings
from fedtower.plugins.transports.grpc.caller import Caller, Leased, Over, upload_parts
from fedtower.plugins.transports.grpc.device import Device
from fedtower.plugins.transports.grpc.engines import Engines, InTurns
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.device import BundleScorer

Stage = Literal["check-in", "fetch", "training", "upload", "acknowledgement"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Where a device vanishes: with its lease, with all that it fetched, in training, in the middle of its upload, or when
all of it is sent and before it hears that it was taken.
"""


class Vanished(Exception):
    """A device is gone: it makes no call any more, and says no goodbye. ``lines`` are those that it leaves open."""

    def __init__(self, stage: Stage, lines: Iterable[Callable[[], Any]] = ()) -> None:
        super().__init__(f"vanished at the {stage}")
        self.stage = stage
        self._lines = tuple(lines)

    def come_back(self) -> None:
        """Hang up what was left open: the network has noticed by now."""
        for hang_up in self._lines:
            hang_up()


@dataclass(frozen=True)
class Vanishing:
    """How often devices vanish, as a share of their visits, and how long they are away on average.

    Raises:
        RecipeError: a share that is none, or no time at all.
    """

    share: float
    away_seconds: float
    draws: Draws

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0 or not self.away_seconds > 0.0:
            raise RecipeError(
                f"devices vanish in a share of their visits between 0 and 1, for more than 0 seconds; these are "
                f"{self.share:g} and {self.away_seconds:g}"
            )


@dataclass
class Fate:
    """Where one device vanishes in the visit that it makes, if it does."""

    vanishing: Vanishing
    client: int
    _visits: int = 0
    _stage: Stage | None = None

    def begin(self) -> None:
        """Another visit begins."""
        self._visits += 1
        vanishes = float(self._drawn("whether")) < self.vanishing.share
        self._stage = STAGES[int(len(STAGES) * self._drawn("where"))] if vanishes else None

    def at(self, stage: Stage, lines: Iterable[Callable[[], Any]] = ()) -> None:
        """Raise Vanished if this is where it happens."""
        if self.meets(stage):
            self._stage = None
            raise Vanished(stage, lines)

    def meets(self, stage: Stage) -> bool:
        """Whether this is where it happens."""
        return self._stage == stage

    def half(self) -> bool:
        """One of two things, by chance."""
        return self._drawn("half") < 0.5

    def away_seconds(self) -> float:
        """How long it is away this time: between a half and one and a half of the mean."""
        return self.vanishing.away_seconds * (0.5 + self._drawn("away"))

    def _drawn(self, purpose: str) -> float:
        return float(self.vanishing.draws.uniform(purpose, self.client, self._visits))


@dataclass(frozen=True)
class VanishingDevice(Device):
    """A device with a fate."""

    fate: Fate = field(kw_only=True)

    def caller(self, channel: grpc.Channel, chance: Random) -> Caller:
        """The device's end of the wire, which it lets go of."""
        return _VanishingCaller(channel, (), self.back_off, chance, self.wait, fate=self.fate)

    def engine(self) -> Engines:
        """The engine, in which it may be lost."""
        return _VanishingEngines(self.engines.format, shared=self.engines, fate=self.fate)


@dataclass(frozen=True)
class _VanishingCaller(Caller):
    fate: Fate = field(kw_only=True)

    def check_in(
        self, federation: str, capabilities: pb.Capabilities, model: bytes, num_examples: int
    ) -> Leased | Over:
        """A task; a visit begins with it."""
        leased = super().check_in(federation, capabilities, model, num_examples)
        if isinstance(leased, Leased):
            self.fate.begin()
            self.fate.at("check-in")
        return leased

    def submit(self, lease: bytes, path: Path, *, begun: bool = True) -> bool:
        """Send the update, or a part of it."""
        for stage in ("upload", "acknowledgement"):
            if self.fate.meets(stage):
                self.fate.at(stage, self._cut_off(lease, path, stage))
        return super().submit(lease, path, begun=begun)

    def _cut_off(self, lease: bytes, path: Path, stage: Stage) -> list[Callable[[], Any]]:
        """Begin an upload, and leave it: the first half of it, or all of it without waiting for the answer. Half of the
        lines break then, and the others fall silent until the device comes back.
        """
        sent, back = Event(), Event()
        parts = list(upload_parts(lease, path, 0))

        def some() -> Iterator[pb.SubmitPart]:
            yield from parts[:-1]
            data = parts[-1].data
            yield pb.SubmitPart(data=data[: len(data) // 2] if stage == "upload" else data)
            sent.set()
            if stage == "upload":
                back.wait()

        call = FederationStub(self.channel).Submit.future(
            some(), metadata=tuple(self.metadata), timeout=self.call_seconds
        )
        call.add_done_callback(lambda _: sent.set())  # the server may have refused it before
        sent.wait(self.call_seconds)

        def hang_up() -> None:
            call.cancel()
            back.set()

        if self.fate.half():
            hang_up()
        return [hang_up]


@dataclass
class _VanishingEngines(Engines):
    shared: Engines = field(kw_only=True)
    fate: Fate = field(kw_only=True)

    def runtime(self, bundle: Bundle, local: LocalSettings) -> InTurns:
        return InTurns(self.shared.runtime(bundle, local).runtime, self)

    def scorer(self, bundle: Bundle, newer: Mapping[str, FloatArray]) -> BundleScorer:
        return self.shared.scorer(bundle, newer)

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.fate.at("fetch")
        with self.shared.alone():
            yield
        self.fate.at("training")
