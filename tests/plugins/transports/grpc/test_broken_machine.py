"""A broken machine: full disks, locked files, wrong clocks, changing certificates. What was acknowledged is kept."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.transports.grpc.certificates import issue_server
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.transports.grpc.raw import tls
from tests.plugins.transports.grpc.standing import Answer, Standing, standing

ROOT = Path(__file__).resolve().parents[4]
NO_DISK = 77  # of tests/recsys/forks.py
DAY = 86_400


def needed(missing: str, what: str) -> None:
    """Skip for want of something, or fail where nothing may go unseen."""
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set: this must be tried here")
    pytest.skip(f"{missing}: {what}")


def test_a_full_disk_sends_devices_away_and_what_was_acknowledged_counts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.plugins.transports.grpc.full_disk", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == NO_DISK:
        needed(f"this process may not mount a file system ({done.stderr})", "run as root")
    assert done.returncode == 0, done.stderr
    told, before, counted = map(int, done.stdout.split())
    assert told >= 5
    assert 5 <= before < counted == 15


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds an SQLite file for writing."""
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.communicate(b"\n")


def test_a_locked_journal_sends_devices_away_and_holds_up_nothing_else(tmp_path: Path) -> None:
    async def scenario(at: Standing) -> None:
        async with at.round_beside(1, range(3), 3) as found, at.peer(0) as peer, at.peer(1) as other:
            lease = await peer.lease(1)
            await peer.rows(lease)
            payload = encode_submission(at.submission(lease))
            with locked(tmp_path / "journal" / "index.sqlite"):
                submitting = asyncio.create_task(peer.submit(lease.lease, payload))
                asking = asyncio.create_task(other.check_in())
                held = pb.ResumeRequest(lease=lease.lease, digest=bytes(32)).SerializeToString()
                for _ in range(10):
                    assert (await peer.call("Resume", held)).outcome == "held"
                    assert (await peer.rows(lease)).outcome == "part"
                assert not submitting.done()  # which waits for the other process, and these did not wait for it
                for answer in await asyncio.gather(submitting, asking):
                    assert answer.reply.come_back.seconds > 0, answer
            assert (await peer.submit(lease.lease, payload)).reply.acknowledged == pb.Acknowledged()
            assert (await peer.submit(lease.lease, payload)).reply.acknowledged.duplicate
            for client in (1, 2):
                assert (await at.visit(client, 1)).reply.acknowledged == pb.Acknowledged()
        assert len(found.came) == 3

    with standing(tmp_path, 3, journal={"busy_seconds": 2.0}) as at:
        asyncio.run(scenario(at))


def test_locked_credentials_keep_nobody_out_who_is_enrolled(tmp_path: Path) -> None:
    """Their tokens are used for the first time, which is to be noted in the file that is locked."""

    async def scenario(at: Standing) -> list[Answer]:
        async with at.round_beside(1, range(3), 3):
            with locked(tmp_path / "keys" / "credentials.sqlite"):
                return [await at.visit(client, 1) for client in range(3)]

    with standing(tmp_path, 3) as at:
        assert [answer.outcome for answer in asyncio.run(scenario(at))] == ["acknowledged"] * 3


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long off(void) { return atol(getenv("CLOCK_OFF_BY")); }
int clock_gettime(clockid_t which, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, at);
    if (!failed && which == CLOCK_REALTIME) at->tv_sec += off();
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(at, zone);
    if (!failed) at->tv_sec += off();
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes the calendar of a process be off, and leaves the clocks alone that only go forward."""
    compiler = shutil.which("cc")
    if compiler is None:
        needed("there is no C compiler", "install one")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    made = folder / "clock.so"
    subprocess.run([str(compiler), "-shared", "-fPIC", "-o", made, folder / "clock.c", "-ldl"], check=True)
    return made


def visit(at: Standing, client: int, clock: Path, days: int) -> tuple[float, str]:
    """A device whose calendar is so many days off takes part; how many it says that it is, and what came of it."""
    authority, update = at.folder / "keys" / "authority.pem", update_of(at, client).hex()
    order = {"token": at.tokens[client], "port": at.port, "authority": str(authority), "update": update}
    order["folder"] = str(at.folder)
    (at.folder / "order.json").write_text(json.dumps(order))
    command = [sys.executable, "-m", "tests.plugins.transports.grpc.one_visit", str(at.folder / "order.json")]
    environment = {**os.environ, "LD_PRELOAD": str(clock), "CLOCK_OFF_BY": str(days * DAY)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    now, _, said = done.stdout.partition(" ")
    return (float(now) - time.time()) / DAY, said.strip()


def update_of(at: Standing, client: int) -> bytes:
    """What the client would send, under a lease that is still to come."""
    window = next((at.folder / "windows").glob("*-train.json"))
    plan = pb.SignedArtefact.FromString(bytes.fromhex(json.loads(window.read_text())["plan"]))
    return encode_submission(at.submission(pb.Lease(lease=bytes(16), client=client, plan=plan)))


def test_a_device_whose_clock_is_a_day_off_takes_part_as_any(clock: Path, tmp_path: Path) -> None:
    with standing(tmp_path, 3) as at:
        with at.round(1, range(3), 3) as found:
            asyncio.run(at.visit(0, 1))
            for client, days in ((1, -1), (2, 1)):
                off, said = visit(at, client, clock, days)
                assert off == pytest.approx(days, abs=0.1)
                assert said == "acknowledged"
        with at.round(2, range(3), 3) as again:
            for client in range(3):
                asyncio.run(at.visit(client, 2))
    assert_same_bits(dict(found.total().dense), dict(again.total().dense))


def test_a_device_whose_clock_is_far_off_is_told_that_it_is_the_clock(clock: Path, tmp_path: Path) -> None:
    with standing(tmp_path, 1) as at, at.round(1, [0], 1):
        asyncio.run(wait_for_window(at))
        for days, words in (
            (-400, "is not valid yet by the clock of this device"),
            (60, "has expired by the clock of"),
        ):
            off, said = visit(at, 0, clock, days)
            assert off == pytest.approx(days, abs=0.1)
            assert said.startswith("TrustError")
            assert words in said
        assert asyncio.run(at.visit(0, 1)).outcome == "acknowledged"


async def wait_for_window(at: Standing) -> None:
    async with at.peer(0) as peer:
        await peer.lease(1)


def shown(port: int) -> bytes:
    """The certificate that a new connection is shown."""
    with tls(port) as line:
        return line.getpeercert(binary_form=True) or b""


def test_the_certificate_changes_100_times_under_load_and_no_update_is_lost(tmp_path: Path) -> None:
    """Every visit is on a new connection, and some uploads are on their way while it changes."""
    clients, seen = 8, set[bytes]()

    async def rotate(at: Standing) -> None:
        for _ in range(100):
            issue_server(at.authority, tmp_path / "keys", ["localhost"], 30, renew=True)
            seen.add(await asyncio.to_thread(shown, at.port))

    async def scenario(at: Standing) -> None:
        rotating, number = asyncio.create_task(rotate(at)), 0
        while not rotating.done() or number < 3:
            number += 1
            async with at.round_beside(number, range(clients), clients) as found:
                answers = await asyncio.gather(*(at.visit(client, number) for client in range(clients)))
            assert [answer.reply.acknowledged for answer in answers] == [pb.Acknowledged()] * clients
            assert sorted(int(each.clients[0]) for each in found.came if each.clients is not None) == [*range(clients)]
        await rotating

    with standing(tmp_path, clients) as at:
        asyncio.run(scenario(at))
        assert not at.refusals()
    assert len(seen) == 100
