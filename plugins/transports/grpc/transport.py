"""The transport ``grpc``: its settings, and the line that a deployed run goes over."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import grpc

from fedtower.core.cohort import Cohort, Sampler, among
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.journal import RoundRecord
from fedtower.core.plan import Plan
from fedtower.core.rows import IntArray, RowStore
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.transport import Asked, DeviceTime, Version, Visit
from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.bell import INTAKES, TABLE, Bell, ring
from fedtower.plugins.transports.grpc.bounds import CALL_BYTES
from fedtower.plugins.transports.grpc.buffered import Buffered
from fedtower.plugins.transports.grpc.plans import Messages, PublishedPlan, RowSource
from fedtower.plugins.transports.grpc.presence import look, present
from fedtower.plugins.transports.grpc.rates import RateSettings
from fedtower.plugins.transports.grpc.rows import LockedRows, serve_rows
from fedtower.plugins.transports.grpc.standing import counts_of, waiting_of
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.recsys.bundle import MANIFEST
from fedtower.recsys.evaluation import MetricSum, Role
from fedtower.recsys.line import Opening, Standing

_LONGEST_SOCKET = 100


@dataclass(frozen=True)
class Grpc:
    """Devices call over gRPC; the server chooses among those that have called lately."""

    wait_for: int = field(
        default=0,
        metadata={"help": "clients that must be there before a round; 0: cohort.size, or asynchronous.buffer"},
    )
    target: int = field(default=0, metadata={"help": "updates that end a round; 0: the cohort says"})
    quorum: float = field(default=1.0, metadata={"help": "share of the target that is enough at the deadline"})
    deadline_seconds: float = field(default=600.0, metadata={"help": "how long a round waits, unless a plugin decides"})
    evaluation_seconds: float = field(default=0.0, metadata={"help": "how long an evaluation waits; 0: as a round"})
    lease_seconds: float = field(default=120.0, metadata={"help": "how long a silent device is waited for"})
    heartbeat_seconds: float = field(default=15.0, metadata={"help": "how often a working device calls"})
    presence_seconds: float = field(default=30.0, metadata={"help": "who called so lately is there"})
    upload_mb: int = field(default=256, metadata={"help": "the largest update"})
    rates: RateSettings = field(
        default_factory=RateSettings, metadata={"help": "how often and how much one device may call"}
    )

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "lease_seconds", "heartbeat_seconds", "presence_seconds", "upload_mb"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"transport.{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.quorum <= 1 or min(self.wait_for, self.target, self.evaluation_seconds) < 0:
            raise RecipeError(
                f"transport.quorum must be above 0 and at most 1, and wait_for, target and evaluation_seconds not "
                f"negative; they are {self.quorum}, {self.wait_for}, {self.target} and {self.evaluation_seconds:g}"
            )
        if self.rates.bytes_burst < CALL_BYTES:
            raise RecipeError(
                f"transport.rates.bytes_burst must be at least {CALL_BYTES:,}, the bytes of one message, not "
                f"{self.rates.bytes_burst:,.0f}; transport.rates.bytes_per_second may be as small as you like"
            )
        if self.heartbeat_seconds >= self.lease_seconds:
            raise RecipeError(
                f"transport.heartbeat_seconds ({self.heartbeat_seconds:g}) must be less than transport.lease_seconds "
                f"({self.lease_seconds:g}): a device that works would lose its task"
            )

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """Raise RecipeError: these clients are on devices."""
        raise RecipeError(
            "transport.name = 'grpc' reaches devices: set mode = \"deployed\" (fedtower serve), or "
            "transport.name = 'in_process' to simulate"
        )

    def open(self, opening: Opening) -> GrpcLine:
        """The line to the devices of a federation.

        Raises:
            RecipeError: settings of a round that waits, for rounds that do not.
        """
        if opening.asynchronous is not None and (self.target or self.quorum != 1.0):
            raise RecipeError(
                "transport.target and transport.quorum are for rounds that wait, and [asynchronous] ones do not: leave "
                "them out; asynchronous.buffer says how many updates make a step"
            )
        return GrpcLine.of(self, opening)

    def standing(self, folder: Path, windows: Sequence[RoundRecord], cohort_size: int | None) -> Standing:
        """How a federation stands, as its files say."""
        return Standing(
            there=len(look(folder / "present", self.presence_seconds)),
            needed=self.wait_for or cohort_size or 1,
            open=waiting_of(folder / "windows", windows),
            counts=counts_of(folder),
        )


@dataclass(frozen=True)
class GrpcLine:
    """An open line: windows in the journal, and rows over a socket to the intakes."""

    settings: Grpc
    folder: Path
    side: TableSide
    rows: RowStore | None
    server: grpc.Server | None
    wait_for: int
    bell: Bell
    asynchronous: AsynchronousSettings | None = None
    keeps_time: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Grpc, opening: Opening) -> GrpcLine:
        """Publish the bundle, claim the journal, serve the rows."""
        terms = Terms(
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=settings.heartbeat_seconds,
            deadline_seconds=settings.deadline_seconds,
            quorum=settings.quorum,
            evaluation_seconds=settings.evaluation_seconds or None,
        )
        bell = Bell.hang(opening.folder / "bells", TABLE)
        side = TableSide(
            folder=opening.folder,
            journal=opening.journal,
            epoch=opening.journal.claim(),
            signer=opening.signer,
            template=_template(opening),
            terms=terms,
            said=opening.said,
            most_bytes=settings.upload_mb << 20,
            target=settings.target or None,
            pause=bell.wait,
        )
        for name in (MANIFEST, *opening.bundle.manifest.files):
            side.artefacts.put(name, (opening.bundle.path / name).read_bytes())
        rows = server = None
        if opening.rows is not None:
            rows = LockedRows.of(opening.rows)
            address = rows_address(opening.folder)
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)
            server = serve_rows(rows, address, side.current)
        most_wanted = opening.cohort_size if opening.asynchronous is None else opening.asynchronous.buffer
        wait_for = settings.wait_for or most_wanted or 1
        return cls(settings, opening.folder, side, rows, server, wait_for, bell, opening.asynchronous)

    @property
    def buffered(self) -> Buffered:
        """The windows of asynchronous rounds."""
        return Buffered(self.side)

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """The accepted updates of a cohort."""
        return self.side.exchange(plan, cohort, visit, draws, deadline)

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> Version:
        """A version that clients may work from, beside older ones."""
        return self.buffered.version(plan, cohort, asked)

    def spent(self, counted: Cohort) -> DeviceTime:
        """What visits that ended since the last report took of their devices."""
        return self.side.times.spent(counted)

    def choose(self, round: int, sampler: Sampler, draws: Draws) -> Cohort:
        """The cohort: as it was chosen before a kill, or out of those who called lately."""
        chosen = self.side.chosen(round)
        if chosen is None:
            there = self._those_there()
            chosen = there[among(sampler, there).sample(round, len(there), draws).clients]
        target = min(self.settings.target, len(chosen)) if self.settings.target else None
        return Cohort(round, chosen, int(chosen.max(initial=0)) + 1, target)

    def judged(self, plan: Plan, role: Role, visit: int | None = None) -> Mapping[str, MetricSum]:
        """Sums and counts over the devices that are there."""
        side = replace(self.side, template=replace(self.side.template, evaluation=_with(self.side, role, visit)))
        return side.judged(plan, self._those_there())

    def committed(self, round: int) -> None:
        """What came of a round is in the state."""
        if self.asynchronous is None:
            self.side.committed(round)
        else:
            self.buffered.committed()

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after a round."""
        if self.asynchronous is None:
            self.side.saved(round)
        else:
            self.buffered.saved(round)

    def trained(self) -> None:
        """Nobody need train any more."""
        if self.asynchronous is not None:
            self.buffered.trained()

    def finished(self, reason: str) -> None:
        """Devices that call are told that it is over."""
        (self.folder / "finished").write_text(reason, encoding="utf-8")
        ring(self.folder / "bells", INTAKES)

    def close(self) -> None:
        """End the server of rows, and close the journal."""
        if self.server is not None:
            self.server.stop(1.0).wait()
        self.bell.close()
        self.side.journal.close()

    def _those_there(self) -> IntArray:
        """The clients that called lately, once there are enough."""
        told = False
        while True:
            settings = self.settings
            there = present(self.folder / "present", settings.presence_seconds, 2 * settings.lease_seconds)
            if len(there) >= self.wait_for:
                return there
            if not told:
                self.side.said(f"waiting for {self.wait_for} devices; {len(there)} are there")
                told = True
            time.sleep(0.1)


def rows_address(folder: Path) -> str:
    """Where a federation's table process gives out rows: a socket's path must be short, so it may lie elsewhere."""
    path = folder.resolve() / "rows.sock"
    if len(str(path)) > _LONGEST_SOCKET:
        name = Artefact.of("", str(path).encode()).digest.hex()[:16]
        path = Path(tempfile.gettempdir()) / f"fedtower-{name}.sock"
    return f"unix:{path}"


def _template(opening: Opening) -> PublishedPlan:
    manifest = opening.bundle.manifest
    held = {name: (opening.bundle.path / name).read_bytes() for name in (MANIFEST, *sorted(manifest.files))}
    bundle, *files = (Artefact.of(name, data) for name, data in held.items())
    rows = manifest.rows
    return PublishedPlan(
        federation=opening.federation,
        run=opening.run,
        round=0,
        seed=opening.seed,
        bundle=bundle,
        files=tuple(files),
        parameters=(),
        local=opening.local,
        rows=() if rows is None else (RowSource(rows.source, rows.num_rows, rows.width),),
        transforms=opening.transforms,
        norm_bound=opening.max_norm or 0.0,
        evaluation=opening.evaluation,
        messages=None if opening.download is None else Messages(opening.download),
    )


def _with(side: TableSide, role: Role, visit: int | None) -> dict[str, object]:
    return {**side.template.evaluation, "role": role, **({} if visit is None else {"visit": visit})}
