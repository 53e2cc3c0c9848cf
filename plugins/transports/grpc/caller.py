"""Caller: the device's end of the wire: calls that are made again when the line breaks, and answers as nouns."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

import grpc
import numpy as np

from fedtower.core.errors import TrustError, Unreachable
from fedtower.core.rows import FloatArray, IntArray
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.codec import PROTOCOL, Task
from fedtower.plugins.transports.grpc.handshakes import distrust
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)

PART_BYTES = 256 << 10
MOST_ROWS = 32_768  # ids of one call
MOST_TOGETHER = 256  # artefacts of one call
_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    # What gRPC says itself of a line on which something unexpected came, as when a server is killed in a call.
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DATA_LOSS,
}
_TASKS: dict[pb.Task.ValueType, Task] = {pb.TASK_TRAIN: "train", pb.TASK_EVALUATE: "evaluate"}


class Later(Exception):
    """The server wants to be asked again, not before ``seconds`` have passed."""

    def __init__(self, seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Leased:
    """A task that a device has been given."""

    lease: bytes
    task: Task
    round: int
    client: int
    plan: pb.SignedArtefact
    heartbeat_seconds: float
    seconds_left: float


@dataclass(frozen=True)
class Over:
    """There is nothing to do any more."""

    reason: str


@dataclass(frozen=True)
class BackOff:
    """How long to wait before a call is made again: a random share of a time that doubles ("full jitter", Brooker,
    2015, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """

    first_seconds: float = 0.2
    most_seconds: float = 30.0
    give_up_seconds: float = 300.0

    def waits(self, chance: Random) -> Iterator[float]:
        """The waits, one after another, without end."""
        most = self.first_seconds
        while True:
            yield chance.uniform(0.0, most)
            most = min(most * 2, self.most_seconds)


class Wait(Protocol):
    """Waits; :func:`time.sleep`, or a test's."""

    def __call__(self, seconds: float, /) -> Any: ...


@dataclass(frozen=True)
class Caller:
    """Makes the calls of one device over a channel; ``metadata`` says who calls."""

    channel: grpc.Channel
    metadata: Sequence[tuple[str, str]] = ()
    back_off: BackOff = field(default_factory=BackOff)
    chance: Random = field(default_factory=Random)
    wait: Wait = time.sleep
    call_seconds: float = 60.0
    wait_seconds: float = 30.0  # on the line, for something to do; the server may want less

    def enrol(self, request: pb.EnrolRequest) -> pb.EnrolReply:
        """The server's answer to an enrolment code."""
        reply: pb.EnrolReply = self._call("Enrol", request)
        return reply

    def check_in(
        self, federation: str, capabilities: pb.Capabilities, model: bytes, num_examples: int
    ) -> Leased | Over:
        """A task for this device.

        Raises:
            Later: there is none now.
            Refused: this device may not take part.
        """
        reply = self._call(
            "CheckIn",
            pb.CheckInRequest(
                protocol=PROTOCOL,
                federation=federation,
                capabilities=capabilities,
                model=model,
                num_examples=num_examples,
                wait_seconds=self.wait_seconds,
            ),
            self.wait_seconds,
        )
        _refuse(reply)
        if reply.WhichOneof("outcome") == "finished":
            return Over(reply.finished.reason)
        lease, plan = reply.lease, reply.lease.plan
        if lease.task not in _TASKS or len(plan.artefact.digest) != hashlib.sha256().digest_size:
            raise Refused(Reason.CORRUPT, f"the server gave a lease of task {lease.task} that cannot be understood")
        return Leased(
            lease=lease.lease,
            task=_TASKS[lease.task],
            round=lease.round,
            client=lease.client,
            plan=plan,
            heartbeat_seconds=lease.heartbeat_seconds,
            seconds_left=lease.seconds_left,
        )

    def fetch(self, lease: bytes, artefact: Artefact, offset: int) -> Iterator[bytes]:
        """An artefact's bytes from an offset on; a line that breaks goes on where it broke."""
        at = offset

        def attempt() -> Iterator[bytes]:
            nonlocal at
            request = pb.FetchRequest(lease=lease, digest=artefact.digest, offset=at)
            for chunk in self._stream("Fetch", request):
                _refuse(chunk)
                at += len(chunk.data)
                yield chunk.data

        yield from self._again(attempt, lambda: at >= artefact.size)

    def fetch_together(self, lease: bytes, artefacts: Sequence[Artefact]) -> Iterator[tuple[Artefact, bytes]]:
        """The bytes of small artefacts by one call, as far as the line and the server give them; the rest is for
        :meth:`fetch`.
        """
        first, *others = artefacts[:MOST_TOGETHER]
        request = pb.FetchRequest(lease=lease, digest=first.digest, then=[each.digest for each in others])
        wanted, held = iter([first, *others]), b""
        current = next(wanted, None)
        try:
            for chunk in self._stream("Fetch", request):
                _refuse(chunk)
                held += chunk.data
                while current is not None and len(held) >= current.size:
                    yield current, held[: current.size]
                    held, current = held[current.size :], next(wanted, None)
        except (Later, grpc.RpcError):
            return

    def rows(self, lease: bytes, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``, (n, W)."""
        parts: list[FloatArray] = []
        for start in range(0, max(len(ids), 1), MOST_ROWS):
            parts.extend(self._rows(lease, source, ids[start : start + MOST_ROWS]))
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    def heartbeat(self, lease: bytes, progress: float) -> float:
        """The seconds that a lease has left. Raises Refused when its round no longer waits."""
        reply = self._call("Heartbeat", pb.HeartbeatRequest(lease=lease, progress=progress))
        return float(reply.alive.seconds_left)

    def submit(self, lease: bytes, path: Path, *, begun: bool = True) -> bool:
        """Send the update in a file, from where the server has it; whether it had been acknowledged before.

        Returns only when the server has it on its disk. One that was never ``begun`` is sent without asking.

        Raises:
            Refused: the update does not count; it would not if it were sent again.
        """
        digest = hashlib.sha256(path.read_bytes()).digest()
        size, asks = path.stat().st_size, begun

        def attempt() -> bool:
            nonlocal asks
            offset = 0
            if asks:
                held = self._once("Resume", pb.ResumeRequest(lease=lease, digest=digest))
                _refuse(held)
                if held.WhichOneof("outcome") == "acknowledged":
                    return True
                offset = held.held.offset if held.held.offset <= size else 0
            asks = True
            reply = self._once("Submit", upload_parts(lease, path, offset))
            _refuse(reply)
            return bool(reply.acknowledged.duplicate)

        return self._until_answered(attempt)

    def _rows(self, lease: bytes, source: str, ids: IntArray) -> Iterator[FloatArray]:
        at = 0
        small = len(ids) == 0 or int(ids.max()) < 1 << 32

        def attempt() -> Iterator[FloatArray]:
            nonlocal at
            wanted = ids[at:].astype(np.uint32) if small else ids[at:]
            first = at
            for chunk in self._stream(
                "FetchRows", pb.FetchRowsRequest(lease=lease, source=source, ids=to_tensor(wanted))
            ):
                _refuse(chunk)
                rows = to_array(chunk.part.rows, "the server")
                if chunk.part.first != at - first or rows.ndim != 2 or rows.dtype != np.float32:
                    raise Refused(Reason.CORRUPT, f"the server sent rows of {source!r} that are not those asked for")
                at += len(rows)
                yield rows

        return self._again(attempt, lambda: at >= len(ids))

    def _again(self, attempt: Callable[[], Iterator[Answer]], done: Callable[[], bool]) -> Iterator[Answer]:
        """What the attempts give, one after another, until all has come; one that brought something starts afresh."""
        waits, until = self.back_off.waits(self.chance), time.monotonic() + self.back_off.give_up_seconds
        untrusted: list[TrustError] = []
        while True:
            try:
                for answer in attempt():
                    waits, until = self.back_off.waits(self.chance), time.monotonic() + self.back_off.give_up_seconds
                    yield answer
                if done():
                    return
                least, why = 0.0, "it said nothing more"
            except Later as later:  # it lives, and says when: that is no failure, after which to wait ever longer
                waits = self.back_off.waits(self.chance)
                least, why = later.seconds, str(later)
            except grpc.RpcError as error:
                least, why = _seconds_until_again(error), _told(error)
            self._pause(least + next(waits), until, why, untrusted)

    def _until_answered(self, attempt: Callable[[], Answer]) -> Answer:
        """The first answer of attempts."""
        return next(iter(self._again(lambda: iter([attempt()]), lambda: True)))

    def _pause(self, seconds: float, until: float, why: str, untrusted: list[TrustError]) -> None:
        found = distrust(why)
        if found is not None and str(found) not in map(str, untrusted):
            # It may be renewed at any time, which is no reason to give up at once, but to say so.
            _log.warning("%s", found)
            untrusted.append(found)
        if time.monotonic() + seconds > until:
            if untrusted:
                raise untrusted[-1]
            raise Unreachable(
                f"the server gave no answer for {self.back_off.give_up_seconds:g} seconds ({why}); is it running, and "
                f"are address and certificate right?"
            )
        self.wait(seconds)

    def _call(self, name: str, request: Any, held_seconds: float = 0.0) -> Any:
        """The answer to a call, which is made again until there is one: all of them may be made twice."""

        def attempt() -> Any:
            reply = self._once(name, request, held_seconds)
            if name != "CheckIn":  # whose caller has better things to do than to wait here
                _refuse(reply)
            return reply

        return self._until_answered(attempt)

    def _once(self, name: str, request: Any, held_seconds: float = 0.0) -> Any:
        call = getattr(FederationStub(self.channel), name)
        return call(request, metadata=self.metadata, timeout=self.call_seconds + held_seconds)

    def _stream(self, name: str, request: Any) -> Iterator[Any]:
        stub = getattr(FederationStub(self.channel), name)
        return iter(stub(request, metadata=self.metadata, timeout=self.call_seconds))


def upload_parts(lease: bytes, path: Path, offset: int) -> Iterator[pb.SubmitPart]:
    """What is sent of the update in a file, from an offset on: the header, and its bytes."""
    digest, size = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_size
    yield pb.SubmitPart(header=pb.SubmitHeader(lease=lease, digest=digest, size=size, offset=offset))
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(PART_BYTES):
            yield pb.SubmitPart(data=data)


def _refuse(reply: Any) -> None:
    """Raise Refused or Later for an answer that is none."""
    outcome = reply.WhichOneof("outcome")
    if outcome == "refusal":
        raise Refused.from_message(reply.refusal)
    if outcome == "come_back":
        raise Later(reply.come_back.seconds, reply.come_back.reason)
    if outcome is None:
        raise Refused(Reason.CORRUPT, "the server sent an answer without anything in it; it is of a newer version")


def _seconds_until_again(error: Any) -> float:
    """When a call that failed may be made again; raises what it means, if it may not."""
    refusal = dict(error.trailing_metadata() or ()).get("fedtower-refusal-bin")
    if refusal is not None:
        refused = Refused.from_message(pb.Refusal.FromString(refusal))
        if refused.retry_after_seconds <= 0:
            raise refused from error
        return refused.retry_after_seconds
    if error.code() not in _AGAIN:
        raise Unreachable(f"the server ended the call with {_told(error)}") from error
    return 0.0


def _told(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"
