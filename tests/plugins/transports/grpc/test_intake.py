"""The intake: a bad update of any kind gets a typed refusal and changes nothing; a good one is durable."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.journal import Fenced, Instant, Journal, Task
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.registry import Registry, discover
from fedtower.core.transport import Abandoned
from fedtower.core.updates import Rows, Updates, stack
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.signers.ed25519.signer import Ed25519Signer, make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.bell import Bell
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.intake import CHUNK_BYTES, Caller, Intake, Limits, RowsAway
from fedtower.plugins.transports.grpc.leased import remove_ended
from fedtower.plugins.transports.grpc.meters import Meters
from fedtower.plugins.transports.grpc.plans import PublishedPlan, RowSource, open_plan
from fedtower.plugins.transports.grpc.presence import Presence
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.rows import METHOD, LockedRows, _chunks, serve_rows
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.tensors import to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb

CLIENTS, PARAMETERS = 4, {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
TABLE = np.arange(40, dtype=np.float32).reshape(10, 4)
LOCAL = LocalSettings(steps=1)


class Table:
    """Rows that can be away."""

    generation, away = 0, False

    def fetch(self, source: str, ids: Any) -> Any:
        return TABLE[ids]

    def apply(self, deltas: Any, lr_scale: float) -> None:
        raise AssertionError("nobody steps here")

    def snapshot(self) -> Any:
        return {}

    def restore(self, arrays: Any) -> None:
        pass


class HandClock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> Instant:
        return Instant("a boot", self.seconds)


@dataclass
class Federation:
    """A table side and an intake over one folder, and what came in."""

    side: TableSide
    intake: Intake
    table: Table
    clock: HandClock
    signer: Ed25519Signer
    came: list[Updates]
    reasons: list[str]

    @contextmanager
    def open_round(
        self, round: int = 1, target: int = CLIENTS, parameters: Mapping[str, Any] = PARAMETERS
    ) -> Iterator[None]:
        """A round that is open meanwhile; it ends when ``target`` updates are there, or at its deadline."""
        plan, cohort = Plan(round, parameters, LOCAL), Cohort(round, np.arange(CLIENTS), CLIENTS)

        def read() -> None:
            try:
                self.came.extend(replace(self.side, target=target).exchange(plan, cohort, None, Draws(1), None))  # type: ignore[arg-type]
            except Abandoned as reason:
                self.reasons.append(str(reason))

        thread = Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            thread.join(20.0)
            assert not thread.is_alive()

    async def lease(self, client: int = 0) -> pb.Lease:
        """A lease, waited for as long as the round takes to open."""
        for _ in range(200):
            asked = pb.CheckInRequest(protocol=1, num_examples=9)
            reply = await self.intake.check_in(caller(client), asked.SerializeToString())
            if reply.WhichOneof("outcome") == "lease":
                return reply.lease
            await asyncio.sleep(0.02)
        raise AssertionError("no lease came")

    async def rows(self, lease: pb.Lease, client: int = 0, ids: tuple[int, ...] = (1, 3)) -> Any:
        request = pb.FetchRowsRequest(lease=lease.lease, source="item", ids=to_tensor(np.array(ids, np.uint32)))
        chunks = [
            pb.RowsChunk.FromString(c)
            async for c in self.intake.fetch_rows(caller(client), request.SerializeToString())
        ]
        return chunks

    async def submit(self, lease: pb.Lease, payload: bytes, client: int = 0, **header: Any) -> pb.SubmitReply:
        return await self.intake.submit(caller(client), parts(lease.lease, payload, **header))

    async def good(self, client: int) -> pb.Lease:
        """A client that does everything right."""
        lease = await self.lease(client)
        await self.rows(lease, client)
        reply = await self.submit(lease, encode_submission(self.submission(lease)), client)
        assert reply.WhichOneof("outcome") == "acknowledged"
        return lease

    def submission(self, lease: pb.Lease, **changes: Any) -> Submission:
        data = self.side.artefacts.path(lease.plan.artefact.digest).read_bytes()
        plan = open_plan(lease.plan, data, self.signer.verifier())
        deltas = {
            name: np.full((1, *value.shape), 0.25 * (lease.client + 1), np.float32)
            for name, value in PARAMETERS.items()
        }
        updates = Updates(
            weights=np.array([2.0]),
            dense=deltas,
            rows={"item": Rows(np.array([0, 2]), np.array([1, 3]), np.full((2, 4), 0.5, np.float32))},
            metrics={"loss": np.array([0.5])},
        )
        belongs = Belongs(plan.federation, plan.model, plan.round, lease.lease)
        made = Submission(belongs, updates, 5)
        for name, change in changes.items():
            made = replace(made, **{name: change(getattr(made, name))})
        return made


def caller(client: int) -> Caller:
    return Caller(f"device-{client}", client)


async def parts(lease: bytes, payload: bytes, **header: Any) -> AsyncIterator[bytes]:
    digest = hashlib.sha256(payload).digest()
    first = {"lease": lease, "digest": digest, "size": len(payload), "offset": 0, **header}
    yield pb.SubmitPart(header=pb.SubmitHeader(**first)).SerializeToString()
    for start in range(first["offset"], len(payload), 100):
        yield pb.SubmitPart(data=payload[start : start + 100]).SerializeToString()


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def journal(tmp_path: Path, clock: HandClock) -> Iterator[Journal]:
    opened = SQLite().open(tmp_path / "journal", "a federation", clock)
    yield opened
    opened.close()


@pytest.fixture
def federation(tmp_path: Path, journal: Journal, clock: HandClock, registry: Registry) -> Federation:
    signer = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    template = PublishedPlan(
        federation="a federation",
        round=0,
        seed=1,
        bundle=Artefact.of("manifest.json", b"{}"),
        files=(),
        parameters=(),
        local=LOCAL,
        rows=(RowSource("item", 10, 4),),
        norm_bound=100.0,
        run="run1",
    )
    side = TableSide(
        folder=tmp_path,
        journal=journal,
        epoch=journal.claim(),
        signer=signer,
        template=template,
        terms=Terms(lease_seconds=60.0, heartbeat_seconds=5.0, deadline_seconds=300.0, quorum=0.75),
        said=lambda message: None,
        clock=clock,
    )
    table = Table()

    async def line(request: bytes) -> AsyncIterator[bytes]:
        if table.away:
            raise RowsAway("no table")
        for chunk in _chunks(LockedRows.of(table), request):
            yield chunk

    intake = Intake(
        folder=tmp_path,
        federation="a federation",
        journal=journal,
        rows=line,
        meters=Meters(),
        registry=registry,
        limits=Limits(upload_bytes=1 << 20),
    )
    intake.presence.clock = clock
    return Federation(side, intake, table, clock, signer, [], [])


def refused(do: Callable[[], Any]) -> Reason:
    with pytest.raises(Refused) as error:
        do()
    assert len(str(error.value)) > 20  # a sentence
    return error.value.reason


def spoilt(**changes: Any) -> Callable[[Updates], Updates]:
    return lambda updates: replace(updates, **changes)


W = np.ones((1, 2, 3), np.float32)
B = np.ones((1, 3), np.float32)
BAD_UPDATES: dict[str, tuple[Reason, dict[str, Any]]] = {
    "early": (Reason.EARLY, {"belongs": lambda b: replace(b, round=b.round + 1)}),
    "other round": (Reason.OTHER_ROUND, {"belongs": lambda b: replace(b, round=0)}),
    "other model": (Reason.OTHER_MODEL, {"belongs": lambda b: replace(b, model=bytes(32))}),
    "other federation": (Reason.OTHER_FEDERATION, {"belongs": lambda b: replace(b, federation="another")}),
    "NaN": (Reason.NOT_FINITE, {"updates": spoilt(dense={"w": W * np.float32("nan"), "b": B})}),
    "infinite rows": (
        Reason.NOT_FINITE,
        {"updates": spoilt(rows={"item": Rows(np.array([0, 1]), np.array([1]), np.full((1, 4), np.inf, np.float32))})},
    ),
    "wrong shape": (Reason.WRONG_SHAPE, {"updates": spoilt(dense={"w": W[:, :1], "b": B})}),
    "missing name": (Reason.WRONG_NAMES, {"updates": spoilt(dense={"w": W})}),
    "wrong dtype": (Reason.WRONG_DTYPE, {"updates": spoilt(dense={"w": W.astype(np.float64), "b": B})}),
    "row not leased": (
        Reason.ROW_NOT_LEASED,
        {"updates": spoilt(rows={"item": Rows(np.array([0, 1]), np.array([7]), np.ones((1, 4), np.float32))})},
    ),
    "row twice": (
        Reason.ROW_NOT_LEASED,
        {"updates": spoilt(rows={"item": Rows(np.array([0, 2]), np.array([1, 1]), np.ones((2, 4), np.float32))})},
    ),
    "too long": (Reason.NORM, {"updates": spoilt(dense={"w": W * 1000, "b": B})}),
    "negative weight": (Reason.WEIGHT, {"updates": spoilt(weights=np.array([-1.0]))}),
    "more than it has": (Reason.NUM_EXAMPLES, {"num_examples": lambda n: 10}),
    "weight of nothing": (Reason.NUM_EXAMPLES, {"num_examples": lambda n: 0}),
}


def test_bad_updates_of_every_kind_are_refused_and_change_nothing(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease)
        good = encode_submission(federation.submission(lease))
        for name, (reason, changes) in BAD_UPDATES.items():
            payload = encode_submission(federation.submission(lease, **changes))
            with pytest.raises(Refused) as error:
                await federation.submit(lease, payload)
            assert error.value.reason is reason, name
        for reason, do in (
            (Reason.CORRUPT, federation.submit(lease, b"no update at all" * 9)),
            (Reason.CORRUPT, federation.submit(lease, good, digest=hashlib.sha256(b"else").digest())),
            (Reason.TRUNCATED, federation.submit(lease, good, size=len(good) + 1)),
            (Reason.TOO_LARGE, federation.submit(lease, good, size=1 << 40)),
            (Reason.UNKNOWN_LEASE, federation.submit(lease, good, client=1)),
            (Reason.UNKNOWN_LEASE, federation.submit(pb.Lease(lease=bytes(16)), good)),
        ):
            with pytest.raises(Refused) as error:
                await do
            assert error.value.reason is reason
        assert (await federation.submit(lease, good)).acknowledged == pb.Acknowledged(duplicate=False)
        assert (await federation.submit(lease, good)).acknowledged == pb.Acknowledged(duplicate=True)
        other = encode_submission(federation.submission(lease, num_examples=lambda n: 6))
        with pytest.raises(Refused) as conflict:
            await federation.submit(lease, other)
        assert conflict.value.reason is Reason.CONFLICTING
        for client in range(1, CLIENTS):
            await federation.good(client)

    with federation.open_round():
        asyncio.run(story())
    block = stack(federation.came)
    assert block.clients is not None
    order = np.argsort(block.clients)
    assert block.clients[order].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(block.dense["w"][order][:, 0, 0], [0.25, 0.5, 0.75, 1.0])


def test_who_was_acknowledged_is_not_asked_again_and_late_is_late(federation: Federation) -> None:
    async def story() -> None:
        await federation.good(0)
        again = await federation.intake.check_in(caller(0), pb.CheckInRequest(protocol=1).SerializeToString())
        assert again.WhichOneof("outcome") == "come_back"
        stranger = await federation.intake.check_in(caller(77), pb.CheckInRequest(protocol=1).SerializeToString())
        assert stranger.WhichOneof("outcome") == "come_back"
        slow = await federation.lease(1)
        payload = encode_submission(federation.submission(slow, updates=spoilt(rows={})))
        federation.clock.seconds += 61.0
        with pytest.raises(Refused) as late:
            await federation.submit(slow, payload, 1)
        assert late.value.reason is Reason.LATE
        federation.clock.seconds += 300.0
        for _ in range(200):
            await asyncio.sleep(0.02)
            if federation.reasons:
                break
        await asyncio.sleep(0.1)  # an intake knows of it 50 ms later
        with pytest.raises(Refused) as closed:
            await federation.rows(slow, 1)
        assert closed.value.reason in (Reason.ROUND_CLOSED, Reason.UNKNOWN_LEASE)

    with federation.open_round():
        asyncio.run(story())
    assert federation.reasons == ["after 300 s there were 1 of 4 updates, and the quorum is 3"]


def test_an_upload_that_broke_off_goes_on_where_it_ended(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease)
        good = encode_submission(federation.submission(lease))
        digest = hashlib.sha256(good).digest()

        async def broken() -> AsyncIterator[bytes]:
            whole = parts(lease.lease, good)
            yield await anext(whole)
            yield await anext(whole)
            raise ConnectionError("the line broke")

        with pytest.raises(ConnectionError):
            await federation.intake.submit(caller(0), broken())
        asked = pb.ResumeRequest(lease=lease.lease, digest=digest).SerializeToString()
        held = (await federation.intake.resume(caller(0), asked)).held.offset
        assert held == 100
        assert (await federation.submit(lease, good, offset=held)).WhichOneof("outcome") == "acknowledged"
        assert not [path for path in (federation.intake.folder / "staging").rglob("*") if path.is_file()]

    with federation.open_round(target=1):
        asyncio.run(story())
    assert len(federation.came) == 1


def test_rows_that_are_away_are_asked_for_later(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        federation.table.away = True
        (chunk,) = await federation.rows(lease)
        assert chunk.come_back.seconds > 0
        federation.table.away = False
        (chunk,) = await federation.rows(lease)
        np.testing.assert_array_equal(to_array(chunk.part.rows, "a test"), TABLE[[1, 3]])
        with pytest.raises(Refused) as beyond:
            await federation.rows(lease, ids=(1, 10))
        assert beyond.value.reason is Reason.ROW_NOT_LEASED
        await federation.submit(lease, encode_submission(federation.submission(lease)))

    with federation.open_round(target=1):
        asyncio.run(story())


def test_another_intake_knows_the_leases_of_the_first(federation: Federation, registry: Registry) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease)
        second = replace(federation.intake)
        second.presence.clock = federation.clock
        payload = encode_submission(federation.submission(lease))
        reply = await second.submit(caller(0), parts(lease.lease, payload))
        assert reply.WhichOneof("outcome") == "acknowledged"

    with federation.open_round(target=1):
        asyncio.run(story())
    assert len(federation.came) == 1


def test_a_round_that_was_opened_before_a_kill_is_read_again(federation: Federation) -> None:
    async def story() -> None:
        for client in range(CLIENTS):
            await federation.good(client)

    with federation.open_round():
        asyncio.run(story())
    first, federation.came = federation.came, []
    federation.side = replace(federation.side, epoch=federation.side.journal.claim())
    with federation.open_round():
        pass
    for one, other in zip(first, federation.came, strict=True):
        np.testing.assert_array_equal(one.dense["w"], other.dense["w"])
    federation.side.committed(1)
    federation.side.saved(1)
    assert not list(federation.side.windows.iterdir())


def test_a_table_process_started_again_gives_no_rows_before_it_stands_where_devices_do(federation: Federation) -> None:
    async def everybody() -> None:
        for client in range(CLIENTS):
            await federation.good(client)

    with federation.open_round(1):
        asyncio.run(everybody())
    killed, journal = federation.side, federation.side.journal
    federation.side = replace(killed, epoch=journal.claim(), current=Event())
    address = f"unix:{killed.folder}/rows.sock"
    server = serve_rows(federation.table, address, federation.side.current)
    request = pb.FetchRowsRequest(source="item", ids=to_tensor(np.array([1], np.uint32))).SerializeToString()

    def outcome() -> str | None:
        with grpc.insecure_channel(address) as channel:
            fetch: Any = channel.unary_stream(METHOD)
            return pb.RowsChunk.FromString(next(iter(fetch(request, timeout=10.0)))).WhichOneof("outcome")

    try:
        assert outcome() == "come_back"
        # It is over: what was accepted is read again, by the same plan in whatever order a checkpoint gives it back.
        with federation.open_round(1, parameters=dict(reversed(PARAMETERS.items()))):
            pass
        assert len(federation.came) == 2 * CLIENTS
        assert outcome() == "come_back"
        with federation.open_round(2):
            assert federation.side.current.wait(10.0)
            assert outcome() == "part"
            asyncio.run(everybody())
    finally:
        server.stop(None).wait()


def test_a_table_process_that_another_has_followed_can_end_no_window(federation: Federation) -> None:
    async def everybody() -> None:
        for client in range(CLIENTS):
            await federation.good(client)

    followed, journal = federation.side, federation.side.journal
    plan, cohort = Plan(1, PARAMETERS, LOCAL), Cohort(1, np.arange(CLIENTS), CLIENTS)
    arriving = followed.exchange(plan, cohort, None, Draws(1), None)  # type: ignore[arg-type]
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(list, arriving)
        asyncio.run(federation.lease())  # it has opened the window
        federation.side = replace(followed, epoch=journal.claim())
        asyncio.run(everybody())
        with pytest.raises(Fenced, match="this one must stop"):
            reading.result(20.0)
    assert journal.record(1, "train").state == "open"
    with federation.open_round():
        pass
    assert len(federation.came) == CLIENTS
    assert journal.record(1, "train").state == "closed"


def test_the_leases_of_a_window_that_this_intake_did_not_know_of_stay(federation: Federation) -> None:
    leased, journal = federation.intake.leased, federation.side.journal
    for round in (1, 2):
        journal.open_round(1, round, "train", "plan")
    known = journal.rounds()
    journal.advance(1, 1, "train", "closed")
    opened: list[tuple[int, Task]] = [(2, "train"), (2, "evaluate"), (3, "train")]
    for window in ((1, "train"), *opened):
        leased.note(window, bytes(16), "item", np.array([window[0]]))
    remove_ended(leased.folder, known)
    assert len(list(leased.folder.iterdir())) == 4
    remove_ended(leased.folder, journal.rounds())
    assert not leased.of((1, "train"), bytes(16))[0]
    assert [leased.of(window, bytes(16))[0]["item"].tolist() for window in opened] == [[2], [2], [3]]


def patient(seconds: float) -> bytes:
    return pb.CheckInRequest(protocol=1, num_examples=9, wait_seconds=seconds).SerializeToString()


def test_a_device_that_waits_on_the_line_is_told_when_a_window_opens(federation: Federation, tmp_path: Path) -> None:
    async def story() -> None:
        bell = Bell.hang(tmp_path / "bells", "intake-test")
        watching = asyncio.create_task(federation.intake.watch(bell))
        early = asyncio.create_task(federation.intake.check_in(caller(0), patient(20.0)))
        stranger = asyncio.create_task(federation.intake.check_in(caller(CLIENTS), patient(20.0)))
        await asyncio.sleep(0.05)
        assert not early.done()
        with federation.open_round(target=1):
            reply = await early
            assert reply.WhichOneof("outcome") == "lease"
            await federation.good(0)
        assert not stranger.done()  # it was not chosen
        await federation.intake.drain(0.1)  # as the process does before it ends
        assert (await stranger).come_back.seconds > 0
        watching.cancel()
        await asyncio.wait([watching])
        bell.close()

    asyncio.run(story())
    assert len(federation.came) == 1


def test_who_waited_in_vain_may_ask_at_once_and_who_does_not_wait_may_not(federation: Federation) -> None:
    async def story() -> None:
        waited = await federation.intake.check_in(caller(0), patient(0.02))
        assert (waited.WhichOneof("outcome"), waited.come_back.seconds) == ("come_back", 0.0)
        for impatient in (0.0, -1.0, float("nan")):
            reply = await federation.intake.check_in(caller(0), patient(impatient))
            assert reply.come_back.seconds == Limits().come_back_seconds
        federation.intake.waiting.most = 0
        turned_away = await federation.intake.check_in(caller(0), patient(20.0))
        assert turned_away.come_back.seconds == Limits().wait_seconds / 2

    asyncio.run(story())


def test_small_artefacts_are_given_with_the_first_and_a_round_that_is_over_has_none(federation: Federation) -> None:
    async def fetch(lease: pb.Lease, digest: bytes, *then: bytes) -> bytes:
        asked = pb.FetchRequest(lease=lease.lease, digest=digest, then=then).SerializeToString()
        return b"".join([chunk.data async for chunk in federation.intake.fetch(caller(0), asked)])

    async def story() -> None:
        store = federation.side.artefacts
        with federation.open_round(target=1):
            lease = await federation.lease(0)
            plan = store.path(lease.plan.artefact.digest).read_bytes()
            named = open_plan(lease.plan, plan, federation.signer.verifier()).parameters
            large = store.put("large", bytes(CHUNK_BYTES + 1))
            held = [store.path(each.digest).read_bytes() for each in named]
            first, second = (each.digest for each in named)
            assert await fetch(lease, lease.plan.artefact.digest, first, second, first) == plan + b"".join(held)
            assert await fetch(lease, first, bytes(32), second) == held[0]  # in order: nothing behind what is not there
            assert await fetch(lease, first, large.digest, second) == held[0]
            with pytest.raises(Refused) as many:
                await fetch(lease, first, *(bytes([each % 256, each // 256]) * 16 for each in range(1000)))
            assert many.value.reason is Reason.TOO_LARGE
            await federation.good(0)
        federation.side.committed(1)
        with federation.open_round(2, target=1):
            await federation.good(0)
            with pytest.raises(Refused) as over:
                await fetch(lease, lease.plan.artefact.digest)
            assert over.value.reason is Reason.ROUND_CLOSED
        kept = {path.name for path in store.folder.iterdir()}
        assert lease.plan.artefact.digest.hex() not in kept
        assert {each.digest.hex() for each in named} <= kept  # round 2 was sent the same

    asyncio.run(story())


async def time_goes_on(federation: Federation, seconds: int) -> None:
    for _ in range(seconds):
        federation.clock.seconds += 1.0
        await federation.intake.look()
        await asyncio.sleep(0.002)


def test_a_round_with_its_quorum_does_not_wait_for_devices_that_have_vanished(federation: Federation) -> None:
    async def story() -> None:
        await time_goes_on(federation, 70)
        with federation.open_round():
            for client in range(CLIENTS):
                await federation.lease(client)
            for client in range(CLIENTS - 1):  # three of four, which is the quorum
                await federation.good(client)
            await time_goes_on(federation, 55)
            assert federation.intake.journal.record(1, "train").state == "open"  # within lease_seconds it may come back
            await time_goes_on(federation, 10)
        assert federation.intake.journal.record(1, "train").state == "closed"

    asyncio.run(story())
    assert len(federation.came) == CLIENTS - 1


def test_an_evaluation_does_not_wait_anew_for_a_device_that_died_after_every_kill(federation: Federation) -> None:
    async def story() -> None:
        await time_goes_on(federation, 70)
        plan, clients = Plan(1, PARAMETERS, LOCAL), np.arange(2)
        judging = asyncio.get_running_loop().run_in_executor(None, lambda: federation.side.judged(plan, clients))
        for client in (0, 1):
            assert (await federation.lease(client)).task == pb.TASK_EVALUATE
        for kill in range(4):  # each time a process is there for less than a lease, and then the next one
            await time_goes_on(federation, 20)
            for path in list((federation.intake.folder / "present").iterdir()):
                path.rename(path.with_name(path.name.replace(f"-{os.getpid()}.", f"-{kill + 1}.")))
            federation.intake.presence = Presence(federation.intake.folder / "present", federation.clock)
            await time_goes_on(federation, 1)
        assert await asyncio.wait_for(judging, 20.0) == {}

    asyncio.run(story())


def test_a_round_without_its_quorum_waits_for_its_deadline(federation: Federation) -> None:
    async def story() -> None:
        await time_goes_on(federation, 70)
        with federation.open_round():
            await federation.good(0)
            await time_goes_on(federation, 200)
            assert federation.intake.journal.record(1, "train").state == "open"
            await time_goes_on(federation, 120)

    asyncio.run(story())
    assert federation.reasons == ["after 300 s there were 1 of 4 updates, and the quorum is 3"]
