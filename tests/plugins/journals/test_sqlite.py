"""The SQLite journal: damage, full disks, locks, and what is left on the disk.

Its promises are among those of every installed part, in ``tests/conformance``.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtower.core.errors import StorageError
from fedtower.core.journal import Busy, DamagedRecord, Journal, JournalError, Outcome, Upload, since_boot
from fedtower.core.testing.journal import leased, payloads, sent
from fedtower.plugins.journals.sqlite.batches import commit
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.journals.sqlite.segments import HEADER_BYTES

Opened = Callable[..., Journal]
ROOT = Path(__file__).resolve().parents[3]
NO_DISK = 77  # of tests/recsys/forks.py


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens the journal of one folder, with round 1 open; all are closed in the end."""
    journals: list[Journal] = []

    def open_it(**settings: Any) -> Journal:
        journal = SQLite(**settings).open(tmp_path, "a federation")
        journals.append(journal)
        journal.open_round(journal.claim(), 1, "train", "plan")
        return journal

    yield open_it
    for journal in journals:
        journal.close()  # those that a test has closed as well


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def test_a_record_is_as_documented(tmp_path: Path, opened: Opened) -> None:
    journal = opened()
    lease = leased(journal)
    sent(journal, lease, b"abc")
    record = segments(tmp_path)[0].read_bytes()
    digest = bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # FIPS 180-2, B.1
    assert record[:4] == b"ftj1"
    assert record[8:] == (3).to_bytes(8, "big") + lease.id + digest + b"abc"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data, at: data[:at] + b"?" + data[at + 1 :], "does not have its SHA-256"),
        (lambda data, at: data[: at - 1] + b"?" + data[at:], "the header at byte 73 is not the one"),
        (lambda data, at: data[: at + 4], "of 9 bytes 4 are there"),
        (lambda data, at: data[: at - 10], "the header at byte 73"),
        (lambda data, at: None, "the file is gone"),
    ],
)
def test_a_damaged_record_is_named_and_those_before_it_are_read(
    tmp_path: Path, opened: Opened, harm: Callable[[bytes, int], bytes | None], said: str
) -> None:
    journal = opened()
    for client in (4, 5):
        sent(journal, leased(journal, client), b"update %d!" % (client % 2) if client else b"")
    (segment,) = segments(tmp_path)
    harmed = harm(segment.read_bytes(), 2 * HEADER_BYTES + 9)
    segment.unlink() if harmed is None else segment.write_bytes(harmed)
    uploads = journal.accepted(1, "train")
    if harmed is not None:
        assert next(uploads).payload == b"update 0!"
    with pytest.raises(DamagedRecord, match=said) as raised:
        list(uploads)
    client, position = (4, 1) if harmed is None else (5, 2)
    assert f"{segment}: the upload of client {client} in round 1 (train), at position {position}" in str(raised.value)
    assert "abandon the round" in str(raised.value)


def test_a_damaged_index_is_refused(tmp_path: Path, opened: Opened) -> None:
    opened().close()
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"not a database at all" * 500)
    with pytest.raises(DamagedRecord, match=r"index\.sqlite is damaged"):
        SQLite().open(tmp_path, "a federation")


def test_another_federations_journal_is_refused(tmp_path: Path, opened: Opened) -> None:
    opened()
    with pytest.raises(JournalError, match="of the federation 'a federation', not of 'another'"):
        SQLite().open(tmp_path, "another")


@pytest.mark.parametrize("pragma", ["user_version=3", "application_id=7"])
def test_another_format_is_refused(tmp_path: Path, opened: Opened, pragma: str) -> None:
    opened().close()
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        connection.execute(f"PRAGMA {pragma}")
    connection.close()
    with pytest.raises(JournalError, match="no journal of format 2"):
        SQLite().open(tmp_path, "a federation")


def test_a_journal_of_the_first_format_goes_on(tmp_path: Path, opened: Opened) -> None:
    before = opened()
    done, open_lease = leased(before, 1), leased(before, 2)
    sent(before, done, b"whole")
    before.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        for column in ("given", "ended", "late"):
            connection.execute(f"ALTER TABLE leases DROP COLUMN {column}")
        connection.execute("PRAGMA user_version=1")
    connection.close()
    journal = opened()
    assert [(each.payload, each.seconds) for each in journal.accepted(1, "train")] == [(b"whole", None)]
    assert leased(journal, 2) == replace(open_lease, given=None)
    assert sent(journal, open_lease, b"more") is Outcome.ACCEPTED
    assert leased(journal, 3).given is not None
    opened()  # a second time there is nothing to do


def test_a_torn_tail_is_cut_off_once_its_writer_is_gone(tmp_path: Path, opened: Opened) -> None:
    writer = opened()
    sent(writer, leased(writer), b"whole")
    (segment,) = segments(tmp_path)
    whole = segment.read_bytes()
    with segment.open("ab") as file:
        file.write(whole[:70])
    opened()
    assert segment.read_bytes() == whole + whole[:70]
    writer.close()
    assert payloads(opened()) == [b"whole"]
    assert segment.read_bytes() == whole


def test_what_is_on_its_way_to_the_index_is_not_cut_off(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(segment_bytes=1, delay_seconds=0.0)  # a segment for each batch
    leases = [leased(journal, client) for client in range(3)]
    three_prepared = threading.Event()

    def commit_after_somebody_opened_it(*arguments: Any) -> Any:
        assert three_prepared.wait(60)
        SQLite().open(tmp_path, "a federation").close()
        return commit(*arguments)

    monkeypatch.setattr("fedtower.plugins.journals.sqlite.journal.commit", commit_after_somebody_opened_it)
    waiting = []
    for lease in leases:
        waiting.append(journal.accept(Upload.of(lease.id, b"of %d" % lease.client)))
        while len(segments(tmp_path)) < len(waiting):
            assert not waiting[0].done()
    three_prepared.set()
    assert [future.result() for future in waiting] == [Outcome.ACCEPTED] * 3
    assert payloads(journal) == [b"of 0", b"of 1", b"of 2"]


def test_files_that_the_index_does_not_have_are_removed(tmp_path: Path, opened: Opened) -> None:
    opened().close()
    (tmp_path / "segments" / "00000001.segment").write_bytes(b"begun, and then killed")
    journal = opened()
    assert not segments(tmp_path)
    assert sent(journal, leased(journal)) is Outcome.ACCEPTED
    assert payloads(journal) == [b"an update"]


def test_a_long_segment_is_followed_by_another(tmp_path: Path, opened: Opened) -> None:
    journal = opened(segment_bytes=1_000)
    sizes = [10, 2_000, 10, 10, 5_000]  # one is begun when the one before it is long, and not before it would be
    for client, size in enumerate(sizes):
        sent(journal, leased(journal, client), bytes(size))
    assert [path.stat().st_size > 2_000 for path in segments(tmp_path)] == [True, True]
    assert [len(payload) for payload in payloads(journal)] == sizes


def test_a_segment_stays_until_nothing_counts_in_it(tmp_path: Path, opened: Opened) -> None:
    journal = opened()
    journal.open_round(1, 2, "train", "plan")
    for round in (1, 2):
        sent(journal, leased(journal, round=round), b"of round %d" % round)
    journal.close()
    journal = SQLite().open(tmp_path, "a federation")
    for round, left in ((1, 1), (2, 0)):
        for state in ("closed", "committed"):
            journal.advance(1, round, "train", state)
        assert payloads(journal, round) == [b"of round %d" % round]
        journal.retire(1, round)
        assert len(segments(tmp_path)) == left
    journal.close()


def test_long_retired_rounds_are_forgotten(tmp_path: Path) -> None:
    journal = SQLite(keep_rounds=2).open(tmp_path, "a federation")
    epoch, leases = journal.claim(), []
    for round in range(1, 6):
        journal.open_round(epoch, round, "train", "plan")
        leases.append(leased(journal, round=round))
        sent(journal, leases[-1])
        for state in ("closed", "committed"):
            journal.advance(epoch, round, "train", state)
        journal.retire(epoch, round)
    assert [record.round for record in journal.rounds()] == [4, 5]
    outcomes = [sent(journal, lease) for lease in leases]
    assert outcomes == [*[Outcome.UNKNOWN] * 3, *[Outcome.DUPLICATE] * 2]
    journal.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process holds the database for writing."""
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print(1); input()"
    command = [sys.executable, "-c", program, str(folder / "index.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.communicate(b"\n")


def test_a_locked_database_is_waited_for_with_a_bound_and_nothing_is_lost(tmp_path: Path, opened: Opened) -> None:
    journal = opened(busy_seconds=0.2)
    first, second = leased(journal, 1), leased(journal, 2)
    sent(journal, first, b"before")
    upload = Upload.of(second.id, b"meanwhile")
    with locked(tmp_path):
        with pytest.raises(Busy, match="another process has held") as raised:
            journal.accept(upload).result()
        assert raised.value.seconds == 1.0
        with pytest.raises(Busy):
            journal.claim()
        assert payloads(journal) == [b"before"]
    assert payloads(journal) == [b"before"]
    assert journal.accept(upload).result() is Outcome.ACCEPTED
    assert payloads(journal) == [b"before", b"meanwhile"]


def test_an_event_loop_goes_on_while_the_journal_is_held_up(tmp_path: Path, opened: Opened) -> None:
    journal = opened(busy_seconds=60.0)
    uploads = [Upload.of(leased(journal, client).id, b"of %d" % client) for client in range(30)]

    async def send_all() -> list[Outcome]:
        with locked(tmp_path):
            waiting = [asyncio.wrap_future(journal.accept(upload)) for upload in uploads]
            for _ in range(100):  # it could not come to the end of these if accept() waited
                await asyncio.sleep(0)
            assert not any(each.done() for each in waiting)
        return list(await asyncio.gather(*waiting))

    assert asyncio.run(send_all()) == [Outcome.ACCEPTED] * 30
    assert len(payloads(journal)) == 30


def test_a_write_that_fails_is_not_acknowledged_and_the_next_begins_a_segment(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened()
    leases = [leased(journal, client) for client in range(3)]
    sent(journal, leases[0], b"before")
    with monkeypatch.context() as failing:
        failing.setattr(os, "fdatasync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(StorageError, match="the disk reports an error"):
            sent(journal, leases[1], b"never flushed")
    assert payloads(journal) == [b"before"]
    assert sent(journal, leases[1], b"again") is Outcome.ACCEPTED
    assert [path.stat().st_size for path in segments(tmp_path)] == [HEADER_BYTES + 6, HEADER_BYTES + 5]
    assert payloads(journal) == [b"before", b"again"]


def test_leases_are_measured_by_the_time_since_the_machine_was_started() -> None:
    def uptime() -> float:
        return float(Path("/proc/uptime").read_text("ascii").split()[0])

    before, now, after = uptime(), since_boot(), uptime()
    assert before <= now.seconds <= after + 0.01  # /proc has hundredths
    assert now.boot == since_boot().boot
    assert len(now.boot) == 36


# Each of these fills something else first: payloads, and the index with nothing but leases.
@pytest.mark.parametrize("what", ["payloads", "index"])
def test_a_full_disk_loses_nothing_acknowledged_and_is_left_behind(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-m", "tests.plugins.journals.full_disk", str(tmp_path), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == NO_DISK:
        missing = f"this process may not mount a file system ({done.stderr})"
        if os.environ.get("CI"):
            pytest.fail(f"{missing}, and CI is set: full disks must be tried here")
        pytest.skip(f"{missing}: run as root, or where user namespaces are allowed")
    assert done.returncode == 0, done.stderr
    *figures, first = done.stdout.split()
    accepted, refused, again = map(int, figures)
    assert first == {"payloads": ".segment", "index": ".sqlite"}[what]
    assert accepted > 20
    assert refused > 0
    assert again == refused
