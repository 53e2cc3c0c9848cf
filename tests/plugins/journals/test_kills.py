"""Intakes killed with SIGKILL at random moments: nothing acknowledged is lost, and nothing counts twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedtower.core.draws import Draws
from fedtower.core.journal import Journal, JournalFactory
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.journals.sqlite.segments import records, segment_path
from tests.plugins.journals.intake import payload_of

PROGRAM = Path(__file__).with_name("intake.py")
CLIENTS_A_LIFE = 2_000
LIVES_A_ROUND = 5


@dataclass
class Federation:
    """The table process's side, and the intakes that it sees die."""

    factory: JournalFactory
    settings: dict[str, object]
    folder: Path
    name: str = "to be killed"
    draws: Draws = field(default_factory=lambda: Draws(20))
    round: int = 0
    epoch: int = 0
    next_client: int = 0
    leases: dict[int, str] = field(default_factory=dict)
    acknowledged: dict[int, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        """An intake that first sends again what it does not know to be safe, and some of what it does."""
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        kind = type(self.factory)
        order = {
            "target": f"{kind.__module__}:{kind.__qualname__}",
            "settings": self.settings,
            "folder": str(self.folder),
            "federation": self.name,
            "round": self.round,
            "again": list(self.leases.items())[-60:],
            "clients": [self.next_client, self.next_client + CLIENTS_A_LIFE],
        }
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return process

    def live(self, life: int) -> None:
        """One intake, from its start to its end at a moment that is drawn."""
        before = dict(self.acknowledged)
        heard = int(self.draws.integers(160, "lines before the kill", life)) if life % 5 else 0
        delay = float(self.draws.uniform("delay of the kill", life)) * (0.01 if life % 5 else 0.5)
        process = self.start()
        try:
            assert process.stdout is not None
            for _ in range(heard):
                self.hear(process.stdout.readline(), before)
            time.sleep(delay)
        finally:
            process.kill()
        for line in process.stdout:  # what it said until then was said
            self.hear(line, before)
        process.communicate()
        assert process.returncode == -9

    def hear(self, line: str, before: dict[int, str]) -> None:
        """Remember what was promised; a promise of an earlier life must still hold."""
        assert line.endswith("\n"), "a line is written whole or not at all"
        if line == "ready\n":
            return
        words = line.split()
        if words[0] == "lease":
            client = int(words[1])
            assert self.leases.setdefault(client, words[2]) == words[2], "a client got two leases"
            assert client not in before, "an acknowledged client was asked again"
            self.next_client = max(self.next_client, client + 1)
            return
        client, lease, outcome = int(words[0]), words[1], words[2]
        assert outcome in ("accepted", "duplicate")
        assert outcome == "duplicate" or client not in before, "an upload counted twice"
        self.acknowledged[client] = lease

    def check(self, journal: Journal) -> None:
        """What the journal has is what was promised, and what was on its way when it ended."""
        found = list(journal.accepted(self.round, "train"))
        assert [upload.position for upload in found] == list(range(1, len(found) + 1))
        assert max(Counter(upload.client for upload in found).values(), default=1) == 1
        assert all(upload.payload == payload_of(upload.client) for upload in found)
        held = {upload.client: upload.lease.hex() for upload in found}
        assert held.items() >= self.acknowledged.items()
        assert held.items() <= self.leases.items()

    def next_round(self, journal: Journal) -> None:
        """Commit the round, let go of it, and open the next one."""
        if self.round:
            for state in ("closed", "committed"):
                journal.advance(self.epoch, self.round, "train", state)
            journal.retire(self.epoch, self.round)
        self.round, self.leases, self.acknowledged = self.round + 1, {}, {}
        self.epoch = journal.claim()
        journal.open_round(self.epoch, self.round, "train", "plan")


def agreed(folder: Path, journal: Journal) -> None:
    """Segments and index say the same, once the next one to open them has tidied up."""
    SQLite().open(folder, "to be killed").close()
    with journal._reader.read() as connection:  # type: ignore[attr-defined]
        extents = dict(connection.execute("SELECT number, extent FROM segments").fetchall())
        rows = connection.execute(
            "SELECT segment, offset, length, lease, digest FROM uploads JOIN leases ON id = lease"
        ).fetchall()
    segments = folder / "segments"
    assert {int(path.stem): path.stat().st_size for path in segments.iterdir()} == extents
    there = {
        (place.segment, place.offset, place.length, lease, digest)
        for number, extent in extents.items()
        for place, lease, digest in records(segment_path(segments, number), extent)
    }
    assert set(rows) <= there


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[tuple[Federation, Journal]]:
    """A federation with small segments, and the table process's journal."""
    settings = {"segment_bytes": 200_000}
    folder = tmp_path / "journal"
    journal = SQLite(**settings).open(folder, "to be killed")
    yield Federation(SQLite(), dict(settings), folder), journal
    journal.close()


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_nothing_acknowledged_is_lost_and_nothing_counts_twice(
    federation: tuple[Federation, Journal], kills: int
) -> None:
    killed, journal = federation
    promised = 0
    for life in range(kills):
        if life % LIVES_A_ROUND == 0:
            promised += len(killed.acknowledged)
            killed.next_round(journal)
        killed.live(life)
        killed.check(journal)
        agreed(killed.folder, journal)
    promised += len(killed.acknowledged)
    assert promised > 15 * kills, "too little was promised for this to show anything"
