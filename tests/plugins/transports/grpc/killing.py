"""Killing a server's processes at random moments, and measuring when what they do is done again."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedtower.core.draws import Draws
from fedtower.core.journal import Accepted, Journal, JournalError
from fedtower.plugins.transports.grpc.device import Place
from fedtower.plugins.transports.grpc.enrolment import Enrolled, begin_enrolment
from fedtower.plugins.transports.grpc.rows import METHOD
from fedtower.plugins.transports.grpc.tensors import to_tensor
from fedtower.plugins.transports.grpc.transport import rows_address
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub
from fedtower.recsys.bundle import Bundle
from tests.plugins.transports.grpc.served import Served

_EVERY_SECONDS = 0.01


@dataclass
class Killer:
    """Kills one of the two processes at moments that are drawn, spread over the rounds of the run.

    ``seconds`` are those from each kill to the first time that ``again`` gave true.
    """

    served: Served
    name: str
    draws: Draws
    again: Callable[[], bool]
    most_seconds: float
    seconds: list[float] = field(default_factory=list)

    def kill(self, kills: int, rounds: int) -> None:
        """Kill so often; one time in four again before the process is back, at a moment of its start."""
        left = kills
        self.served.wait_for(self.again)  # it is there, and there is something to ask for
        while left:
            number = kills - left
            self._await_turn(number * rounds // kills, number)
            at = self._one()
            left -= 1
            if left and self.draws.integers(4, f"{self.name} twice", number) == 0:
                time.sleep(float(self.draws.uniform(f"{self.name} start", number)) * 0.8)
                at = self._one()
                left -= 1
            self.served.wait_for(self.again, 60.0)
            self.seconds.append(time.monotonic() - at)

    def _await_turn(self, due: int, number: int) -> None:
        """Wait until round ``due`` is near, and then for as long as is drawn, or not at all when it is long past."""
        self.served.wait_for(lambda: self.served.rounds() >= due - 2)
        if self.served.rounds() <= due:
            time.sleep(float(self.draws.uniform(f"{self.name} delay", number)) * self.most_seconds)

    def _one(self) -> float:
        """Kill the process that there is; when that was."""
        pid = self.served.pid(self.name)
        os.kill(pid, signal.SIGKILL)
        at = time.monotonic()
        self.served.wait_for(lambda: self.served.pid(self.name) != pid)
        return at


@dataclass
class Acknowledges:
    """Whether the public port acknowledges an upload again that it had acknowledged before: a device's call, by a line
    of its own, through all that an upload goes through.
    """

    served: Served
    journal: Journal
    _known: Accepted | None = None

    def __call__(self) -> bool:
        """Ask, as soon as anybody listens."""
        self._known = self._newest() or self._known
        if self._known is None:
            return False  # nothing has been acknowledged yet
        listening(lambda: socket.create_connection(("127.0.0.1", self.served.port), 1.0))
        keys = self.served.ground.folder / "keys"
        with Place(f"127.0.0.1:{self.served.port}", keys / "authority.pem").channel() as channel:
            return self._sent_again(channel, self._known)

    def _sent_again(self, channel: grpc.Channel, upload: Accepted) -> bool:
        shard = self.served.ground.shards[upload.client]
        enrolled = begin_enrolment(shard.with_suffix(".device") / "enrolled.json", "", "")
        assert isinstance(enrolled, Enrolled)
        digest = sha256(upload.payload).digest()
        header = pb.SubmitHeader(lease=upload.lease, digest=digest, size=len(upload.payload))
        parts = iter([pb.SubmitPart(header=header), pb.SubmitPart(data=upload.payload)])
        try:
            reply = FederationStub(channel).Submit(parts, metadata=enrolled.metadata, timeout=10.0)
        except grpc.RpcError:
            return False
        assert reply.acknowledged.duplicate, f"what was acknowledged is lost: {reply}"
        return True

    def _newest(self) -> Accepted | None:
        """The first upload of the newest window that has any."""
        with suppress(JournalError):  # it is let go of at this moment
            for record in reversed(self.journal.rounds()):
                if record.accepted and not record.retired:
                    return next(self.journal.accepted(record.round, record.task))
        return None


@dataclass(frozen=True)
class GivesRows:
    """Whether the table process gives rows to those who train now."""

    folder: Path

    def __call__(self) -> bool:
        """Ask, as soon as anybody listens."""
        rows = Bundle.open(self.folder / "bundle").manifest.rows
        assert rows is not None
        address = rows_address(self.folder)
        listening(lambda: _connected(address.removeprefix("unix:")))
        request = pb.FetchRowsRequest(source=rows.source, ids=to_tensor(np.arange(4, dtype=np.uint32)))
        with grpc.insecure_channel(address) as channel:
            fetch: Any = channel.unary_stream(METHOD)
            try:
                chunks = [*fetch(request.SerializeToString(), timeout=10.0)]
            except grpc.RpcError:
                return False
        return all(pb.RowsChunk.FromString(chunk).WhichOneof("outcome") == "part" for chunk in chunks)


def listening(connect: Callable[[], socket.socket], seconds: float = 60.0) -> None:
    """Wait until somebody does."""
    until = time.monotonic() + seconds
    while True:
        try:
            connect().close()
            return
        except OSError:
            assert time.monotonic() < until, "nobody listens"
            time.sleep(_EVERY_SECONDS)


def _connected(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made
