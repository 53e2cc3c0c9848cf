"""OpenWindows: the rounds that are open, as the journal and the files of windows have it, and what leases are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedtower.core.journal import Lease, RoundRecord, Task
from fedtower.core.registry import Registry
from fedtower.plugins.transports.grpc.artefact_store import ArtefactStore
from fedtower.plugins.transports.grpc.checks import Expected, expected_of
from fedtower.plugins.transports.grpc.windows import Window, read_window

Key = tuple[int, Task]


@dataclass(frozen=True)
class Open:
    """A window that is open, as an intake uses it."""

    window: Window
    expected: Expected


@dataclass
class OpenWindows:
    """What one process knows of them; :meth:`take` and then :meth:`opened` bring it up to date."""

    folder: Path
    federation: str
    registry: Registry
    artefacts: ArtefactStore
    records: Sequence[RoundRecord] = field(default=(), init=False)
    """All windows of the journal, as they were taken last."""
    _held: dict[Key, Open] = field(default_factory=dict, init=False, repr=False)
    _leases: dict[bytes, tuple[int, Task, int]] = field(default_factory=dict, init=False, repr=False)

    def take(self, records: Sequence[RoundRecord]) -> list[Key]:
        """The windows of the journal as they stand; those that are open no more."""
        self.records = records
        wanted = self._wanted()
        gone = sorted(self._held.keys() - wanted)
        for key in gone:
            del self._held[key]
        if gone:
            self._leases = {lease: held for lease, held in self._leases.items() if held[:2] in wanted}
        return gone

    def opened(self) -> Iterator[Window]:
        """The windows that had opened by then, each once and as soon as it is held.

        Raises:
            CheckpointError: a window's file is damaged.
        """
        for key in sorted(self._wanted() - self._held.keys()):
            held = self._read(*key)
            if held is not None:
                self._held[key] = held
                yield held.window

    def get(self, round: int, task: Task) -> Open | None:
        """A window, if it is open."""
        return self._held.get((round, task))

    def windows(self) -> list[Window]:
        """Those that are open, in order."""
        return [self._held[key].window for key in sorted(self._held)]

    def newest(self) -> list[RoundRecord]:
        """The newest window of each task, open or not."""
        return list({record.task: record for record in self.records}.values())

    def lease(self, lease: bytes) -> tuple[int, Task, int] | None:
        """The round, task and client of a lease, if it was noted here and its window is open."""
        return self._leases.get(lease)

    def note(self, lease: Lease) -> tuple[int, Task, int]:
        """The same of a lease that the journal has, to be known from now on."""
        held = (lease.round, lease.task, lease.client)
        if held[:2] in self._held:  # those of rounds that are over would never be forgotten
            self._leases[lease.id] = held
        return held

    def _wanted(self) -> set[Key]:
        return {(record.round, record.task) for record in self.records if record.state == "open"}

    def _read(self, round: int, task: Task) -> Open | None:
        """A window with what it is held to; nothing where the table process has been quicker, and taken files away."""
        window = read_window(self.folder / "windows", round, task)
        if window is None:
            return None
        try:
            return Open(window, expected_of(window, self.artefacts, self.federation, self.registry))
        except FileNotFoundError:
            return None
