"""Room for uploads: who is slow gives way to those who wait, and to nobody else."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fedtower.plugins.transports.grpc.refusals import Refused
from fedtower.plugins.transports.grpc.room import Room

LATER = 0.05


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


async def hold(room: Room, lease: bytes, size: int, until: asyncio.Event) -> str:
    async with room.room(size):
        try:
            async with room.receiving(lease, "client 1"):
                await until.wait()
        except Refused as refused:
            return f"{refused.reason.name}, {refused.retry_after_seconds:g} s: {refused}"
    return "done"


def test_who_is_slow_gives_way_to_one_who_waits_and_goes_on_where_nobody_does() -> None:
    async def story() -> None:
        room, never, now = Room(100, LATER), asyncio.Event(), asyncio.Event()
        now.set()
        slow = asyncio.create_task(hold(room, b"a", 90, never))
        beside = asyncio.create_task(hold(room, b"b", 10, never))
        await asyncio.sleep(3 * LATER)
        assert not slow.done()  # nobody waits
        assert await hold(room, b"c", 50, now) == "done"
        assert (await slow).startswith("TRUNCATED, 1 s: the upload of client 1 was cut off: it took more")
        assert "others wait" in await beside
        assert await hold(room, b"a", 90, now) == "done"  # and comes back

    run(story())


def test_who_is_quick_is_waited_for() -> None:
    async def story() -> None:
        room, later = Room(100, 60.0), asyncio.Event()
        quick = asyncio.create_task(hold(room, b"a", 90, later))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(hold(room, b"b", 50, later))
        await asyncio.sleep(1.2)  # it has looked twice
        assert not waiting.done()
        later.set()
        assert list(await asyncio.gather(quick, waiting)) == ["done", "done"]

    run(story())


def test_a_second_upload_under_a_lease_ends_the_first() -> None:
    async def story() -> None:
        room, never, now = Room(100, 60.0), asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(hold(room, b"a", 10, never))
        await asyncio.sleep(0)
        now.set()
        assert await hold(room, b"a", 10, now) == "done"
        assert "another upload under the same lease" in await first

    run(story())


def test_one_that_is_larger_than_all_has_it_alone_and_room_that_was_had_is_given_back() -> None:
    async def story() -> None:
        room, now = Room(100, 60.0), asyncio.Event()
        now.set()
        assert await asyncio.gather(*(hold(room, bytes([number]), 150, now) for number in range(5))) == ["done"] * 5
        with pytest.raises(ConnectionError):
            async with room.room(100), room.receiving(b"a", "client 1"):
                raise ConnectionError
        async with asyncio.timeout(1.0), room.room(100):
            pass

    run(story())
