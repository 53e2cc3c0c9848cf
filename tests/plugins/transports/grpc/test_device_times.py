"""What visits took of devices: each is told once, when it has ended, and those that brought nothing as waste."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import Plan
from fedtower.core.transport import Abandoned, DeviceTime
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.table import TableSide
from fedtower.plugins.transports.grpc.windows import forget_windows
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.transports.grpc.test_intake import (
    BAD_UPDATES,
    CLIENTS,
    LOCAL,
    PARAMETERS,
    Federation,
    caller,
    clock,
    federation,
    journal,
    registry,
)

__all__ = ["clock", "federation", "journal", "registry"]


def counted(round: int, *clients: int) -> Cohort:
    return Cohort(round, np.array(clients, dtype=np.int64), CLIENTS)


async def round_of(federation: Federation, side: TableSide, round: int, story: Any) -> None:
    """A round that is read meanwhile; it may be abandoned."""
    plan, everybody = Plan(round, PARAMETERS, LOCAL), Cohort(round, np.arange(CLIENTS), CLIENTS)

    def read() -> None:
        try:
            federation.came.extend(side.exchange(plan, everybody, None, Draws(1), None))  # type: ignore[arg-type]
        except Abandoned as reason:
            federation.reasons.append(str(reason))

    reading = asyncio.get_running_loop().run_in_executor(None, read)
    try:
        await story()
    except BaseException:
        side.journal.advance(side.epoch, round, "train", "abandoned", "the test failed")
        raise
    finally:
        await reading


async def bad(federation: Federation, client: int, kind: str) -> None:
    lease = await federation.lease(client)
    reason, changes = BAD_UPDATES[kind]
    with pytest.raises(Refused) as error:
        await federation.submit(lease, encode_submission(federation.submission(lease, **changes)), client)
    assert error.value.reason is reason
    await noted(federation, lease)


async def noted(federation: Federation, lease: pb.Lease) -> None:
    """The journal notes the end of a visit beside the answer: time stands still until it has."""
    for _ in range(1_000):
        held = federation.intake.journal.find(lease.lease)
        if held is not None and held.ended is not None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was noted")


def test_visits_that_were_refused_late_or_silent_are_told_once_and_as_waste(federation: Federation) -> None:
    side, clock = replace(federation.side, target=2), federation.clock

    async def first() -> None:
        slow = await federation.lease(3)
        await federation.rows(slow, 3)  # its update is a good one, and late
        clock.seconds += 10.0  # 1010
        await federation.good(0)
        leases = [await federation.lease(client) for client in (1, 2)]
        clock.seconds += 5.0
        await bad(federation, 1, "wrong shape")
        clock.seconds += 15.0  # 1030
        await federation.rows(leases[1], 2)
        await federation.submit(leases[1], encode_submission(federation.submission(leases[1])), 2)
        late.append(slow)

    async def second() -> None:
        alive = await federation.lease(0)
        clock.seconds += 4.0
        request = pb.HeartbeatRequest(lease=alive.lease).SerializeToString()
        await federation.intake.heartbeat(caller(0), request)
        clock.seconds += 400.0  # the deadline, long after the lease

    async def story() -> None:
        await round_of(federation, side, 1, first)
        # Of client 0, which was given a lease and handed in at one moment, nothing; of 2, 20 s; of 1, which was
        # refused, 5 s; and nobody knows yet of client 3, which is at work.
        assert side.times.spent(counted(1, 0, 2)) == DeviceTime(seconds=25.0, wasted=5.0, late=0)
        clock.seconds += 12.0
        payload = encode_submission(federation.submission(late[0]))
        with pytest.raises(Refused) as error:
            await federation.submit(late[0], payload, 3)
        assert error.value.reason is Reason.LATE
        await round_of(federation, side, 2, second)

    late: list[pb.Lease] = []
    asyncio.run(story())
    assert federation.reasons == ["after 300 s there were 0 of 2 updates, and the quorum is 2"]
    # Client 3 came after 42 s, and the other one was heard of 4 s after it had begun.
    spent = side.times.spent(counted(2))
    assert spent == DeviceTime(seconds=46.0, wasted=46.0, late=1)
    forget_windows(side.windows, 1)
    again = replace(side).times  # of a process that goes on after a kill
    assert again.spent(counted(2)) == spent
    assert again.spent(counted(3)) == DeviceTime()


def test_what_was_accepted_and_does_not_count_is_waste(federation: Federation) -> None:
    side = replace(federation.side, target=2)

    async def story() -> None:
        async def both() -> None:
            leases = [await federation.lease(client) for client in (0, 1)]
            for lease in leases:
                federation.clock.seconds += 3.0
                await federation.rows(lease, lease.client)
                await federation.submit(lease, encode_submission(federation.submission(lease)), lease.client)

        await round_of(federation, side, 1, both)

    asyncio.run(story())
    assert side.times.spent(counted(1, 1)) == DeviceTime(seconds=9.0, wasted=3.0)


def test_what_a_lease_that_ran_out_has_told_is_not_told_again(federation: Federation) -> None:
    side, clock = replace(federation.side, target=1), federation.clock

    async def story() -> None:
        async def first() -> None:
            late.append(await federation.lease(3))
            await federation.rows(late[0], 3)
            clock.seconds += 7.0
            await federation.intake.heartbeat(caller(3), pb.HeartbeatRequest(lease=late[0].lease).SerializeToString())
            clock.seconds += 80.0
            await federation.good(0)

        await round_of(federation, side, 1, first)
        assert side.times.spent(counted(1, 0)) == DeviceTime(seconds=7.0, wasted=7.0)
        clock.seconds += 5.0
        with pytest.raises(Refused):
            await federation.submit(late[0], encode_submission(federation.submission(late[0])), 3)
        await noted(federation, late[0])
        assert side.times.spent(counted(2)) == DeviceTime(seconds=85.0, wasted=85.0, late=1)

    late: list[pb.Lease] = []
    asyncio.run(story())
