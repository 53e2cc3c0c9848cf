"""Room for uploads: nobody is forgotten, nobody overtakes, and the line has an end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from fedtower.core.journal import Busy
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.room import Room


async def take(room: Room, wanted: int, until: asyncio.Event, came: list[str], name: str) -> None:
    async with room.room(wanted):
        came.append(name)
        await until.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_those_who_do_not_fit_wait_and_a_small_one_does_not_overtake() -> None:
    async def story() -> None:
        room, came, first, rest = Room(10, 5.0), list[str](), asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(take(room, 7, first, came, "first"))]
        await settle()
        tasks += [
            asyncio.create_task(take(room, size, rest, came, name)) for name, size in (("large", 8), ("small", 2))
        ]
        await settle()
        assert came == ["first"]  # the small one would fit
        first.set()
        await settle()
        assert came == ["first", "large", "small"]
        rest.set()
        await asyncio.gather(*tasks)

    asyncio.run(story())


def test_one_that_is_larger_than_all_the_room_has_it_alone() -> None:
    async def story() -> None:
        room, came, go = Room(10, 5.0), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(take(room, size, go, came, str(size))) for size in (50, 1)]
        await settle()
        assert came == ["50"]
        go.set()
        await asyncio.gather(*tasks)
        assert came == ["50", "1"]

    asyncio.run(story())


@pytest.mark.parametrize("let_in", [False, True])
def test_the_place_of_one_that_goes_while_it_waits_is_not_lost(let_in: bool) -> None:
    async def story() -> None:
        room, came, first, rest = Room(10, 5.0), list[str](), asyncio.Event(), asyncio.Event()
        rest.set()
        holding = asyncio.create_task(take(room, 10, first, came, "first"))
        await settle()
        gone = asyncio.create_task(take(room, 10, rest, came, "gone"))
        last = asyncio.create_task(take(room, 10, rest, came, "last"))
        await settle()
        if let_in:  # its turn has come, and it has not run yet
            first.set()
            await holding
        gone.cancel()
        first.set()
        await asyncio.gather(holding, gone, last, return_exceptions=True)
        assert came == ["first", "last"]
        async with asyncio.timeout(5.0), room.room(10):
            pass

    asyncio.run(story())


def test_when_the_line_is_long_those_who_come_are_given_times_one_after_another() -> None:
    async def story() -> None:
        room, came, go = Room(10, 5.0, line=2), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(take(room, 10, go, came, str(turn))) for turn in range(3)]
        await settle()
        times = []
        for _ in range(4):
            with pytest.raises(Busy) as busy:
                async with room.room(1):
                    pass
            times.append(busy.value.seconds)
        assert times == sorted(set(times))
        assert times[0] > 0
        assert times[-1] <= 60.0
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(story())


def test_who_is_slow_gives_way_to_one_that_waits() -> None:
    async def story() -> None:
        room = Room(10, 0.0)

        async def slow() -> None:
            async with room.room(10), room.receiving(b"lease", "client 1"):
                await asyncio.sleep(60)

        async with AsyncExitStack() as stack:
            coming = asyncio.create_task(slow())
            await asyncio.sleep(0.01)
            await stack.enter_async_context(asyncio.timeout(20.0))
            await stack.enter_async_context(room.room(10))
            with pytest.raises(Refused) as refused:
                await coming
        assert refused.value.reason is Reason.TRUNCATED
        assert refused.value.retry_after_seconds > 0

    asyncio.run(story())
