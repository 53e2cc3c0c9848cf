"""The PostgreSQL journal on a real server, which is killed, away, locked, and shared by intakes.

Its promises are among those of every installed part, in ``tests/conformance``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedtower.core.journal import Busy, DamagedRecord, Fenced, Journal, JournalError, Outcome, Upload
from fedtower.core.testing.journal import leased, payloads, sent
from tests.plugins.journals.intake import payload_of

if not os.environ.get("CI"):  # there, what is missing is an error
    pytest.importorskip("psycopg", reason="the extra postgresql is not installed")

import psycopg

from fedtower.plugins.journals.postgresql.journal import PostgreSQL
from fedtower.plugins.journals.postgresql.server import Server
from tests.plugins.journals.own_server import own_server

PROGRAM = Path(__file__).with_name("intake.py")
UPLOADS = 10_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this file's own: it is ended and started again."""
    with own_server("two intakes must be tried here") as server:
        yield server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A federation of the test's own."""
    return str(request.node.name)


@pytest.fixture
def journal(server: Server, name: str) -> Iterator[Journal]:
    """Its journal, with round 1 open by epoch 1."""
    journal = PostgreSQL(server.dsn).open(Path(), name)
    journal.open_round(journal.claim(), 1, "train", "plan")
    yield journal
    journal.close()


def schema(server: Server, name: str) -> psycopg.Connection[tuple[object, ...]]:
    """A connection of somebody else's, who looks into the tables of a federation."""
    connection = psycopg.connect(server.dsn, autocommit=True)
    names = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'fedtower_%'").fetchall()
    for (each,) in names:
        connection.execute("SELECT set_config('search_path', %s, false)", (each,))
        if connection.execute("SELECT id FROM federation").fetchone() == (name,):
            return connection
    raise LookupError(name)


def test_the_server_may_be_killed_and_started_again(server: Server, journal: Journal) -> None:
    leases = [leased(journal, client) for client in range(300)]
    before = [journal.accept(Upload.of(lease.id, b"of %d" % lease.client)) for lease in leases[:100]]
    assert {future.result() for future in before} == {Outcome.ACCEPTED}
    on_their_way = [journal.accept(Upload.of(lease.id, b"of %d" % lease.client)) for lease in leases[100:]]
    server.stop(kill=True)
    server.start()
    # Whether one was committed before the kill or sent again after it, it counts once and is acknowledged.
    assert all(future.result().acknowledged for future in on_their_way)
    assert sorted(payloads(journal)) == sorted(b"of %d" % client for client in range(300))
    assert journal.claim() == 2


def test_a_server_that_stays_away_is_told_and_nothing_is_lost(server: Server, name: str) -> None:
    journal = PostgreSQL(server.dsn, busy_seconds=0.3).open(Path(), name)
    journal.open_round(journal.claim(), 1, "train", "plan")
    done, tried = leased(journal, 1), leased(journal, 2)
    sent(journal, done)
    server.stop()
    try:
        with pytest.raises(Busy, match="come back in 2 seconds") as raised:
            sent(journal, tried)
        assert raised.value.seconds == 2.0
        with pytest.raises(Busy):
            journal.rounds()
    finally:
        server.start()
    assert sent(journal, tried) is Outcome.ACCEPTED
    assert sent(journal, done) is Outcome.DUPLICATE
    journal.close()


def test_a_lock_is_waited_for_with_a_bound(server: Server, name: str) -> None:
    journal = PostgreSQL(server.dsn, busy_seconds=0.3).open(Path(), name)
    journal.open_round(journal.claim(), 1, "train", "plan")
    lease = leased(journal)
    with schema(server, name) as somebody, somebody.transaction():
        somebody.execute("LOCK TABLE rounds")
        with pytest.raises(Busy, match="somebody has held a lock"):
            sent(journal, lease)
    assert sent(journal, lease) is Outcome.ACCEPTED
    journal.close()


def test_a_lost_connection_is_made_again(server: Server, journal: Journal, name: str) -> None:
    with schema(server, name) as somebody:
        for client in range(3):
            ended = somebody.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'fedtower'"
            ).fetchone()
            assert ended is not None
            assert sent(journal, leased(journal, client)) is Outcome.ACCEPTED
    assert journal.record(1, "train").accepted == 3


def test_a_commit_is_on_the_disk_whatever_the_server_is_set_to(server: Server, name: str) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as somebody:
        somebody.execute("ALTER ROLE fedtower SET synchronous_commit = off")
    try:
        journal = PostgreSQL(server.dsn).open(Path(), name)
        found = [
            database.transaction(lambda cursor: cursor.execute("SHOW synchronous_commit").fetchone())
            for database in (journal._writer, journal._reader)
        ]
        journal.close()
    finally:
        with psycopg.connect(server.dsn, autocommit=True) as somebody:
            somebody.execute("ALTER ROLE fedtower RESET synchronous_commit")
    assert found == [("on",), ("on",)]


def test_a_damaged_payload_is_named_and_those_before_it_are_read(server: Server, journal: Journal, name: str) -> None:
    for client in (4, 5):
        sent(journal, leased(journal, client))
    with schema(server, name) as somebody:
        somebody.execute("UPDATE uploads SET payload = 'another' WHERE client = 5")
    uploads = journal.accepted(1, "train")
    assert next(uploads).client == 4
    with pytest.raises(DamagedRecord, match=r"the upload of client 5 in round 1 \(train\), at position 2"):
        next(uploads)


def test_a_journal_of_the_first_format_goes_on(server: Server, journal: Journal, name: str) -> None:
    done, open_lease = leased(journal, 1), leased(journal, 2)
    sent(journal, done, b"whole")
    journal.close()
    with schema(server, name) as somebody:
        somebody.execute("ALTER TABLE leases DROP COLUMN given, DROP COLUMN ended, DROP COLUMN late")
        somebody.execute("UPDATE federation SET format = 1")
    again = PostgreSQL(server.dsn).open(Path(), name)
    try:
        assert [(each.payload, each.seconds) for each in again.accepted(1, "train")] == [(b"whole", None)]
        assert leased(again, 2) == replace(open_lease, given=None)
        assert sent(again, open_lease, b"more") is Outcome.ACCEPTED
        assert leased(again, 3).given is not None
    finally:
        again.close()


def test_another_format_is_refused(server: Server, journal: Journal, name: str) -> None:
    with schema(server, name) as somebody:
        somebody.execute("UPDATE federation SET format = 3")
    with pytest.raises(JournalError, match="a journal of format 3"):
        PostgreSQL(server.dsn).open(Path(), name)


def test_federations_in_one_database_do_not_see_each_other(server: Server, journal: Journal) -> None:
    other = PostgreSQL(server.dsn).open(Path(), "somebody else's")
    assert other.rounds() == []
    assert other.claim() == 1
    sent(journal, leased(journal))
    other.open_round(1, 1, "train", "plan")
    assert payloads(other) == []
    other.close()


def test_nobody_claims_an_epoch_while_an_older_one_is_writing(server: Server, journal: Journal, name: str) -> None:
    with schema(server, name) as somebody, ThreadPoolExecutor() as threads:
        with somebody.transaction():
            somebody.execute("SELECT * FROM rounds FOR UPDATE")
            # It has seen that its epoch is the newest, and waits for the round.
            older = threads.submit(journal.advance, 1, 1, "train", "closed")
            while somebody.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (1,):
                assert not older.done()
            hurried = PostgreSQL(server.dsn, busy_seconds=0.3).open(Path(), name)
            with pytest.raises(Busy):
                hurried.claim()
        assert older.result().state == "closed"
        assert hurried.claim() == 2
        hurried.close()
    with pytest.raises(Fenced):
        journal.advance(1, 1, "train", "committed")


def intake(server: Server, name: str, leases: list[tuple[int, str]], clients: list[int]) -> subprocess.Popen[str]:
    """An intake in a process of its own."""
    process = subprocess.Popen([sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    order = {
        "target": "fedtower.plugins.journals.postgresql.journal:PostgreSQL",
        "settings": {"dsn": server.dsn},
        "folder": "",
        "federation": name,
        "round": 1,
        "again": leases,
        "clients": clients,
    }
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return process


def test_two_intakes_claim_each_of_many_uploads_once(server: Server, journal: Journal, name: str) -> None:
    asked = [journal.lease(1, "train", client, 600.0) for client in range(UPLOADS)]
    leases = [(lease.client, lease.id.hex()) for future in asked if (lease := future.result()) is not None]
    # From both ends, so that they meet; both are sent everything.
    intakes = [intake(server, name, leases[::way], [0, 0]) for way in (1, -1)]
    said = [process.communicate()[0].splitlines() for process in intakes]
    assert [process.returncode for process in intakes] == [0, 0]
    outcomes = Counter(line.split()[-1] for lines in said for line in lines if line != "ready")
    every_third_twice = UPLOADS + len(range(0, UPLOADS, 3))
    assert outcomes == {"accepted": UPLOADS, "duplicate": 2 * every_third_twice - UPLOADS}
    by_both = [sum(line.endswith("accepted") for line in lines) for lines in said]
    assert min(by_both) > UPLOADS // 20, "one of them did all the work, so nothing was shown"
    found = list(journal.accepted(1, "train"))
    assert [upload.position for upload in found] == list(range(1, UPLOADS + 1))
    assert {upload.client for upload in found} == set(range(UPLOADS))
    assert all(upload.payload == payload_of(upload.client) for upload in found)


def test_killed_intakes_lose_nothing_acknowledged(server: Server, journal: Journal, name: str) -> None:
    leases: dict[int, str] = {}
    acknowledged: set[int] = set()
    for life in range(4):
        process = intake(server, name, list(leases.items())[-40:], [len(leases), len(leases) + 3_000])
        assert process.stdout is not None
        for _ in range(60 + 37 * life):
            hear(process.stdout.readline(), leases, acknowledged)
        process.kill()
        for line in process.stdout:
            hear(line, leases, acknowledged)
        process.communicate()
        assert process.returncode == -9
        found = {upload.client: upload for upload in journal.accepted(1, "train")}
        assert len(found) == journal.record(1, "train").accepted
        assert acknowledged <= set(found) <= set(leases)
        assert all(upload.payload == payload_of(client) for client, upload in found.items())
    assert len(acknowledged) > 100


def hear(line: str, leases: dict[int, str], acknowledged: set[int]) -> None:
    """Remember what an intake was promised."""
    words = line.split()
    if words[0] == "lease":
        assert leases.setdefault(int(words[1]), words[2]) == words[2]
    elif words != ["ready"]:
        assert words[2] == "duplicate" or int(words[0]) not in acknowledged
        acknowledged.add(int(words[0]))
