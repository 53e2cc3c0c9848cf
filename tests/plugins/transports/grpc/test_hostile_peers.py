"""Peers that mean harm, at a real intake: nothing of theirs counts, and healthy devices go on beside them."""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.bounds import CALL_BYTES
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.plugins.transports.grpc.refusals import Reason
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.transports.grpc.damage import damaged
from tests.plugins.transports.grpc.raw import garbage, half_open, tcp
from tests.plugins.transports.grpc.standing import REPLIES, Answer, Peer, Standing, each, parts, requests, standing

MIB = 1 << 20
HEALTHY, HOSTILE, OTHER = 4, 4, 5


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """One federation for all that can share one: what is done to it in one test, it has behind it in the next."""
    with standing(tmp_path_factory.mktemp("federation"), 6) as at:
        yield at


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many connections in this process as the system allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def healthy(at: Standing) -> None:
    """A round of the healthy devices ends as it would without the others."""
    number = next(at.numbers)
    async with at.round_beside(number, range(HEALTHY), HEALTHY) as found:
        answers = await asyncio.gather(*(at.visit(client, number) for client in range(HEALTHY)))
        assert {answer.outcome for answer in answers} == {"acknowledged"}
    assert (len(found.came), found.reasons) == (HEALTHY, [])


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 280.0))


async def malformed(at: Standing, peer: Peer, lease: pb.Lease, seed: int) -> Answer:
    """What is answered to one message that is damaged, or that never was one; seven of eight are of a known device."""
    draw = random.Random(seed)
    if draw.random() < 1 / 8:
        peer = replace(peer, metadata=())
    name = draw.choice(list(REPLIES))
    if name == "Submit":
        return await peer.call(name, each(_upload(at, lease, draw)))
    good = requests(lease.lease, lease.plan.artefact.digest)[name]
    bad = draw.randbytes(draw.randrange(2_000)) if draw.random() < 0.3 else damaged(seed, good)
    return await peer.call(name, bad)


def _upload(at: Standing, lease: pb.Lease, draw: random.Random) -> list[bytes]:
    """Parts of an upload, some of them damaged, missing, doubled or in another order; or a damaged update, whole."""
    payload = encode_submission(at.submission(lease))
    if draw.random() < 0.5:
        return parts(lease.lease, damaged(draw.randrange(1 << 30), payload))
    made = parts(lease.lease, payload)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(made))
        made[place : place + 1] = draw.choice(
            [[], [made[place]] * 2, [damaged(draw.randrange(1 << 30), made[place])], [b""], [draw.randbytes(50)]]
        )
        made = made or [b""]
    if draw.random() < 0.3:
        draw.shuffle(made)
    return made


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_malformed_messages_are_answered_and_leave_nothing_behind(
    count: int, at: Standing, capsys: pytest.CaptureFixture[str]
) -> None:
    said, grown = Counter[str](), 0

    async def scenario() -> None:
        number = next(at.numbers)
        nonlocal grown
        seeds, warm = iter(range(count)), min(count // 4, 5_000)

        async def flood(lease: pb.Lease, until: int) -> None:
            async with at.peer(HOSTILE) as peer:
                for seed in seeds:
                    answer = await malformed(at, peer, lease, seed)
                    said[answer.reason.name if answer.reason else answer.outcome] += 1
                    if seed >= until:
                        return

        async with at.round_beside(number, range(HEALTHY + 1), HEALTHY + 1) as found:
            async with at.peer(HOSTILE) as peer:
                lease = await peer.lease(number)
                await asyncio.gather(*(flood(lease, warm) for _ in range(4)))
                before = at.resident()
                await asyncio.gather(*(flood(lease, count) for _ in range(4)))
            seconds, grown = await good(at), at.resident() - before
            with capsys.disabled():
                sys.stdout.write(f"\n{said.total():,} malformed: {grown / MIB:.1f} MB, then {1e3 * seconds:.1f} ms\n")
            for client in range(HEALTHY):
                assert (await at.visit(client, number)).outcome == "acknowledged"
            async with at.peer(HOSTILE) as peer:  # of which one update may have been good by chance
                await peer.submit(lease.lease, encode_submission(at.submission(lease, updates=without_rows)))
        assert len(found.came) == HEALTHY + 1

    run(scenario())
    assert said.total() >= count
    # Every one has an answer that says what is wrong, unless what was left of it is good; none is an error of the
    # server's own.
    good_still = {"lease", "come_back", "alive", "held", "data", "part", "acknowledged", "None", "CANCELLED"}
    assert set(said) <= {reason.name for reason in Reason} | good_still
    assert sum(said[each] for each in good_still) < 0.4 * count
    assert {"CORRUPT", "TRUNCATED", "UNKNOWN_DEVICE", "UNKNOWN_LEASE"} <= set(said)
    assert b"Traceback" not in (at.folder / "intake.log").read_bytes()
    assert grown < 10 * MIB


async def good(at: Standing) -> float:
    """The seconds until a healthy device has its answer, on a connection of its own."""
    async with at.peer(OTHER) as peer:
        began = time.perf_counter()
        assert (await peer.check_in()).outcome == "come_back"
        return time.perf_counter() - began


def without_rows(updates: Updates) -> Updates:
    return replace(updates, rows={})


@pytest.mark.parametrize("known", [True, False], ids=["of a device", "of a stranger"])
def test_a_bomb_is_refused_before_it_is_inflated(known: bool, at: Standing) -> None:
    """50 MB of nothing, in 50 kB."""
    bomb = bytes(50 * MIB)

    async def scenario() -> None:
        async with at.peer(HOSTILE if known else None) as peer:
            await peer.check_in()
            await peer.call("CheckIn", bytes(1_000), compression=grpc.Compression.Gzip)  # code that is used once
            Path(f"/proc/{at.process.pid}/clear_refs").write_text("5")  # the peak is counted from now on
            before = at.peak()
            for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
                answer = await peer.call("Resume", bomb, compression=algorithm)
                assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in answer.details
            answer = await peer.call("Submit", each([bomb]), compression=grpc.Compression.Gzip)
            assert answer.status in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)
            assert at.peak() - before < 10 * MIB
            # A small one is read as any other, and is no way around the limits.
            small = await peer.call("CheckIn", bytes(CALL_BYTES - 100), compression=grpc.Compression.Gzip)
            assert small.reason is (Reason.TOO_LARGE if known else Reason.UNKNOWN_DEVICE)
        await healthy(at)

    run(scenario())


def test_messages_in_messages_without_end_are_refused(at: Standing) -> None:
    """Groups in groups, in the fields of all calls: parsed by recursion, they would overflow the stack."""
    deep = {depth: b"\xfb\x07" * depth + b"\xfc\x07" * depth for depth in (200, 10_000, 70_000)}

    async def scenario() -> None:
        number = next(at.numbers)
        async with at.peer(HOSTILE) as peer:
            for data in deep.values():
                for name in set(REPLIES) - {"Submit"}:
                    answer = await peer.call(name, data)
                    assert answer.reason in (Reason.CORRUPT, Reason.TOO_LARGE), (name, answer)
                assert (await peer.call("Submit", each([data]))).reason is Reason.CORRUPT
        async with at.round_beside(number, [HOSTILE], 1), at.peer(HOSTILE) as peer:
            lease = await peer.lease(number)
            for data in deep.values():
                assert (await peer.submit(lease.lease, data)).reason is Reason.CORRUPT
            await peer.submit(lease.lease, encode_submission(at.submission(lease, updates=without_rows)))
        await healthy(at)

    run(scenario())


def test_of_an_unauthenticated_peer_nothing_is_decoded_and_nothing_kept(tmp_path: Path) -> None:
    """Garbage is not told to be garbage: whoever decoded it would say so."""

    async def scenario(at: Standing) -> None:
        async with AsyncExitStack() as stack:
            strangers = [await stack.enter_async_context(at.peer(None, token)) for token in (None, "", "0123.456")]
            for peer in strangers:
                for name in set(REPLIES) - {"Enrol"}:
                    data = each([b"\xff" * 1_000] * 3) if name == "Submit" else b"\xff" * 1_000
                    answer = await peer.call(name, data)
                    assert (answer.reason, answer.status) == (
                        Reason.UNKNOWN_DEVICE,
                        grpc.StatusCode.UNAUTHENTICATED,
                    ), name
            assert at.refusals() == {"unknown_device": 3 * (len(REPLIES) - 1)}
            assert not at.counted("fedtower_call_seconds_count")  # no handler was called
            assert (await strangers[0].call("Enrol", b"\xff" * 1_000)).reason is Reason.CORRUPT  # the one open door
        await healthy(at)

    with standing(tmp_path, 6) as at:
        run(scenario(at))


def test_a_thousand_half_open_connections_are_beside_the_healthy(tmp_path: Path, many_files: None) -> None:
    """Also where a process is begun with few open files, as it is nearly everywhere."""
    few = ["sh", "-c", 'ulimit -S -n 256; exec "$0" "$@"', sys.executable]

    async def scenario(at: Standing) -> None:
        await healthy(at)
        files, before = at.files(), at.resident()
        with half_open(at.port, 1_000):
            assert at.files() > files + 900
            await healthy(at)
            assert at.resident() - before < 100 * MIB
        for _ in range(500):
            if at.files() <= files + 10:
                break
            await asyncio.sleep(0.02)
        assert at.files() <= files + 10
        await healthy(at)

    with standing(tmp_path, 6, command=few) as at:
        run(scenario(at))


def test_an_intake_without_files_to_open_sends_devices_away_and_lives_on(tmp_path: Path) -> None:
    """Of connections it may have no more, and nothing that it would have to open for a device."""
    few = ["sh", "-c", 'ulimit -n 128; exec "$0" "$@"', sys.executable]

    async def scenario(at: Standing) -> None:
        number = next(at.numbers)
        async with at.round_beside(number, range(HEALTHY), HEALTHY), at.peer(0) as peer:
            lease = await peer.lease(number)
            with ExitStack() as lines:
                for _ in range(300):
                    lines.enter_context(tcp(at.port))
                for _ in range(500):
                    if at.files() == 128:
                        break
                    await asyncio.sleep(0.02)
                answer = await peer.rows(lease)  # which are noted in a file
                assert answer.reply.come_back.seconds > 0, answer
            for client in range(HEALTHY):
                assert (await at.visit(client, number)).outcome == "acknowledged"

    with standing(tmp_path, 6, command=few) as at:
        run(scenario(at))


@pytest.mark.soak
def test_connections_that_come_to_nothing_are_closed_by_the_server(at: Standing, many_files: None) -> None:
    async def scenario() -> None:
        await healthy(at)
        files = at.files()
        with half_open(at.port, 1_000):
            # Of five, three never come to HTTP/2: of these none is there after 20 s.
            await asyncio.sleep(25.0)
            assert at.files() < files + 450
            await healthy(at)

    run(scenario())


@pytest.mark.parametrize("count", [40, pytest.param(2_000, marks=pytest.mark.soak)])
def test_garbage_on_every_layer_harms_nobody(count: int, at: Standing) -> None:
    async def scenario() -> None:
        draws = [random.Random(seed) for seed in range(count)]
        lines = [asyncio.to_thread(garbage, at.port, draw) for draw in draws]
        await asyncio.gather(healthy(at), *lines)
        await healthy(at)

    run(scenario())
    assert b"Traceback" not in (at.folder / "intake.log").read_bytes()


def test_uploads_that_never_end_keep_nobody_out(at: Standing) -> None:
    """One announces all the room that there is, and sends a byte now and then; others begin and say nothing."""
    stop = asyncio.Event()

    async def drip(lease: bytes) -> AsyncIterator[bytes]:
        yield parts(lease, b"x", size=64 * MIB)[0]
        while not stop.is_set():
            yield pb.SubmitPart(data=b"x").SerializeToString()
            await asyncio.sleep(0.1)

    async def silence() -> AsyncIterator[bytes]:
        await stop.wait()
        if not stop.is_set():
            yield b""

    async def scenario() -> None:
        number = next(at.numbers)
        async with at.peer(HOSTILE) as slow, at.peer(None) as stranger:
            async with at.round_beside(number, range(HEALTHY + 1), HEALTHY + 1) as found:
                lease = await slow.lease(number)
                dripping = asyncio.create_task(slow.call("Submit", drip(lease.lease)))
                silent = [asyncio.create_task(peer.call("Submit", silence())) for peer in [slow, stranger] * 10]
                await asyncio.sleep(0.5)
                for client in range(HEALTHY):
                    assert (await at.visit(client, number)).outcome == "acknowledged"
                stop.set()
                for answer in await asyncio.gather(dripping, *silent):
                    assert answer.reason in (Reason.TRUNCATED, Reason.UNKNOWN_DEVICE), answer
                # Whoever was cut off goes on, and may still do right.
                update = encode_submission(at.submission(lease, updates=without_rows))
                assert (await slow.submit(lease.lease, update)).outcome == "acknowledged"
            assert len(found.came) == HEALTHY + 1

    run(scenario())
