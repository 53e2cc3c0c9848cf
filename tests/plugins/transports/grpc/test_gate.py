"""A real server on loopback with TLS: who is not known gets nothing decoded, and rotation drops nobody."""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509

from fedtower.core.errors import RecipeError, StorageError, TrustError
from fedtower.plugins.transports.grpc.bounds import CALL_BYTES
from fedtower.plugins.transports.grpc.certificates import (
    Authority,
    issue_client,
    issue_server,
    make_authority,
    read_authority,
)
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.interceptors import Gate, caller
from fedtower.plugins.transports.grpc.rates import Rates, RateSettings
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tls import DeviceTls, ServerTls, connect, listen
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub

ALIVE = pb.HeartbeatReply(alive=pb.Alive(seconds_left=9.0))
TIMEOUT = 20.0


@dataclass
class Seen:
    """What the handlers were given, and what was decoded."""

    requests: list[bytes] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    decoded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers of bytes, as a server has them, and one (Resume) that was registered with a deserializer."""

        async def heartbeat(request: bytes, _context: Any) -> bytes:
            self.requests.append(request)
            self.callers.append(caller().id)
            return ALIVE.SerializeToString()

        async def enrol(request: bytes, _context: Any) -> bytes:
            self.requests.append(request)
            with pytest.raises(LookupError):
                caller()
            return pb.EnrolReply().SerializeToString()

        async def fetch(request: bytes, _context: Any) -> AsyncIterator[bytes]:
            self.requests.append(request)
            self.callers.append(caller().id)
            for number in range(200):
                yield pb.Chunk(data=bytes([number])).SerializeToString()
                await asyncio.sleep(0.01 if number else 0)

        async def submit(requests: AsyncIterator[bytes], _context: Any) -> bytes:
            async for request in requests:
                self.requests.append(request)
                self.callers.append(caller().id)
            return pb.SubmitReply(acknowledged=pb.Acknowledged()).SerializeToString()

        async def resume(request: pb.ResumeRequest, _context: Any) -> bytes:
            return pb.ResumeReply(held=pb.Held(offset=len(request.lease))).SerializeToString()

        def decode(data: bytes) -> pb.ResumeRequest:
            self.decoded += 1
            return pb.ResumeRequest.FromString(data)

        calls: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Heartbeat": grpc.unary_unary_rpc_method_handler(heartbeat),
            "Enrol": grpc.unary_unary_rpc_method_handler(enrol),
            "Fetch": grpc.unary_stream_rpc_method_handler(fetch),
            "Submit": grpc.stream_unary_rpc_method_handler(submit),
            "Resume": grpc.unary_unary_rpc_method_handler(resume, request_deserializer=decode),
        }
        return grpc.method_handlers_generic_handler("fedtower.v1.Federation", calls)


@dataclass(frozen=True)
class Place:
    """A federation's server on loopback, and what devices need to call it."""

    folder: Path
    authority: Authority
    credentials: Credentials
    seen: Seen
    port: int = 0

    def enrolled(self) -> tuple[str, str]:
        """A device's id and token."""
        (code,) = self.credentials.make_codes(1)
        device, token = self.credentials.enrol(code, "", b"a" * 16)
        return device.id, token

    def channel(self, authority: Path | None = None, device: str | None = None) -> grpc.aio.Channel:
        """A connection of a device, with its own certificate if it has one."""
        own = None if device is None else self.folder / "clients" / f"{device}.pem"
        tls = DeviceTls(
            authority or self.folder / "authority.pem", own, None if own is None else own.with_suffix(".key")
        )
        return connect(f"localhost:{self.port}", tls, insecure=False)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def served(
    tmp_path: Path,
    rates: RateSettings | None = None,
    tls: grpc.ServerCredentials | None = None,
    *,
    mutual: bool = False,
) -> AsyncIterator[Place]:
    authority = make_authority(tmp_path)
    issue_server(authority, tmp_path, ["localhost"], 30)
    credentials, seen = Credentials(tmp_path / "credentials.sqlite"), Seen()

    def observe(refusal: Refused, _who: str) -> None:
        seen.refused[refusal.reason.name] += 1

    def say(refusal: Refused, _who: str, _silent: int) -> None:
        seen.said.append(refusal.reason.name)

    server = grpc.aio.server(
        interceptors=[Gate(credentials, Rates(rates or RateSettings()), observe, say)],
        options=[("grpc.max_receive_message_length", CALL_BYTES), ("grpc.so_reuseport", 0)],
    )
    server.add_generic_rpc_handlers((seen.handlers(),))
    clients = tmp_path / "authority.pem" if mutual else None
    files = ServerTls(tmp_path / "server.pem", tmp_path / "server.key", clients)
    port = server.add_secure_port("127.0.0.1:0", tls) if tls else listen(server, "127.0.0.1:0", files, insecure=False)
    await server.start()
    try:
        yield Place(tmp_path, authority, credentials, seen, port)
    finally:
        await server.stop(None)
        credentials.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def refusal_of(call: Any) -> tuple[grpc.StatusCode, Refused | None]:
    """How a call fails: its status, and the refusal beside it."""
    try:
        if hasattr(call, "__aiter__") and not hasattr(call, "__await__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), Refused.from_metadata(error.trailing_metadata())
    raise AssertionError("the call was answered")


def all_calls(stub: Any, metadata: Any) -> dict[str, Callable[[], Any]]:
    """Every call but Enrol, with a request that is no message: whoever decoded it would say so."""
    bad = pb.HeartbeatRequest(lease=b"\xff" * 100)
    return {
        "Heartbeat": lambda: stub.Heartbeat(bad, metadata=metadata, timeout=TIMEOUT),
        "Resume": lambda: stub.Resume(pb.ResumeRequest(lease=b"x"), metadata=metadata, timeout=TIMEOUT),
        "Fetch": lambda: stub.Fetch(pb.FetchRequest(), metadata=metadata, timeout=TIMEOUT),
        "Submit": lambda: stub.Submit(iter([pb.SubmitPart(data=b"x")]), metadata=metadata, timeout=TIMEOUT),
    }


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), Reason.UNKNOWN_DEVICE),
        (bearer("0123456789abcdef.secret"), Reason.UNKNOWN_DEVICE),
        (bearer(""), Reason.UNKNOWN_DEVICE),
        ((("authorization", "Basic dXNlcjpwYXNz"),), Reason.UNKNOWN_DEVICE),
    ],
    ids=["none", "unknown", "empty", "of another scheme"],
)
def test_without_good_credentials_nothing_is_decoded_and_no_handler_called(metadata, reason, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            for name, call in all_calls(FederationStub(channel), metadata).items():
                status, refusal = await refusal_of(call())
                assert status is grpc.StatusCode.UNAUTHENTICATED, name
                assert refusal is not None
                assert refusal.reason is reason
            assert (place.seen.requests, place.seen.decoded) == ([], 0)
            assert place.seen.refused == {reason.name: 4}

    run(scenario())


def test_a_device_with_its_token_is_let_in_and_its_handler_knows_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            device, token = place.enrolled()
            other, others = place.enrolled()
            for _ in range(5):
                replies = await asyncio.gather(
                    *(
                        stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(each), timeout=TIMEOUT)
                        for each in (token, others)
                    )
                )
                assert replies == [ALIVE, ALIVE]
            assert Counter(place.seen.callers) == {device: 5, other: 5}
            request = pb.ResumeRequest(lease=b"12345")
            assert (await stub.Resume(request, metadata=bearer(token), timeout=TIMEOUT)).held.offset == 5
            parts = iter([pb.SubmitPart(data=b"x")] * 3)
            assert (await stub.Submit(parts, metadata=bearer(token), timeout=TIMEOUT)).HasField("acknowledged")
            chunks = [
                chunk.data async for chunk in stub.Fetch(pb.FetchRequest(), metadata=bearer(token), timeout=TIMEOUT)
            ]
            assert len(chunks) == 200
            assert place.seen.callers[10:] == [device] * 4
            assert not place.seen.refused

    run(scenario())


def test_a_device_without_credentials_may_enrol_and_do_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            assert await stub.Enrol(pb.EnrolRequest(), timeout=TIMEOUT) == pb.EnrolReply()
            status, _ = await refusal_of(stub.Heartbeat(pb.HeartbeatRequest(), timeout=TIMEOUT))
            assert status is grpc.StatusCode.UNAUTHENTICATED

    run(scenario())


def test_a_revoked_device_is_refused_from_its_next_call_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            device, token = place.enrolled()
            await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
            place.credentials.revoke(device)
            for name, call in all_calls(stub, bearer(token)).items():
                status, refusal = await refusal_of(call())
                assert status is grpc.StatusCode.PERMISSION_DENIED, name
                assert refusal is not None
                assert refusal.reason is Reason.REVOKED
            assert (len(place.seen.requests), place.seen.decoded) == (1, 0)

    run(scenario())


def test_a_device_that_calls_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = RateSettings(calls_per_second=0.01, calls_burst=3.0)
        async with served(tmp_path, slow) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            (_, token), (_, other) = place.enrolled(), place.enrolled()
            for _ in range(3):
                await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
            status, refusal = await refusal_of(
                stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
            )
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal is not None
            assert refusal.reason is Reason.RATE
            assert 90 < refusal.retry_after_seconds <= 100
            await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(other), timeout=TIMEOUT)
            for _ in range(3):
                await stub.Enrol(pb.EnrolRequest(), timeout=TIMEOUT)
            assert (await refusal_of(stub.Enrol(pb.EnrolRequest(), timeout=TIMEOUT)))[0] is status

    run(scenario())


def test_guessing_from_an_address_is_slowed_and_its_neighbours_call_as_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        few = RateSettings(refusals_per_second=0.01, refusals_burst=3.0)
        async with served(tmp_path, few) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            _, token = place.enrolled()
            wrong = [bearer(f"{token[:16]}.{number}") for number in range(5)]
            reasons = []
            for metadata in (*wrong, ()):
                status, refusal = await refusal_of(
                    stub.Heartbeat(pb.HeartbeatRequest(), metadata=metadata, timeout=TIMEOUT)
                )
                assert refusal is not None
                reasons.append((refusal.reason, status, refusal.retry_after_seconds > 90))
                # The same address, with good credentials: a NAT has many behind it.
                await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
            assert reasons[:3] == [(Reason.UNKNOWN_DEVICE, grpc.StatusCode.UNAUTHENTICATED, False)] * 3
            assert reasons[3:] == [(Reason.RATE, grpc.StatusCode.RESOURCE_EXHAUSTED, True)] * 3
            assert place.seen.refused == {"UNKNOWN_DEVICE": 3, "RATE": 3}
            assert place.seen.said == ["UNKNOWN_DEVICE"] * 3  # a log has an end

    run(scenario())


def test_a_device_that_calls_many_times_at_once_is_held_back_and_others_are_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, RateSettings(calls_at_once=3)) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            (_, token), (_, other) = place.enrolled(), place.enrolled()
            held = [stub.Submit(metadata=bearer(token), timeout=TIMEOUT) for _ in range(3)]
            for call in held:
                await call.write(pb.SubmitPart(data=b"x"))
            for _ in range(200):
                if len(place.seen.requests) == 3:
                    break
                await asyncio.sleep(0.02)
            status, refusal = await refusal_of(stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token)))
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal is not None
            assert (refusal.reason, refusal.retry_after_seconds) == (Reason.RATE, 1.0)
            await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(other), timeout=TIMEOUT)
            held.pop().cancel()
            for _ in range(200):
                if await answers(stub, token):
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError("a call that has ended is counted still")
            for call in held:
                await call.done_writing()
                await call

    run(scenario())


async def answers(stub: Any, token: str) -> bool:
    try:
        return bool(await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT) == ALIVE)
    except grpc.aio.AioRpcError:
        return False


def test_a_device_that_sends_too_much_is_stopped_in_the_middle(tmp_path: Path) -> None:
    async def scenario() -> None:
        narrow = RateSettings(bytes_per_second=1.0, bytes_burst=10_000.0)
        async with served(tmp_path, narrow) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            _, token = place.enrolled()
            parts = iter([pb.SubmitPart(data=bytes(3_000))] * 100)
            status, refusal = await refusal_of(stub.Submit(parts, metadata=bearer(token), timeout=TIMEOUT))
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal is not None
            assert refusal.reason is Reason.RATE
            assert len(place.seen.requests) == 3

    run(scenario())


def test_a_message_above_the_limit_reaches_no_handler(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            _, token = place.enrolled()
            large = pb.HeartbeatRequest(lease=bytes(CALL_BYTES))
            for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
                call = stub.Heartbeat(large, metadata=bearer(token), timeout=TIMEOUT, compression=compression)
                assert (await refusal_of(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not place.seen.requests

    run(scenario())


def test_what_is_no_message_is_refused_where_a_handler_wants_one_decoded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            _, token = place.enrolled()
            resume: Any = channel.unary_unary("/fedtower.v1.Federation/Resume")
            status, refusal = await refusal_of(resume(b"\xff\xff", metadata=bearer(token), timeout=TIMEOUT))
            assert status is grpc.StatusCode.FAILED_PRECONDITION
            assert refusal is not None
            assert refusal.reason is Reason.CORRUPT

    run(scenario())


def test_a_call_that_there_is_not_is_not_implemented(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            call: Any = channel.unary_unary("/fedtower.v1.Federation/Nothing")
            _, token = place.enrolled()
            assert (await refusal_of(call(b"", metadata=bearer(token), timeout=TIMEOUT)))[
                0
            ] is grpc.StatusCode.UNIMPLEMENTED

    run(scenario())


def test_when_credentials_cannot_be_looked_up_nobody_is_let_in_or_told_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            stub: Any = FederationStub(channel)
            _, token = place.enrolled()
            monkeypatch.setattr(Credentials, "by_token", fail)
            status, refusal = await refusal_of(
                stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
            )
            assert (status, refusal) == (grpc.StatusCode.UNAVAILABLE, None)
            assert not place.seen.requests

    run(scenario())


async def unreachable(place: Place, channel: grpc.aio.Channel, token: str) -> None:
    """The handshake fails, so that the call never leaves; the server serves the next one as before."""
    stub: Any = FederationStub(channel)
    call = stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
    status, refusal = await refusal_of(call)
    assert (status, refusal) == (grpc.StatusCode.UNAVAILABLE, None)
    assert not place.seen.requests


def test_a_server_of_another_authority_is_not_believed(tmp_path: Path) -> None:
    async def scenario() -> None:
        other = tmp_path / "other"
        other.mkdir()
        make_authority(other)
        async with served(tmp_path) as place, place.channel(other / "authority.pem") as channel:
            await unreachable(place, channel, place.enrolled()[1])

    run(scenario())


def test_a_server_whose_certificate_has_expired_is_not_believed(tmp_path: Path) -> None:
    async def scenario() -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        authority = make_authority(elsewhere)
        issue_server(authority, elsewhere, ["localhost"], -1)
        pair = [((elsewhere / "server.key").read_bytes(), (elsewhere / "server.pem").read_bytes())]
        expired, authority_pem = grpc.ssl_server_credentials(pair), elsewhere / "authority.pem"
        async with served(tmp_path, tls=expired) as place, place.channel(authority_pem) as channel:
            await unreachable(place, channel, place.enrolled()[1])

    run(scenario())


def test_plaintext_to_a_port_with_tls_gets_no_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, grpc.aio.insecure_channel(f"127.0.0.1:{place.port}") as channel:
            await unreachable(place, channel, place.enrolled()[1])

    run(scenario())


def test_plaintext_is_spoken_on_loopback_with_insecure_and_nowhere_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        credentials, seen = Credentials(tmp_path / "credentials.sqlite"), Seen()
        server = grpc.aio.server(interceptors=[Gate(credentials, Rates(RateSettings()))])
        server.add_generic_rpc_handlers((seen.handlers(),))
        for address, insecure in (("127.0.0.1:0", False), ("0.0.0.0:0", True), ("[::]:0", True)):
            with pytest.raises(TrustError, match=r"plaintext needs --insecure and a loopback address"):
                listen(server, address, None, insecure=insecure)
            with pytest.raises(TrustError, match=r"plaintext needs --insecure and a loopback address"):
                connect(address, None, insecure=insecure)
        port = listen(server, "127.0.0.1:0", None, insecure=True)
        await server.start()
        async with connect(f"127.0.0.1:{port}", None, insecure=True) as channel:
            stub: Any = FederationStub(channel)
            status, _ = await refusal_of(stub.Heartbeat(pb.HeartbeatRequest(), timeout=TIMEOUT))
            assert status is grpc.StatusCode.UNAUTHENTICATED  # plaintext is no way around the gate
            (code,) = credentials.make_codes(1)
            _, token = credentials.enrol(code, "", b"a" * 16)
            assert await stub.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT) == ALIVE
        await server.stop(None)

    run(scenario())


def test_certificates_and_insecure_contradict_each_other(tmp_path: Path) -> None:
    make_authority(tmp_path)
    with pytest.raises(TrustError, match="leave out the one that is not meant"):
        connect("localhost:1", DeviceTls(tmp_path / "authority.pem"), insecure=True)


def test_a_port_that_is_taken_is_said_to_be() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            with pytest.raises(RecipeError, match="is the port taken"):
                listen(server, address, None, insecure=True)
            await server.stop(None)

    run(scenario())


def test_with_mutual_tls_a_device_is_known_by_its_certificate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, mutual=True) as place:
            for name in ("shop-1", "shop-2"):
                issue_client(place.authority, tmp_path, name, 30)
            device = place.credentials.register("shop-1")
            async with place.channel(device="shop-1") as channel:
                stub: Any = FederationStub(channel)
                assert await stub.Heartbeat(pb.HeartbeatRequest(), timeout=TIMEOUT) == ALIVE
                assert place.seen.callers == [device.id]
                place.credentials.revoke(device.id)
                status, _ = await refusal_of(stub.Heartbeat(pb.HeartbeatRequest(), timeout=TIMEOUT))
                assert status is grpc.StatusCode.PERMISSION_DENIED
            async with place.channel(device="shop-2") as channel:
                for name, call in all_calls(FederationStub(channel), ()).items():
                    status, refusal = await refusal_of(call())
                    assert status is grpc.StatusCode.UNAUTHENTICATED, name
                    assert refusal is not None
                    assert "'shop-2' is good, but" in str(refusal)
            assert (len(place.seen.requests), place.seen.decoded) == (1, 0)

    run(scenario())


@pytest.mark.parametrize("which", ["no certificate", "another authority", "expired"])
def test_with_mutual_tls_a_certificate_that_is_not_good_gets_no_answer(which: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, mutual=True) as place:
            place.credentials.register("shop-1")
            other = tmp_path / "other"
            other.mkdir()
            authority = make_authority(other) if which == "another authority" else place.authority
            issue_client(authority, tmp_path, "shop-1", 30)
            if which == "expired":
                issue_client(authority, tmp_path, "shop-1", -1, renew=True)
                pair = [(tmp_path / "clients" / f"shop-1.{each}").read_bytes() for each in ("key", "pem")]
                tls = grpc.ssl_channel_credentials((tmp_path / "authority.pem").read_bytes(), *pair)
                channel = grpc.aio.secure_channel(f"localhost:{place.port}", tls)
            else:
                channel = place.channel(device="shop-1" if which == "another authority" else None)
            async with channel:
                stub: Any = FederationStub(channel)
                status, _ = await refusal_of(stub.Heartbeat(pb.HeartbeatRequest(), timeout=TIMEOUT))
                assert status is grpc.StatusCode.UNAVAILABLE
            assert not place.seen.requests

    run(scenario())


def shown(port: int) -> int:
    """The serial number of the certificate that a port shows to whoever connects now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line, context.wrap_socket(line) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"").serial_number


def test_the_certificate_changes_100_times_while_calls_run_and_none_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place, place.channel() as channel:
            _, token = place.enrolled()
            lasting: Any = FederationStub(channel)
            ended, answered = asyncio.Event(), Counter[str]()

            async def call_on() -> None:
                while not ended.is_set():
                    assert (
                        await lasting.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT) == ALIVE
                    )
                    answered["calls"] += 1
                    await asyncio.sleep(0.02)

            async def fetch_on() -> None:
                while not ended.is_set():
                    chunks = lasting.Fetch(pb.FetchRequest(), metadata=bearer(token), timeout=TIMEOUT)
                    assert len([chunk async for chunk in chunks]) == 200
                    answered["streams"] += 1

            running = [asyncio.create_task(each()) for each in (call_on, fetch_on)]
            serials = [await asyncio.to_thread(shown, place.port)]
            for turn in range(100):
                issue_server(place.authority, tmp_path, ["localhost"], 30, renew=True)
                serials.append(await asyncio.to_thread(shown, place.port))
                if turn % 10 == 0:
                    async with place.channel() as another:
                        new: Any = FederationStub(another)
                        reply = await new.Heartbeat(pb.HeartbeatRequest(), metadata=bearer(token), timeout=TIMEOUT)
                        assert reply == ALIVE
            ended.set()
            await asyncio.gather(*running)
            assert len(set(serials)) == 101
            assert answered["calls"] > 10
            assert answered["streams"] >= 1
            assert not place.seen.refused

    run(scenario())


def test_files_that_do_not_fit_are_not_taken_and_the_last_good_ones_serve_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as place:
            good = await asyncio.to_thread(shown, place.port)
            (tmp_path / "server.key").rename(tmp_path / "kept.key")
            assert await asyncio.to_thread(shown, place.port) == good
            issue_client(place.authority, tmp_path, "other", 1)
            (tmp_path / "clients" / "other.key").rename(tmp_path / "server.key")
            assert await asyncio.to_thread(shown, place.port) == good
            (tmp_path / "server.pem").write_text("half a fi")
            assert await asyncio.to_thread(shown, place.port) == good
            issue_server(read_authority(tmp_path), tmp_path, ["localhost"], 30, renew=True)
            assert await asyncio.to_thread(shown, place.port) != good

    run(scenario())
