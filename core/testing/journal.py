"""What every journal promises."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest

from fedtower.core.errors import MissingDependency
from fedtower.core.journal import (
    Fenced,
    Instant,
    Journal,
    JournalFactory,
    Lease,
    LeaseRecord,
    Outcome,
    RoundRecord,
    State,
    Task,
    Upload,
    WrongState,
    wait,
)
from fedtower.core.testing.promises import Promises

STEPS: list[tuple[list[State], State]] = [
    ([], "closed"),
    ([], "abandoned"),
    (["closed"], "committed"),
    (["closed"], "abandoned"),
]
MISSTEPS: list[tuple[list[State], State]] = [
    ([], "committed"),
    (["closed"], "open"),
    (["closed", "committed"], "abandoned"),
    (["closed", "committed"], "closed"),
    (["abandoned"], "closed"),
    (["abandoned"], "committed"),
]


@dataclass
class HandClock:
    """A clock that stands still until it is told otherwise."""

    now: Instant = field(default_factory=lambda: Instant("first", 1_000.0))

    def __call__(self) -> Instant:
        return self.now

    def go_on(self, seconds: float) -> None:
        """Let time pass."""
        self.now = Instant(self.now.boot, self.now.seconds + seconds)

    def start_anew(self, boot: str) -> None:
        """Start the machine anew: its clock begins again."""
        self.now = Instant(boot, 1.0)


@dataclass
class Place:
    """Where one federation's journal is, and how it is opened there as often as one likes."""

    factory: JournalFactory
    folder: Path
    federation: str = field(default_factory=lambda: f"promises-{uuid4().hex}")
    clock: HandClock = field(default_factory=HandClock)

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """The journal, closed afterwards."""
        journal = self.factory.open(self.folder, self.federation, self.clock)
        try:
            yield journal
        finally:
            journal.close()


def leased(journal: Journal, client: int = 7, *, round: int = 1, task: Task = "train", seconds: float = 60.0) -> Lease:
    """A lease that must be given."""
    lease = journal.lease(round, task, client, seconds).result()
    assert lease is not None
    return lease


def sent(journal: Journal, lease: Lease, payload: bytes = b"an update") -> Outcome:
    """What becomes of a payload."""
    return journal.accept(Upload.of(lease.id, payload)).result()


def payloads(journal: Journal, round: int = 1, task: Task = "train", after: int = 0) -> list[bytes]:
    """What was accepted in a window."""
    return [upload.payload for upload in journal.accepted(round, task, after)]


class JournalPromises(Promises):
    """``make`` gives a journal's settings, with which it can be opened: what is tried is what they open."""

    def factory(self) -> JournalFactory:
        """The settings; where the example cannot be made the promise is skipped, and broken where ``CI`` is set."""
        try:
            made: JournalFactory = self.made()
        except MissingDependency as missing:
            if os.environ.get("CI"):
                pytest.fail(f"{missing}, and CI is set: every journal must be tried here")
            pytest.skip(str(missing))
        return made

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        """Where a new journal is."""
        return Place(self.factory(), tmp_path)

    @pytest.fixture
    def journal(self, place: Place) -> Iterator[Journal]:
        """A journal with round 1 open for training, by epoch 1."""
        with place.open() as journal:
            assert journal.claim() == 1
            journal.open_round(1, 1, "train", "plan")
            yield journal

    def test_what_was_accepted_comes_back_in_order(self, journal: Journal) -> None:
        leases = [leased(journal, client) for client in (5, 3, 9)]
        assert [sent(journal, lease, b"of %d" % lease.client) for lease in leases] == [Outcome.ACCEPTED] * 3
        found = list(journal.accepted(1, "train"))
        assert [(each.round, each.task, each.position) for each in found] == [(1, "train", at) for at in (1, 2, 3)]
        assert [each.payload for each in found] == [b"of 5", b"of 3", b"of 9"]
        assert [(each.client, each.lease) for each in found] == [(lease.client, lease.id) for lease in leases]
        assert payloads(journal, after=2) == [b"of 9"]
        assert journal.record(1, "train").accepted == 3

    @pytest.mark.parametrize("chunks", [[], [b""], [b"a", b"", b"bc"], [b"x" * 70_000] * 40, [b"y"] * 3_000])
    def test_a_payload_may_come_in_any_pieces(self, journal: Journal, chunks: list[bytes]) -> None:
        whole = b"".join(chunks)
        upload = Upload(leased(journal).id, Upload.of(b"", whole).digest, chunks)
        assert journal.accept(upload).result() is Outcome.ACCEPTED
        assert payloads(journal) == [whole]

    def test_the_same_upload_again_is_acknowledged_and_counts_once(self, journal: Journal) -> None:
        lease = leased(journal)
        outcomes = [journal.accept(Upload.of(lease.id, b"same")) for _ in range(3)]
        assert [outcome.result() for outcome in outcomes] == [Outcome.ACCEPTED, Outcome.DUPLICATE, Outcome.DUPLICATE]
        assert sent(journal, lease, b"same") is Outcome.DUPLICATE
        assert payloads(journal) == [b"same"]

    def test_another_upload_under_the_same_lease_is_refused(self, journal: Journal) -> None:
        lease = leased(journal)
        outcomes = [journal.accept(Upload.of(lease.id, payload)) for payload in (b"one", b"other")]
        assert [outcome.result() for outcome in outcomes] == [Outcome.ACCEPTED, Outcome.CONFLICT]
        assert sent(journal, lease, b"a third") is Outcome.CONFLICT
        assert payloads(journal) == [b"one"]

    def test_a_lease_that_was_never_given_is_unknown(self, journal: Journal) -> None:
        assert journal.accept(Upload.of(bytes(16), b"who am I")).result() is Outcome.UNKNOWN
        assert journal.renew(bytes(16), 60.0).result() is None
        assert payloads(journal) == []

    @pytest.mark.parametrize("state", ["closed", "abandoned"])
    def test_what_comes_after_the_window_is_late(self, journal: Journal, state: State) -> None:
        early, late = leased(journal, 1), leased(journal, 2)
        assert sent(journal, early) is Outcome.ACCEPTED
        journal.advance(1, 1, "train", state)
        assert sent(journal, late) is Outcome.LATE
        assert sent(journal, early) is Outcome.DUPLICATE
        assert payloads(journal) == [b"an update"]

    def test_what_comes_after_the_lease_is_late(self, journal: Journal, place: Place) -> None:
        lease = leased(journal, seconds=60.0)
        place.clock.go_on(59.0)
        kept = leased(journal, 8, seconds=60.0)
        place.clock.go_on(1.0)
        assert sent(journal, lease) is Outcome.LATE
        assert sent(journal, kept) is Outcome.ACCEPTED

    def test_a_new_start_of_the_machine_ends_all_leases(self, journal: Journal, place: Place) -> None:
        lease = leased(journal)
        place.clock.start_anew("second")
        assert sent(journal, lease) is Outcome.LATE
        assert leased(journal).id != lease.id

    def test_asking_again_gives_the_same_lease_while_it_lives(self, journal: Journal, place: Place) -> None:
        lease = leased(journal, seconds=60.0)
        place.clock.go_on(59.0)
        assert leased(journal) == lease
        assert leased(journal, 8) != lease
        place.clock.go_on(1.0)
        following = leased(journal)
        assert following.id != lease.id
        assert sent(journal, lease) is Outcome.LATE
        assert sent(journal, following) is Outcome.ACCEPTED

    def test_no_more_clients_than_allowed_have_a_lease_at_once(self, journal: Journal, place: Place) -> None:
        journal.open_round(1, 2, "train", "plan")
        journal.open_round(1, 2, "evaluate", "plan")
        asked = [journal.lease(1 + client % 2, "train", client, 60.0, most=3) for client in range(6)]
        first, second, third, *others = [future.result() for future in asked]
        assert first is not None
        assert second is not None
        assert third is not None
        assert others == [None, None, None]
        assert journal.lease(2, "evaluate", 5, 60.0, most=1).result() is not None, "another task has room of its own"
        assert sent(journal, first) is Outcome.ACCEPTED
        assert journal.lease(1, "train", 3, 30.0, most=3).result() is not None
        assert journal.lease(1, "train", 4, 60.0, most=3).result() is None
        place.clock.go_on(30.0)
        assert journal.lease(1, "train", 4, 60.0, most=3).result() is not None, "a lease that has run out takes no room"
        journal.advance(1, 1, "train", "closed")
        assert journal.lease(2, "train", 5, 60.0, most=3).result() is not None, "nor does one of a closed window"

    def test_who_works_from_an_older_window_is_given_that_lease_again(self, journal: Journal, place: Place) -> None:
        older = leased(journal)
        journal.open_round(1, 2, "train", "plan")
        assert journal.lease(2, "train", 7, 60.0, most=3).result() == older
        place.clock.go_on(60.0)
        newer = journal.lease(2, "train", 7, 60.0, most=3).result()
        assert newer is not None
        assert newer.round == 2

    def test_who_was_accepted_gets_no_other_lease_for_the_same_task(self, journal: Journal, place: Place) -> None:
        journal.open_round(1, 1, "evaluate", "plan")
        assert sent(journal, leased(journal)) is Outcome.ACCEPTED
        assert journal.lease(1, "train", 7, 60.0).result() is None
        place.clock.go_on(3600.0)
        assert journal.lease(1, "train", 7, 60.0).result() is None
        assert sent(journal, leased(journal, task="evaluate"), b"figures") is Outcome.ACCEPTED
        assert payloads(journal, task="evaluate") == [b"figures"]

    def test_a_lease_is_found_with_what_was_accepted_under_it(self, journal: Journal) -> None:
        given = leased(journal)
        assert journal.find(given.id) == LeaseRecord(given)
        sent(journal, given, b"an update")
        found = journal.find(given.id)
        assert found is not None
        assert found.digest == hashlib.sha256(b"an update").digest()
        assert journal.find(bytes(16)) is None

    def test_it_is_known_how_long_a_client_had_its_lease(self, journal: Journal, place: Place) -> None:
        lease, given = leased(journal), place.clock()
        place.clock.go_on(50.0)
        renewed = journal.renew(lease.id, 60.0).result()
        place.clock.go_on(20.0)
        assert (lease.given, renewed and renewed.given) == (given, given)
        assert sent(journal, lease) is Outcome.ACCEPTED
        assert [each.seconds for each in journal.accepted(1, "train")] == [70.0]
        assert journal.now() == place.clock()

    def test_a_lease_that_brought_nothing_is_told_of_when_it_ends(self, journal: Journal, place: Place) -> None:
        done, told, late, silent = (leased(journal, client) for client in range(4))
        begun = journal.now()
        place.clock.go_on(10.0)
        assert sent(journal, done) is Outcome.ACCEPTED
        journal.end(told.id, late=False).result()
        journal.end(done.id, late=False).result()
        journal.end(bytes(16), late=False).result()
        first = journal.now()
        place.clock.go_on(20.0)
        journal.advance(1, 1, "train", "closed")
        assert sent(journal, late) is Outcome.LATE
        journal.end(late.id, late=True).result()
        journal.end(told.id, late=False).result()
        second = journal.now()
        assert journal.over("train", begun, first) == [LeaseRecord(told, ended=first)]
        assert journal.over("train", first, second) == [LeaseRecord(late, ended=second, late=True)]
        assert journal.over("evaluate", None, second) == []
        place.clock.start_anew("second")
        assert journal.over("train", second, journal.now()) == [LeaseRecord(silent)]
        journal.end(silent.id, late=True).result()
        assert journal.over("train", journal.now(), journal.now()) == []
        assert {held.lease.client for held in journal.over("train", None, journal.now())} == {1, 2, 3}

    def test_who_is_told_of_again_after_its_lease_ran_out_ends_twice(self, journal: Journal, place: Place) -> None:
        lease = leased(journal, seconds=60.0)
        place.clock.go_on(60.0)
        first = journal.now()
        assert journal.over("train", None, first) == [LeaseRecord(lease)]
        place.clock.go_on(15.0)
        journal.end(lease.id, late=True).result()
        assert journal.over("train", None, first) == [LeaseRecord(lease, ended=journal.now(), late=True)]
        assert journal.over("train", first, journal.now()) == [LeaseRecord(lease, ended=journal.now(), late=True)]

    def test_a_window_that_is_not_open_gives_no_lease(self, journal: Journal) -> None:
        assert journal.lease(2, "train", 7, 60.0).result() is None
        assert journal.lease(1, "evaluate", 7, 60.0).result() is None
        journal.advance(1, 1, "train", "closed")
        assert journal.lease(1, "train", 7, 60.0).result() is None

    def test_a_renewed_lease_lives_longer_and_a_dead_one_stays_dead(self, journal: Journal, place: Place) -> None:
        lease = leased(journal, seconds=60.0)
        place.clock.go_on(50.0)
        renewed = journal.renew(lease.id, 60.0).result()
        assert renewed is not None
        assert renewed.seconds_left(place.clock()) == 60.0
        place.clock.go_on(59.0)
        assert leased(journal) == renewed
        place.clock.go_on(1.0)
        assert journal.renew(lease.id, 60.0).result() is None

    @pytest.mark.parametrize(("steps", "step"), STEPS)
    def test_a_window_goes_its_way(self, journal: Journal, steps: list[State], step: State) -> None:
        for each in steps:
            journal.advance(1, 1, "train", each)
        reached = journal.advance(1, 1, "train", step, "why")
        assert reached == RoundRecord(1, "train", step, 1, "plan", "why")
        assert journal.advance(1, 1, "train", step, "again") == reached == journal.record(1, "train")

    @pytest.mark.parametrize(("steps", "step"), MISSTEPS)
    def test_a_window_takes_no_other_way(self, journal: Journal, steps: list[State], step: State) -> None:
        for each in steps:
            journal.advance(1, 1, "train", each)
        before = journal.record(1, "train")
        with pytest.raises(WrongState, match="round 1"):
            journal.advance(1, 1, "train", step)
        assert journal.record(1, "train") == before

    def test_a_window_opens_once(self, journal: Journal) -> None:
        assert journal.open_round(1, 1, "train", "plan") == journal.record(1, "train")
        with pytest.raises(WrongState, match="other"):
            journal.open_round(1, 1, "train", "other plan")
        journal.advance(1, 1, "train", "closed")
        with pytest.raises(WrongState, match="closed"):
            journal.open_round(1, 1, "train", "plan")
        with pytest.raises(WrongState, match="never opened"):
            journal.record(2, "train")

    def test_an_older_table_process_is_fenced(self, journal: Journal, place: Place) -> None:
        with place.open() as later:
            assert later.claim() == 2
            for write in (
                lambda: journal.open_round(1, 2, "train", "plan"),
                lambda: journal.advance(1, 1, "train", "closed"),
                lambda: journal.retire(1, 0),
            ):
                with pytest.raises(Fenced, match="epoch 2"):
                    write()
            assert [record.state for record in journal.rounds()] == ["open"]
            assert later.advance(2, 1, "train", "closed").epoch == 2

    def test_another_process_sees_what_is_durable_here(self, journal: Journal, place: Place) -> None:
        lease = leased(journal)
        with place.open() as other:
            assert leased(other) == lease
            assert sent(other, lease) is Outcome.ACCEPTED
            assert sent(journal, lease) is Outcome.DUPLICATE
            assert payloads(journal) == payloads(other) == [b"an update"]
            other.advance(1, 1, "train", "closed")
        assert sent(journal, lease, b"more") is Outcome.CONFLICT
        assert journal.rounds() == [RoundRecord(1, "train", "closed", 1, "plan", accepted=1)]

    def test_what_was_acknowledged_is_there_when_it_is_opened_again(self, journal: Journal, place: Place) -> None:
        done, open_lease = leased(journal, 1), leased(journal, 2)
        sent(journal, done, b"kept")
        with place.open() as again:
            assert payloads(again) == [b"kept"]
            assert sent(again, done, b"kept") is Outcome.DUPLICATE
            assert leased(again, 2) == open_lease
            assert sent(again, open_lease, b"also") is Outcome.ACCEPTED
        with place.open() as again:
            assert payloads(again) == [b"kept", b"also"]
            assert again.claim() == 2

    def test_two_intakes_count_each_upload_once(self, journal: Journal, place: Place) -> None:
        uploads = [Upload.of(leased(journal, client).id, b"of %d" % client) for client in range(60)]
        with place.open() as other:
            futures = _at_once([journal, other], uploads)
            outcomes = [[future.result() for future in each] for each in futures]
        for pair in zip(*outcomes, strict=True):
            assert sorted(pair) == [Outcome.ACCEPTED, Outcome.DUPLICATE]
        assert sorted(payloads(journal)) == sorted(bytes(upload.chunks[0]) for upload in uploads)
        assert journal.record(1, "train").accepted == 60

    def test_two_intakes_give_a_client_one_lease(self, journal: Journal, place: Place) -> None:
        with place.open() as other:
            asked = [each.lease(1, "train", client, 60.0) for client in range(40) for each in (journal, other)]
            leases = [future.result() for future in asked]
        assert leases[::2] == leases[1::2]
        assert len({lease.id for lease in leases if lease is not None}) == 40

    def test_a_reader_waits_for_what_comes(self, journal: Journal, place: Place) -> None:
        assert wait(journal, 1, "train", 0, 0.0).accepted == 0
        lease = leased(journal)
        with place.open() as table:
            waiting: Future[RoundRecord] = _in_thread(lambda: wait(table, 1, "train", 0, 60.0))
            sent(journal, lease)
            assert waiting.result().accepted == 1
            closing: Future[RoundRecord] = _in_thread(lambda: wait(table, 1, "train", 1, 60.0))
            journal.advance(1, 1, "train", "closed")
            assert closing.result().state == "closed"

    def test_retired_uploads_are_gone_and_still_acknowledged(self, journal: Journal) -> None:
        lease = leased(journal)
        sent(journal, lease)
        with pytest.raises(WrongState, match="open"):
            journal.retire(1, 1)
        journal.open_round(1, 2, "train", "plan")
        following = leased(journal, round=2)
        sent(journal, following, b"of round 2")
        for state in ("closed", "committed"):
            journal.advance(1, 1, "train", state)
        assert payloads(journal) == [b"an update"]
        journal.retire(1, 1)
        journal.retire(1, 1)
        assert [record.retired for record in journal.rounds()] == [True, False]
        with pytest.raises(WrongState, match="checkpoint"):
            payloads(journal)
        assert sent(journal, lease) is Outcome.DUPLICATE
        assert payloads(journal, 2) == [b"of round 2"]

    def test_what_waits_is_committed_when_it_is_closed(self, place: Place) -> None:
        with place.open() as journal:
            journal.open_round(journal.claim(), 1, "train", "plan")
            leases = [journal.lease(1, "train", client, 60.0) for client in range(100)]
        ids = {lease.id for future in leases if (lease := future.result()) is not None}
        assert len(ids) == 100
        journal.close()

    def test_any_sequence_of_calls_does_what_a_plain_model_does(self) -> None:
        from fedtower.core.testing.journal_machine import run_machine

        memory = Path("/dev/shm")  # what is compared here is not whether a disk keeps its word
        with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            run_machine(self.factory(), Path(folder))


def _at_once(journals: list[Journal], uploads: list[Upload]) -> list[list[Future[Outcome]]]:
    """What all of them answer to all of the uploads, each asked in a thread of its own, from another end."""
    start = threading.Barrier(len(journals))

    def send(journal: Journal, at: int) -> list[Future[Outcome]]:
        start.wait()
        order = uploads if at % 2 == 0 else uploads[::-1]
        futures = [journal.accept(upload) for upload in order]
        return futures if at % 2 == 0 else futures[::-1]

    asked = [_in_thread(lambda journal=journal, at=at: send(journal, at)) for at, journal in enumerate(journals)]
    return [each.result() for each in asked]


def _in_thread(work: Any) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
