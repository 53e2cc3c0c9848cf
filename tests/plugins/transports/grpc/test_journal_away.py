"""A database that is away: who needs it is asked to come back, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from fedtower.core.journal import Busy, Journal
from fedtower.core.registry import Registry
from fedtower.core.settings import Part
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.plugins.transports.grpc.intake import Limits
from fedtower.plugins.transports.grpc.journal_reads import JournalReads
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.journals.test_postgresql import server
from tests.plugins.transports.grpc.test_intake import Federation, HandClock, caller, clock, federation, registry

if TYPE_CHECKING:
    from fedtower.plugins.journals.postgresql.server import Server

__all__ = ["clock", "federation", "registry", "server"]


@pytest.fixture
def journal(server: Server, clock: HandClock, registry: Registry) -> Iterator[Journal]:
    """In a database, which is waited for until it is back."""
    part = Part("postgresql", {"dsn": server.dsn, "busy_seconds": 60.0})
    opened: Journal = registry.make("journal", part).open(Path(), "a federation", clock)
    yield opened
    opened.close()


async def again(ask: Callable[[], Awaitable[Any]]) -> Any:
    """What is answered once the journal is back."""
    for _ in range(600):
        with suppress(Busy):
            return await ask()
        await asyncio.sleep(0.1)
    raise AssertionError("it did not come back")


def test_a_database_that_is_away_holds_up_those_who_need_it_and_nobody_else(
    server: Server, federation: Federation
) -> None:
    intake = federation.intake = replace(federation.intake, limits=Limits(upload_bytes=1 << 20, journal_seconds=1.0))
    intake.presence.clock = federation.clock

    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease)
        payload = encode_submission(federation.submission(lease))
        server.stop()
        try:
            await asyncio.sleep(0.1)  # what is known of the windows is too old now
            needing = asyncio.ensure_future(
                intake.check_in(caller(1), pb.CheckInRequest(protocol=1).SerializeToString())
            )
            await asyncio.sleep(0.01)
            with pytest.raises(Refused) as stranger:
                await intake.check_in(caller(2), pb.CheckInRequest(protocol=1, federation="b").SerializeToString())
            assert stranger.value.reason is Reason.OTHER_FEDERATION
            wanted = pb.FetchRequest(lease=lease.lease, digest=lease.plan.artefact.digest).SerializeToString()
            plan = b"".join([chunk.data async for chunk in intake.fetch(caller(0), wanted)])
            assert len(plan) == lease.plan.artefact.size
            assert not needing.done()
            with pytest.raises(Busy, match="has not answered") as away:
                await needing
            assert away.value.seconds > 0
            with pytest.raises(Busy, match="has not answered"):
                await federation.submit(lease, payload)
        finally:
            server.start()
        reply = await again(lambda: federation.submit(lease, payload))
        assert reply.WhichOneof("outcome") == "acknowledged"

    with federation.open_round(target=1):
        asyncio.run(story())
    assert len(federation.came) == 1


def test_who_asks_behind_a_question_without_an_answer_is_told_at_once() -> None:
    async def story() -> None:
        answer, asked = Event(), list[int]()
        reads = JournalReads(0.2)
        try:
            with pytest.raises(Busy):
                await reads.ask(answer.wait)
            second = asyncio.ensure_future(reads.ask(lambda: asked.append(1)))
            await asyncio.sleep(0)
            assert second.done()
            assert isinstance(second.exception(), Busy)
        finally:
            answer.set()
        assert await again(lambda: reads.ask(lambda: 7)) == 7
        assert asked == []

    asyncio.run(story())
