"""An intake that has just begun, or is one of several, holds an update to all that the first one would."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from fedtower.core.updates import Rows
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.plugins.transports.grpc.intake import Intake
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from tests.plugins.transports.grpc.test_intake import (
    Federation,
    caller,
    clock,
    federation,
    journal,
    parts,
    registry,
    spoilt,
)

__all__ = ["clock", "federation", "journal", "registry"]  # fixtures


def another(of: Federation) -> Intake:
    """An intake that has seen nothing yet, over the same journal and folder."""
    made = replace(of.intake)
    made.presence.clock = of.clock
    return made


def test_the_first_call_of_an_intake_may_be_an_upload_and_it_is_checked(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease)
        nan = spoilt(dense={"w": np.full((1, 2, 3), np.nan, np.float32), "b": np.ones((1, 3), np.float32)})
        bad = encode_submission(federation.submission(lease, updates=nan))
        with pytest.raises(Refused) as refused:
            await another(federation).submit(caller(0), parts(lease.lease, bad))
        assert refused.value.reason is Reason.NOT_FINITE
        await federation.submit(lease, encode_submission(federation.submission(lease)))

    with federation.open_round(target=1):
        asyncio.run(story())
    assert len(federation.came) == 1


def test_rows_that_two_intakes_have_given_out_may_both_come_back(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)
        await federation.rows(lease, ids=(1,))
        first, federation.intake = federation.intake, another(federation)
        await federation.rows(lease, ids=(3,))
        strange = spoilt(rows={"item": Rows(np.array([0, 1]), np.array([5]), np.ones((1, 4), np.float32))})
        for intake in (first, federation.intake):
            bad = encode_submission(federation.submission(lease, updates=strange))
            with pytest.raises(Refused) as refused:
                await intake.submit(caller(0), parts(lease.lease, bad))
            assert refused.value.reason is Reason.ROW_NOT_LEASED
        reply = await first.submit(caller(0), parts(lease.lease, encode_submission(federation.submission(lease))))
        assert reply.WhichOneof("outcome") == "acknowledged"

    with federation.open_round(target=1):
        asyncio.run(story())


def test_the_examples_that_a_device_told_another_intake_bind_it(federation: Federation) -> None:
    async def story() -> None:
        lease = await federation.lease(0)  # which says 9 examples
        federation.intake = another(federation)
        await federation.rows(lease)
        many = encode_submission(replace(federation.submission(lease), num_examples=10))
        with pytest.raises(Refused) as refused:
            await federation.submit(lease, many)
        assert refused.value.reason is Reason.NUM_EXAMPLES
        await federation.submit(lease, encode_submission(federation.submission(lease)))

    with federation.open_round(target=1):
        asyncio.run(story())
