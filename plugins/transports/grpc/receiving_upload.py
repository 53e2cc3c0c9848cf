"""ReceivingUpload: what an intake does with an upload: takes it in, puts it together, checks it, has it made durable.

It takes its place in memory before its bytes come, and goes on where an earlier one broke off.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedtower.core.journal import Outcome, Upload
from fedtower.plugins.transports.grpc.bell import TABLE, ring
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.checks import Expected, refuse_unfit
from fedtower.plugins.transports.grpc.codec import data_of_part, decode_submission
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.room import Room
from fedtower.protos.v1 import federation_pb2 as pb

if TYPE_CHECKING:
    from fedtower.plugins.transports.grpc.intake import Caller, Intake

_SMALL = 64 << 10  # to check so few bytes takes less than to hand them to another thread and back
_PIECE = 2047


@dataclass
class ReceivingUpload:
    """Receives the uploads of an intake; ``uploads`` are on their way now."""

    intake: Intake
    uploads: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        limits = self.intake.limits
        self._memory = Room(limits.memory_bytes, limits.slow_seconds)
        self._checking = ThreadPoolExecutor(1, "check")

    async def submit(self, caller: Caller, parts: AsyncIterator[bytes]) -> pb.SubmitReply:
        """An upload: received, checked, made durable, and only then acknowledged."""
        self.uploads += 1
        try:
            return await self._submitted(caller, parts)
        finally:
            self.uploads -= 1

    async def _submitted(self, caller: Caller, parts: AsyncIterator[bytes]) -> pb.SubmitReply:
        header = await self._header(caller, parts)
        round, task = await self.intake.lease_of(caller, header.lease)
        async with self._memory.room(header.size + _besides(header.size)) as room:
            async with room.receiving(header.lease, caller.whose):
                data = _data_of(parts, caller.whose)
                payload = await self.intake.staging.receive((round, task), header, caller.whose, data)
            self.intake.meters.received(len(payload))
            expected = await self.intake.waits_for(round, task)
            with self.intake.in_vain(header.lease, came=True):
                if len(payload) <= _SMALL:
                    self._check(caller, expected, header, payload)
                else:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._checking, self._check, caller, expected, header, payload)
            upload = Upload(header.lease, header.digest, (payload,))
            try:
                outcome = await self.intake.durable(self.intake.journal.accept(upload))
            finally:
                self.intake.staging.forget((round, task), header.lease, header.digest)
        with self.intake.in_vain(header.lease, came=True):
            _refuse_outcome(outcome, caller, round)
        if outcome is Outcome.ACCEPTED:
            ring(self.intake.folder / "bells", TABLE)
        self.intake.meters.acknowledged(task, duplicate=outcome is Outcome.DUPLICATE)
        return pb.SubmitReply(acknowledged=pb.Acknowledged(duplicate=outcome is Outcome.DUPLICATE))

    async def _header(self, caller: Caller, parts: AsyncIterator[bytes]) -> pb.SubmitHeader:
        try:
            async with asyncio.timeout(self.intake.limits.header_seconds):
                first = parse(pb.SubmitPart, await anext(parts), whose=caller.whose)
        except (StopAsyncIteration, TimeoutError):
            raise Refused(Reason.TRUNCATED, f"{caller.whose} submitted nothing") from None
        header = first.header
        if first.WhichOneof("part") != "header" or len(header.digest) != 32 or len(header.lease) != 16:
            raise Refused(Reason.CORRUPT, f"an upload of {caller.whose} begins without a header")
        if header.size > self.intake.limits.upload_bytes or header.offset > header.size:
            raise Refused(
                Reason.TOO_LARGE,
                f"{caller.whose} announced an update of {header.size:,} bytes from {header.offset:,} on; the limit is "
                f"{self.intake.limits.upload_bytes:,}",
            )
        return header

    def _check(self, caller: Caller, expected: Expected | None, header: pb.SubmitHeader, payload: memoryview) -> None:
        """Raise Refused unless these bytes may count; a round that is over is the journal's matter."""
        if _sha256(payload) != header.digest:
            raise Refused(Reason.CORRUPT, f"an update of {caller.whose} is not what its digest says; send it again")
        submission = decode_submission(payload, caller.client, most_bytes=self.intake.limits.upload_bytes)
        if expected is None:
            return
        window = (expected.window.round, expected.window.task)
        try:
            refuse_unfit(submission, expected, header.lease, caller, *self.intake.leased.known(window, header.lease))
        except Refused:  # another intake may have given out more
            refuse_unfit(submission, expected, header.lease, caller, *self.intake.leased.of(window, header.lease))


def _besides(size: int) -> int:
    """What an upload takes in memory besides itself, about: the call, and parts of it on their way."""
    return min(max(size, 64 << 10), 1 << 20)


def _sha256(payload: memoryview) -> bytes:
    """The digest. Of a small payload in pieces of which each is too short for hashlib to let another thread run: the
    loop would wait for its turn for longer than the hash takes.
    """
    if len(payload) > _SMALL:
        return hashlib.sha256(payload).digest()
    digest = hashlib.sha256()
    for at in range(0, len(payload), _PIECE):
        digest.update(payload[at : at + _PIECE])
    return digest.digest()


async def _data_of(parts: AsyncIterator[bytes], whose: str) -> AsyncIterator[memoryview]:
    async for data in parts:
        yield data_of_part(data, whose)


def _refuse_outcome(outcome: Outcome, caller: Caller, round: int) -> None:
    """Raise Refused for an upload that the journal did not take."""
    if outcome is Outcome.CONFLICT:
        raise Refused(
            Reason.CONFLICTING,
            f"another update of {caller.whose} was accepted for round {round}; this one does not count",
        )
    if outcome is Outcome.LATE:
        raise Refused(Reason.LATE, f"the update of {caller.whose} for round {round} came when nobody waited any more")
    if outcome is Outcome.UNKNOWN:
        raise Refused(Reason.UNKNOWN_LEASE, f"{caller.whose} submitted under a lease that was not given out here")
