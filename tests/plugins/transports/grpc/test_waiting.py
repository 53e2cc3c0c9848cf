"""Bells and held calls: who waits is called when there is something, and only those for whom there is."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from fedtower.core.journal import Instant
from fedtower.plugins.transports.grpc.bell import Bell, ring
from fedtower.plugins.transports.grpc.presence import Presence, silent
from fedtower.plugins.transports.grpc.waiting import Waiting


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A folder whose name is longer than a socket's address may be."""
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    return folder


def test_a_bell_is_heard_once_however_often_it_rang(far: Path) -> None:
    bell = Bell.hang(far, "intake-1")
    for _ in range(2000):  # more than a socket holds: who rings is never held up
        ring(far, "intake-*")
    assert bell.wait(5.0)
    assert not bell.wait(0.0)
    bell.close()
    assert list(far.iterdir()) == []


def test_all_bells_of_a_name_ring_and_no_others(far: Path) -> None:
    bells = [Bell.hang(far, name) for name in ("intake-1", "intake-2", "table")]
    ring(far, "intake-*")
    assert [bell.wait(0.0) for bell in bells] == [True, True, False]
    for bell in bells:
        bell.close()


def test_the_bell_of_a_process_that_was_killed_is_taken_down(far: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    place = os.open(far, os.O_PATH)
    left.bind(f"/proc/self/fd/{place}/intake-9")
    os.close(place)
    left.close()  # and its name stays, as after a kill
    ring(far, "intake-*")
    assert list(far.iterdir()) == []
    ring(far / "nowhere", "intake-*")


def test_those_who_are_called_come_and_the_others_wait_on() -> None:
    async def story() -> None:
        waiting = Waiting(most=3)
        held = {client: asyncio.create_task(waiting.called(client, 30.0)) for client in (1, 2, 3)}
        await asyncio.sleep(0)
        assert not await waiting.called(4, 30.0)  # one too many
        waiting.call(np.array([2, 3, 7]))
        assert [await held[client] for client in (2, 3)] == [True, True]
        assert not held[1].done()
        again = asyncio.create_task(waiting.called(1, 0.01))
        assert not await held[1]  # the same client has called anew
        assert not await again  # its time is over
        hung_up = asyncio.create_task(waiting.called(5, 30.0))
        await asyncio.sleep(0)
        hung_up.cancel()
        await asyncio.wait([hung_up])
        assert len(waiting) == 0

    asyncio.run(story())


class HandClock:
    def __init__(self) -> None:
        self.seconds, self.boot = 100.0, "a boot"

    def __call__(self) -> Instant:
        return Instant(self.boot, self.seconds)


def test_who_says_nothing_is_silent_once_an_intake_has_listened_for_so_long(tmp_path: Path) -> None:
    clock, clients = HandClock(), np.array([1, 2, 3])
    intake = Presence(tmp_path, clock)

    def listen(seconds: int, *calling: int) -> list[int]:
        for _ in range(seconds):
            clock.seconds += 1.0
            for client in calling:
                intake.saw(client)
            intake.write(within_seconds=60.0)
        found: list[int] = silent(tmp_path, clients, 10.0, clock).tolist()
        return found

    assert silent(tmp_path, clients, 10.0, clock).tolist() == []  # nobody listens
    assert listen(9, 1) == []  # not for long enough
    assert listen(5, 1) == [2, 3]
    assert listen(1, 2) == [3]
    clock.seconds += 30.0
    assert silent(tmp_path, clients, 10.0, clock).tolist() == []  # the intake is away: who would have heard them?
    intake = Presence(tmp_path / "", clock)  # it is started again, and has heard nobody yet
    assert listen(8) == []
    assert listen(8, 3) == [1, 2]
    for path in list(tmp_path.iterdir()):  # it is killed, and the next is another process
        path.rename(path.with_name(path.name.replace(f"-{os.getpid()}.", "-1.")))
    clock.seconds += 30.0
    intake = Presence(tmp_path, clock)
    assert listen(2, 1) == [2]  # client 3 was heard in the ten seconds of listening before
    assert listen(8) == [2]
    assert listen(2) == [2, 3]
    clock.boot, clock.seconds = "another boot", 50.0
    assert silent(tmp_path, clients, 10.0, clock).tolist() == []
