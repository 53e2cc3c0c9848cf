"""A device's calls, against a real server on loopback that breaks lines, says nothing, or says no."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from click import BadParameter

from fedtower.core.errors import StorageError, Unreachable
from fedtower.core.registry import discover
from fedtower.plugins.signers.ed25519.signer import make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.cache import ArtefactCache
from fedtower.plugins.transports.grpc.caller import BackOff, Caller, Later, Over
from fedtower.plugins.transports.grpc.device_command import _maker
from fedtower.plugins.transports.grpc.device_command import device as device_command
from fedtower.plugins.transports.grpc.plans import RowSource
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.remote import RemoteRows
from fedtower.plugins.transports.grpc.tensors import to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server

DATA = np.random.default_rng(3).bytes(700_000)
TABLE = np.arange(40, dtype=np.float32).reshape(10, 4)


class Server(FederationServicer):
    """Ends every stream after ``most`` messages, and every second call at once, while ``faults`` last."""

    def __init__(self) -> None:
        self.faults, self.most, self.calls = 0, 1, 0
        self.status = grpc.StatusCode.UNAVAILABLE
        self.held = b""
        self.metadata: list[Any] = []
        self.offsets: list[int] = []
        self.away = 0  # how often rows are to be asked for later

        self.together: list[pb.FetchRequest] = []
        self.begins: tuple[bytes, ...] = ()
        self.reply: Any = None

    def break_if_due(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        if self.faults:
            self.faults -= 1
            context.abort(self.status, "the line broke")

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolReply:
        return pb.EnrolReply(refusal=Refused(Reason.ENROLMENT_CODE, "nobody enrols here").to_message())

    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatReply:
        self.break_if_due(context)
        return pb.HeartbeatReply(alive=pb.Alive(seconds_left=7.5))

    def CheckIn(self, request: pb.CheckInRequest, context: grpc.ServicerContext) -> pb.CheckInReply:
        self.metadata = list(context.invocation_metadata())
        self.break_if_due(context)
        reply: pb.CheckInReply = self.reply
        return reply

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        if request.then:
            self.together.append(request)
            yield from (pb.Chunk(data=data) for data in self.begins)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")
        self.offsets.append(request.offset)
        for count, start in enumerate(range(request.offset, len(DATA), 100_000)):
            if count == self.most:
                self.break_if_due(context)
            yield pb.Chunk(data=DATA[start : start + 100_000])

    def FetchRows(self, request: pb.FetchRowsRequest, context: grpc.ServicerContext) -> Iterator[pb.RowsChunk]:
        ids = to_array(request.ids, "a test").astype(np.int64)
        self.offsets.append(len(ids))
        if self.away:
            self.away -= 1
            yield pb.RowsChunk(come_back=pb.ComeBack(seconds=2.0, reason="rows are coming back"))
            return
        for start in range(0, len(ids), 2):
            if start:
                self.break_if_due(context)
            rows = TABLE[ids[start : start + 2]]
            yield pb.RowsChunk(part=pb.RowsPart(first=start, rows=to_tensor(rows)))

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        self.break_if_due(context)
        if hashlib.sha256(self.held).digest() == request.digest:
            return pb.ResumeReply(acknowledged=pb.Acknowledged(duplicate=True))
        return pb.ResumeReply(held=pb.Held(offset=len(self.held)))

    def Submit(self, parts: Iterator[pb.SubmitPart], context: grpc.ServicerContext) -> pb.SubmitReply:
        header = next(parts).header
        assert header.offset == len(self.held)
        for part in parts:
            self.held += part.data
            self.break_if_due(context)
        assert hashlib.sha256(self.held).digest() == header.digest
        return self.reply or pb.SubmitReply(acknowledged=pb.Acknowledged())


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def caller(server: Server, waits: list[float]) -> Iterator[Caller]:
    runner = grpc.server(ThreadPoolExecutor(2))
    add_FederationServicer_to_server(server, runner)
    port = runner.add_insecure_port("127.0.0.1:0")
    runner.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        back_off = BackOff(first_seconds=0.01, most_seconds=0.04)
        yield Caller(channel, [("authorization", "Bearer x")], back_off, Random(1), waits.append)
    runner.stop(None).wait()


ARTEFACT = Artefact.of("weights", DATA)


def test_who_is_told_when_to_come_back_does_not_wait_ever_longer(
    server: Server, caller: Caller, waits: list[float]
) -> None:
    server.away = 8
    rows = caller.rows(b"1", "item", np.array([1, 3]))
    np.testing.assert_array_equal(rows, TABLE[[1, 3]])
    assert len(waits) == 8
    assert all(2.0 <= seconds <= 2.01 for seconds in waits)


def test_a_fetch_goes_on_where_the_line_broke(server: Server, caller: Caller, tmp_path: Path) -> None:
    server.faults = 3
    path = ArtefactCache(tmp_path).get(ARTEFACT, lambda artefact, at: caller.fetch(b"1", artefact, at))
    assert path.read_bytes() == DATA
    assert server.offsets == [0, 100_000, 200_000, 300_000]


def test_a_fetch_goes_on_after_the_device_was_ended(server: Server, caller: Caller, tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path)
    impatient = Caller(caller.channel, back_off=BackOff(give_up_seconds=-1.0))
    server.faults = 1
    with pytest.raises(Unreachable, match="UNAVAILABLE: the line broke"):
        cache.get(ARTEFACT, lambda artefact, at: impatient.fetch(b"1", artefact, at))
    assert cache.find(ARTEFACT) is None
    cache.get(ARTEFACT, lambda artefact, at: caller.fetch(b"1", artefact, at))
    assert server.offsets == [0, 100_000]
    server.offsets.clear()
    cache.get(ARTEFACT, lambda artefact, at: caller.fetch(b"1", artefact, at))
    assert server.offsets == []


def test_what_the_disk_forgot_is_fetched_again(server: Server, caller: Caller, tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path)
    path = cache.get(ARTEFACT, lambda artefact, at: caller.fetch(b"1", artefact, at))
    path.write_bytes(DATA[:-1] + b"?")
    assert cache.get(ARTEFACT, lambda artefact, at: caller.fetch(b"1", artefact, at)).read_bytes() == DATA


def test_what_is_not_the_artefact_is_refused_and_not_kept(caller: Caller, tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path)
    for size, digest, reason in (
        (len(DATA), b"?" * 32, Reason.CORRUPT),
        (len(DATA) - 1, ARTEFACT.digest, Reason.TOO_LARGE),
    ):
        other = Artefact("weights", digest, size)
        with pytest.raises(Refused) as refused:
            cache.get(other, lambda artefact, at: caller.fetch(b"1", artefact, at))
        assert refused.value.reason is reason
        assert not list(tmp_path.iterdir())


def test_room_is_made_of_what_was_longest_unused(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path, limit_bytes=250)
    data = {name: name.encode() * 100 for name in "abcd"}
    artefacts = {name: Artefact.of(name, held) for name, held in data.items()}

    def get(name: str, *keep: str) -> None:
        cache.get(
            artefacts[name], lambda artefact, at: [data[name][at:]], keep=[artefacts[each].digest for each in keep]
        )

    import os

    for age, name in enumerate("ab"):
        get(name)
        os.utime(tmp_path / artefacts[name].digest.hex(), (age, age))
    assert cache.find(artefacts["a"]) is not None  # now b is the one that was longest unused
    get("c")
    assert [cache.find(artefacts[name]) is not None for name in "abc"] == [True, False, True]
    with pytest.raises(StorageError, match="does not fit"):
        get("d", "a", "c")
    get("d", "c")
    assert [cache.find(artefacts[name]) is not None for name in "abcd"] == [False, False, True, True]


def test_rows_are_fetched_once_and_from_where_the_line_broke(server: Server, caller: Caller) -> None:
    server.faults = 2
    rows = RemoteRows(caller, b"1", {"item": RowSource("item", 10, 4)})
    ids = np.array([7, 1, 3, 9, 0])
    np.testing.assert_array_equal(rows.fetch("item", ids), TABLE[ids])
    assert server.offsets == [5, 3, 1]
    server.offsets.clear()
    np.testing.assert_array_equal(rows.fetch("item", np.array([3, 3, 8])), TABLE[[3, 3, 8]])
    assert server.offsets == [1]
    assert rows.fetch("item", np.zeros(0, np.int64)).shape == (0, 4)
    with pytest.raises(Refused, match="no rows of 'user'"):
        rows.fetch("user", ids)


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL])
def test_an_upload_goes_on_where_the_server_has_it(
    server: Server, caller: Caller, tmp_path: Path, status: grpc.StatusCode
) -> None:
    path = tmp_path / "update"
    path.write_bytes(DATA)
    server.faults, server.status = 2, status
    assert caller.submit(b"1", path) is False
    assert server.held == DATA
    assert caller.submit(b"1", path) is True


def test_a_call_that_there_is_not_is_no_reason_to_wait(server: Server, caller: Caller) -> None:
    server.faults, server.status = 1, grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(Unreachable, match="UNIMPLEMENTED: the line broke"):
        caller.heartbeat(b"1", 0.0)


def test_a_refusal_is_told_and_not_tried_again(server: Server, caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / "update"
    path.write_bytes(DATA)
    server.reply = pb.SubmitReply(refusal=Refused(Reason.NORM, "too long by half").to_message())
    with pytest.raises(Refused, match="too long by half") as refused:
        caller.submit(b"1", path)
    assert refused.value.reason is Reason.NORM


def test_check_in_says_who_calls_and_what_came(server: Server, caller: Caller, waits: list[float]) -> None:
    artefact = pb.Artefact(name="plan", digest=b"d" * 32, size=5)
    plan = pb.SignedArtefact(artefact=artefact, signature=b"s", key_id="k")
    lease = pb.Lease(
        lease=b"1", task=pb.TASK_EVALUATE, round=3, client=4, plan=plan, heartbeat_seconds=9, seconds_left=60
    )
    server.reply, server.faults = pb.CheckInReply(lease=lease), 2
    leased = caller.check_in("f", pb.Capabilities(), b"", 7)
    assert not isinstance(leased, Over)
    assert (leased.task, leased.round, leased.client, leased.plan.artefact.size) == ("evaluate", 3, 4, 5)
    assert ("authorization", "Bearer x") in [tuple(each) for each in server.metadata]
    assert len(waits) == 2
    assert all(0 <= wait <= limit for wait, limit in zip(waits, (0.01, 0.02), strict=True))
    server.reply = pb.CheckInReply(come_back=pb.ComeBack(seconds=12.5, reason="the cohort is full"))
    with pytest.raises(Later, match="the cohort is full") as later:
        caller.check_in("f", pb.Capabilities(), b"", 7)
    assert later.value.seconds == 12.5
    server.reply = pb.CheckInReply(finished=pb.Finished(reason="all rounds are done"))
    assert caller.check_in("f", pb.Capabilities(), b"", 7) == Over("all rounds are done")
    server.reply = pb.CheckInReply()
    with pytest.raises(Refused, match="of a newer version"):
        caller.check_in("f", pb.Capabilities(), b"", 7)


def test_back_off_doubles_up_to_a_limit() -> None:
    class Most(Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    waits = BackOff(1.0, 5.0).waits(Most())
    assert [next(waits) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_the_longest_pause_is_the_command_lines(tmp_path: Path) -> None:
    make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    given: dict[str, Any] = {
        "server": "127.0.0.1:1",
        "keys": tmp_path,
        "runtime": "mnn",
        "signer": "ed25519",
        "insecure": True,
    }
    made = _maker(discover(), **given, cache_mb=1, patience=9.0, longest_pause=1.5)
    device = made(tmp_path / "shard", tmp_path / "kept", None, lambda word, values: None)
    assert device.back_off == BackOff(0.2, 1.5, 9.0)
    assert dict(device.place.options)["grpc.max_reconnect_backoff_ms"] == 1_500
    with pytest.raises(BadParameter, match=r"0\.1 is not in the range"):
        device_command.make_context("device", ["--server", "a:1", "--data", "b", "--longest-pause", "0.1"])


def test_small_artefacts_come_together_as_far_as_they_come(caller: Caller, tmp_path: Path, server: Server) -> None:
    whole = {name: bytes([number]) * 1000 for number, name in enumerate("abc")}
    asked = [Artefact.of(name, data) for name, data in whole.items()]
    everything = b"".join(whole.values())
    server.begins = (everything[:700], everything[700:2500])
    cache = ArtefactCache(tmp_path)
    cache.gather(asked, lambda several: caller.fetch_together(b"1", several))
    assert [request.digest for request in server.together] == [asked[0].digest]
    assert list(server.together[0].then) == [each.digest for each in asked[1:]]
    assert [cache.find(each) is not None for each in asked] == [True, True, False]
    cache.gather(asked, lambda several: caller.fetch_together(b"1", several))
    assert len(server.together) == 1  # one that is missing is fetched by itself


def test_what_no_plan_names_any_more_leaves_the_cache(tmp_path: Path) -> None:
    whole = {name: name.encode() * 9 for name in "abc"}
    asked = [Artefact.of(name, data) for name, data in whole.items()]
    cache = ArtefactCache(tmp_path)
    cache.keep_only([])  # there is nothing yet
    for each in asked:
        cache.get(each, lambda artefact, at: [whole[artefact.name][at:]])
    (tmp_path / "ab.part").write_bytes(b"half")
    cache.keep_only([asked[1].digest])
    assert [path.name for path in tmp_path.iterdir()] == [asked[1].digest.hex()]


def test_an_upload_that_was_never_begun_is_sent_without_asking(server: Server, caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / "update"
    path.write_bytes(DATA)
    assert not caller.submit(b"1" * 16, path, begun=False)
    asked = server.calls
    server.held = b""
    assert not caller.submit(b"1" * 16, path)
    assert server.calls - asked == asked + 1  # and Resume before it
