"""Enrolment: a code that a device was given, exchanged once for a token of its own; both ends of it.

The device keeps what it was given in a file that only its owner may read. It can be killed at any moment, and a reply
can be lost: until its token was used, the same code and attempt give it another.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from fedtower.core.errors import StorageError, TrustError
from fedtower.core.secret_files import read_secret, write_secret
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.codec import PROTOCOL, refuse_other_protocol
from fedtower.plugins.transports.grpc.credentials import ATTEMPT_BYTES, Credentials
from fedtower.plugins.transports.grpc.refusals import Refused
from fedtower.protos.v1 import federation_pb2 as pb

_MOST_REQUEST = 4 << 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enrolled:
    """What a device knows itself by."""

    federation: str
    device_id: str
    client: int
    token: str

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What it calls with."""
        return (("authorization", f"Bearer {self.token}"),)


def begin_enrolment(path: Path, code: str, name: str) -> Enrolled | pb.EnrolRequest:
    """What ``path`` holds, if the device is enrolled; else what to ask the server, the same however often it is asked.

    Raises:
        TrustError: others than its owner may read the file, or it is damaged.
    """
    if path.exists():
        return _read(path)
    attempt = _attempt(path)
    if attempt.exists() and attempt.stat().st_size != ATTEMPT_BYTES:
        attempt.unlink()  # killed while it was written, and so before it was ever sent
    if not attempt.exists():
        write_secret(attempt, os.urandom(ATTEMPT_BYTES))
    return pb.EnrolRequest(protocol=PROTOCOL, code=code, device=name, attempt=read_secret(attempt))


def finish_enrolment(path: Path, reply: pb.EnrolReply) -> Enrolled:
    """Who the device is by now, which is on disk when this returns.

    Raises:
        Refused: with the server's reason.
    """
    if not reply.HasField("enrolment"):
        raise Refused.from_message(reply.refusal)
    given = reply.enrolment
    enrolled = Enrolled(given.federation, given.device_id, given.client, given.token)
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    write_secret(beside, json.dumps(asdict(enrolled)).encode())
    beside.replace(path)
    _attempt(path).unlink(missing_ok=True)
    return enrolled


@dataclass(frozen=True)
class EnrolService:
    """The server's end: the handler of ``Enrol``. ``observe`` is told each refusal."""

    federation: str
    credentials: Credentials
    observe: Callable[[Refused], None] = lambda _refusal: None

    async def enrol(self, request: bytes, context: Any) -> bytes:
        """The reply to a request, both as bytes: an enrolment, or a refusal."""
        try:
            message = parse(pb.EnrolRequest, request, most_bytes=_MOST_REQUEST)
            refuse_other_protocol(message.protocol, "a device")
            # In a thread: it waits for the disk, and those who train do not wait for those who enrol.
            asked = (message.code, message.device, message.attempt)
            device, token = await asyncio.to_thread(self.credentials.enrol, *asked)
        except Refused as error:
            self.observe(error)
            return pb.EnrolReply(refusal=error.to_message()).SerializeToString()
        except StorageError as error:
            _log.error("nobody can enrol now: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody can enrol now; come back later")
        given = pb.Enrolment(federation=self.federation, device_id=device.id, client=device.client, token=token)
        return pb.EnrolReply(enrolment=given).SerializeToString()


def _attempt(path: Path) -> Path:
    return path.with_name(f"{path.name}.attempt")


def _read(path: Path) -> Enrolled:
    try:
        return Enrolled(**json.loads(read_secret(path)))
    except (ValueError, TypeError) as error:
        raise TrustError(
            f"{path} is no enrolment, or is damaged ({error}); remove it, and enrol with another code"
        ) from error
