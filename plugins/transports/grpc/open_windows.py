"""OpenWindows: the rounds that are open, as the journal and the files of windows have it, and what leases are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedtower.core.journal import Journal, RoundRecord, Task
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
    """What one process knows of them; :meth:`look` brings it up to date."""

    folder: Path
    federation: str
    journal: Journal
    registry: Registry
    artefacts: ArtefactStore
    records: Sequence[RoundRecord] = field(default=(), init=False)
    """All windows of the journal, as they stood at the last look."""
    _held: dict[Key, Open] = field(default_factory=dict, init=False, repr=False)
    _leases: dict[bytes, tuple[int, Task, int]] = field(default_factory=dict, init=False, repr=False)

    def look(self) -> tuple[list[Window], list[Key]]:
        """The windows that have opened since the last look, and those that are open no more."""
        self.records = self.journal.rounds()
        wanted = {(record.round, record.task) for record in self.records if record.state == "open"}
        gone = sorted(self._held.keys() - wanted)
        for key in gone:
            del self._held[key]
        if gone:
            self._leases = {lease: held for lease, held in self._leases.items() if held[:2] in wanted}
        opened = [window for key in sorted(wanted - self._held.keys()) for window in self._opened(*key)]
        return opened, gone

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
        """The round, task and client of a lease, also of one that another process gave, or this one before a kill."""
        held = self._leases.get(lease)
        if held is None and (record := self.journal.find(lease)) is not None:
            held = (record.lease.round, record.lease.task, record.lease.client)
            if held[:2] in self._held:  # those of rounds that are over would never be forgotten
                self._leases[lease] = held
        return held

    def _opened(self, round: int, task: Task) -> list[Window]:
        window = read_window(self.folder / "windows", round, task)
        # Neither file is there any more if the table process has been quicker.
        if window is None or not self.artefacts.path(window.digest).is_file():
            return []
        self._held[round, task] = Open(window, expected_of(window, self.artefacts, self.federation, self.registry))
        return [window]
