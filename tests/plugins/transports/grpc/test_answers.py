"""Answers of another thread: each comes to who waits for it, and what nobody waits for any more is called off."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from threading import Thread

import pytest

from fedtower.plugins.transports.grpc.answers import Answers


def test_every_answer_comes_to_who_waits_for_it_however_they_fall_together() -> None:
    async def story() -> list[int]:
        answers, promised = Answers(), [Future[int]() for _ in range(2_000)]

        def answer(start: int) -> None:
            for number in range(start, len(promised), 4):
                promised[number].set_result(number)

        waiting = [answers.of(each) for each in promised]
        threads = [Thread(target=answer, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(60):
            found = await asyncio.gather(*waiting)
        for thread in threads:
            thread.join()
        return list(found)

    assert asyncio.run(story()) == list(range(2_000))


def test_an_error_comes_as_an_error_and_a_cancelled_one_as_cancelled() -> None:
    async def story() -> None:
        answers, failed, called_off = Answers(), Future[int](), Future[int]()
        waiting = [answers.of(failed), answers.of(called_off)]
        failed.set_exception(OSError("full"))
        called_off.cancel()
        with pytest.raises(OSError, match="full"):
            await waiting[0]
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]

    asyncio.run(story())


def test_what_nobody_waits_for_any_more_is_called_off() -> None:
    async def story() -> None:
        answers, promised = Answers(), Future[int]()
        waiting = asyncio.ensure_future(answers.of(promised))
        waiting.cancel()
        await asyncio.sleep(0)
        assert promised.cancelled()

    asyncio.run(story())
