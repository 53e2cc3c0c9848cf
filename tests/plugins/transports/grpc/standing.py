"""A federation that stands: a real intake process behind TLS, the table's side here, and devices of a test's making."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import grpc.aio
import numpy as np
import tomli_w
from google.protobuf.message import Message

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.transport import Abandoned
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.signers.ed25519.signer import make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.certificates import Authority, issue_server, make_authority
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.plans import PublishedPlan, RowSource, open_plan
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.rows import LockedRows, serve_rows
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.tensors import to_tensor
from fedtower.plugins.transports.grpc.tls import DeviceTls, connect
from fedtower.plugins.transports.grpc.transport import rows_address
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.process_log import logged

PARAMETERS = {"w": np.zeros((20, 30), np.float32), "b": np.zeros(30, np.float32)}
TABLE = np.arange(400, dtype=np.float32).reshape(100, 4)
LOCAL = LocalSettings(steps=1)
EXAMPLES = 9
TIMEOUT = 60.0
FAST = dict.fromkeys(("calls_per_second", "calls_burst", "bytes_per_second", "bytes_burst"), 1e12)
FAST |= dict.fromkeys(("refusals_per_second", "refusals_burst"), 1e12)
"""Rates that stop nobody: what a test sends in seconds, a device sends in weeks."""


class Table:
    """Rows that are only read."""

    generation = 0

    def fetch(self, source: str, ids: Any) -> Any:
        return TABLE[ids]

    def apply(self, deltas: Any, lr_scale: float) -> None:
        raise AssertionError("nobody steps here")

    def snapshot(self) -> Any:
        return {}

    def restore(self, arrays: Any) -> None:
        pass


@dataclass(frozen=True)
class Answer:
    """What became of a call: its reply or none, why it was refused, and the status of a call without a reply."""

    reply: Any = None
    refusal: Refused | None = None
    status: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""

    @property
    def reason(self) -> Reason | None:
        return None if self.refusal is None else self.refusal.reason

    @property
    def outcome(self) -> str:
        """The field of the reply that is set; ``refusal`` also where the status alone refuses."""
        if self.refusal is not None:
            return "refusal"
        return self.status.name if self.reply is None else str(self.reply.WhichOneof("outcome"))


REPLIES: dict[str, tuple[str, Any]] = {
    "Enrol": ("unary_unary", pb.EnrolReply),
    "CheckIn": ("unary_unary", pb.CheckInReply),
    "Heartbeat": ("unary_unary", pb.HeartbeatReply),
    "Resume": ("unary_unary", pb.ResumeReply),
    "Submit": ("stream_unary", pb.SubmitReply),
    "Fetch": ("unary_stream", pb.Chunk),
    "FetchRows": ("unary_stream", pb.RowsChunk),
}


@dataclass(frozen=True)
class Peer:
    """Calls with whatever bytes, over one connection, as whoever ``metadata`` says."""

    channel: grpc.aio.Channel
    metadata: Sequence[tuple[str, str]] = ()

    async def call(self, name: str, data: Any, **options: Any) -> Answer:
        """What comes of bytes, or of a stream of them; of a stream of replies, the last."""
        kind, reply = REPLIES[name]
        make: Any = getattr(self.channel, kind)
        call = make(f"/fedtower.v1.Federation/{name}")(data, metadata=self.metadata, timeout=TIMEOUT, **options)
        try:
            last = b""
            if kind == "unary_stream":
                async for chunk in call:
                    last = chunk
            else:
                last = await call
        except grpc.aio.AioRpcError as error:
            if error.details() == "Internal error from Core":
                # What this side's gRPC says when the other ends a stream at the moment in which it is written to.
                return Answer(status=grpc.StatusCode.CANCELLED)
            told = Refused.from_metadata(error.trailing_metadata())
            return Answer(None, told, error.code(), str(error.details()))
        message = reply.FromString(last)
        refused = message.WhichOneof("outcome") == "refusal"
        return Answer(message, Refused.from_message(message.refusal) if refused else None)

    async def check_in(self) -> Answer:
        return await self.call("CheckIn", pb.CheckInRequest(protocol=1, num_examples=EXAMPLES).SerializeToString())

    async def lease(self, round: int | None = None) -> pb.Lease:
        """A lease, waited for as long as the round takes to open."""
        for _ in range(1_000):
            answer = await self.check_in()
            if answer.outcome == "lease" and round in (None, answer.reply.lease.round):
                found: pb.Lease = answer.reply.lease
                return found
            assert answer.outcome in ("come_back", "lease"), answer
            await asyncio.sleep(0.02)
        raise AssertionError("no lease came")

    async def rows(self, lease: pb.Lease, ids: tuple[int, ...] = (1, 3)) -> Answer:
        request = pb.FetchRowsRequest(lease=lease.lease, source="item", ids=to_tensor(np.array(ids, np.uint32)))
        return await self.call("FetchRows", request.SerializeToString())

    async def submit(self, lease: bytes, payload: bytes, *, send: bytes | None = None, **header: Any) -> Answer:
        """Send ``payload`` (or ``send`` in its stead) with its header, of which some may be said otherwise."""
        return await self.call("Submit", each(parts(lease, payload, send, **header)))


def parts(lease: bytes, payload: bytes, send: bytes | None = None, **header: Any) -> list[bytes]:
    """The serialised parts of an upload."""
    first = {"lease": lease, "digest": hashlib.sha256(payload).digest(), "size": len(payload), "offset": 0, **header}
    data, step = payload if send is None else send, 64 << 10
    return [
        pb.SubmitPart(header=pb.SubmitHeader(**first)).SerializeToString(),
        *(
            pb.SubmitPart(data=data[start : start + step]).SerializeToString()
            for start in range(first["offset"], len(data), step)
        ),
    ]


def requests(lease: bytes, digest: bytes) -> dict[str, bytes]:
    """A good request of every call that has one."""
    made: dict[str, Message] = {
        "Enrol": pb.EnrolRequest(protocol=1, code="0123456789abcdef.secret", device="a phone", attempt=b"a" * 16),
        "CheckIn": pb.CheckInRequest(protocol=1, num_examples=9, capabilities=pb.Capabilities(formats=[".mnn"])),
        "Heartbeat": pb.HeartbeatRequest(lease=lease, progress=0.5),
        "Resume": pb.ResumeRequest(lease=lease, digest=bytes(32)),
        "Fetch": pb.FetchRequest(lease=lease, digest=digest),
        "FetchRows": pb.FetchRowsRequest(lease=lease, source="item", ids=to_tensor(np.arange(9, dtype=np.uint32))),
    }
    return {name: message.SerializeToString() for name, message in made.items()}


async def each(items: Iterable[bytes]) -> AsyncIterator[bytes]:
    for item in items:
        yield item


@dataclass
class Round:
    """What came of a round: the updates, in the order of acceptance, or why it was abandoned."""

    came: list[Updates] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def total(self) -> Updates:
        """The aggregate."""
        return FedAvg().fold(self.came, {})[0]


@dataclass
class Standing:
    """The federation: its folder, the table's side in this process, the intake's process, and who may call."""

    folder: Path
    side: TableSide
    credentials: Credentials
    authority: Authority
    verifier: Any
    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int
    tokens: list[str]
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    """Of rounds that were not opened yet, for tests that share a federation."""
    plans: dict[bytes, bytes] = field(default_factory=dict)
    """As devices keep them: the server's own go with their rounds."""

    @asynccontextmanager
    async def peer(self, client: int | None = 0, token: str | None = None) -> AsyncIterator[Peer]:
        """A connection of its own of an enrolled client, of somebody with another token, or of nobody."""
        given = token if token is not None or client is None else self.tokens[client]
        metadata = () if given is None else (("authorization", f"Bearer {given}"),)
        tls = DeviceTls(self.folder / "keys" / "authority.pem")
        # Peers in one process would share one connection otherwise.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with connect(f"localhost:{self.port}", tls, insecure=False, options=options) as channel:
            yield Peer(channel, metadata)

    @contextmanager
    def round(self, number: int, clients: Sequence[int], target: int) -> Iterator[Round]:
        """A round that is open meanwhile; it ends when ``target`` updates are there, or at its deadline."""
        found, plan = Round(), Plan(number, PARAMETERS, LOCAL)
        cohort = Cohort(number, np.array(sorted(clients)), len(self.tokens))

        def read() -> None:
            try:
                found.came.extend(replace(self.side, target=target).exchange(plan, cohort, None, Draws(1), None))  # type: ignore[arg-type]
                self.side.committed(number)
            except Abandoned as reason:
                found.reasons.append(str(reason))

        thread = Thread(target=read)
        thread.start()
        try:
            yield found
        except BaseException:
            self.side.journal.advance(self.side.epoch, number, "train", "abandoned", "the test has failed")
            raise
        finally:
            thread.join(300.0)
            assert not thread.is_alive()

    @asynccontextmanager
    async def round_beside(self, number: int, clients: Sequence[int], target: int) -> AsyncIterator[Round]:
        """The same, for whoever has calls running in the event loop while the round ends."""
        opened = self.round(number, clients, target)
        found = opened.__enter__()
        try:
            yield found
        except BaseException as error:
            await asyncio.to_thread(opened.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(opened.__exit__, None, None, None)

    def submission(self, lease: pb.Lease, **changes: Any) -> Submission:
        """The update of a client that does everything right, unless something is changed; of each client another."""
        digest = lease.plan.artefact.digest
        if digest not in self.plans:
            self.plans[digest] = self.side.artefacts.path(digest).read_bytes()
        plan = open_plan(lease.plan, self.plans[digest], self.verifier)
        draws = np.random.default_rng(lease.client)
        updates = Updates(
            weights=np.array([1.0 + lease.client]),
            dense={name: draws.standard_normal((1, *each.shape)).astype("f4") for name, each in PARAMETERS.items()},
            rows={"item": Rows(np.array([0, 2]), np.array([1, 3]), draws.standard_normal((2, 4)).astype("f4"))},
            metrics={"loss": np.array([0.5])},
        )
        made = Submission(Belongs(plan.federation, plan.model, plan.round, lease.lease), updates, 5)
        for name, change in changes.items():
            made = replace(made, **{name: change(getattr(made, name))})
        return made

    async def visit(self, client: int, round: int) -> Answer:
        """One device's part in a round, over a connection of its own, done right."""
        async with self.peer(client) as peer:
            lease = await peer.lease(round)
            assert (await peer.rows(lease)).outcome == "part"
            return await peer.submit(lease.lease, encode_submission(self.submission(lease)))

    def log(self) -> list[dict[str, Any]]:
        """What the intake has logged, as it was written."""
        return [values for _, values in logged(self.folder)]

    def counted(self, name: str) -> dict[str, float]:
        """A counter as Prometheus reads it, by its labels as they are written."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10.0) as page:
            text = page.read().decode()
        return {found[1]: float(found[2]) for found in re.finditer(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)}

    def refusals(self) -> dict[str, int]:
        """How often the intake has refused, by reason."""
        found = self.counted("fedtower_refusals_total")
        return {re.sub(r'reason="(\w+)"', r"\1", label): int(value) for label, value in found.items()}

    def resident(self) -> int:
        """Bytes that the intake's process holds in memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """Bytes that it has held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def files(self) -> int:
        """Its open files and connections."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def standing(
    folder: Path,
    clients: int,
    *,
    terms: Terms | None = None,
    command: Sequence[str] = (),
    transport: dict[str, Any] | None = None,
    journal: dict[str, Any] | None = None,
) -> Iterator[Standing]:
    """A federation with so many enrolled clients; ``command`` is what starts the intake, if not this Python alone."""
    keys = folder / "keys"
    keys.mkdir()
    authority = make_authority(keys)
    issue_server(authority, keys, ["localhost"], 30)
    signer = make_key(folder / "signing.pem", folder / "signing.pub")
    credentials = Credentials(keys / "credentials.sqlite")
    codes = credentials.make_codes(clients, first_client=0)
    tokens = [credentials.enrol(code, "", b"a" * 16)[1] for code in codes]
    opened = SQLite(**(journal or {})).open(folder / "journal", "a federation")
    side = _side(folder, opened, signer, terms or Terms(600.0, 15.0, 600.0, 1.0))
    address = rows_address(folder)
    rows = serve_rows(LockedRows.of(Table()), address, side.current)
    run = {"name": "a federation", "run": "run1", "keys": str(keys)}
    (folder / "federation.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "recipe.toml").write_text(tomli_w.dumps(_recipe()), encoding="utf-8")
    certificate = {"certificate": str(keys / "server.pem"), "key": str(keys / "server.key")}
    config: dict[str, Any] = {
        "folder": str(folder),
        "federation": "a federation",
        "journal": {"name": "sqlite", "settings": journal or {}},
        "transport": {"upload_mb": 64, "rates": FAST, **(transport or {})},
        "credentials": str(keys / "credentials.sqlite"),
        "address": {"host": "127.0.0.1", "port": 0, "status_port": (metrics_port := free_port()), **certificate},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (folder / "intake.log").open("wb") as log:
        module = ["-m", "fedtower.plugins.transports.grpc.serve", str(folder / "config.json")]
        process = subprocess.Popen([*(command or [sys.executable]), *module], stdout=log, stderr=log)
    try:
        port = _port(folder, process)
        verifier = signer.verifier()
        yield Standing(folder, side, credentials, authority, verifier, process, port, metrics_port, tokens)
        assert process.poll() is None, "the intake has died"
    finally:
        process.terminate()
        process.wait(30.0)
        rows.stop(None)
        opened.close()
        credentials.close()


@cache
def _recipe() -> dict[str, Any]:
    """A recipe as a run folder has one; what is trained here is not in it."""
    return load_recipe("dssm-synthetic", registry=discover()).to_dict()


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _side(folder: Path, journal: Any, signer: Any, terms: Terms) -> TableSide:
    template = PublishedPlan(
        federation="a federation",
        round=0,
        seed=1,
        bundle=Artefact.of("manifest.json", b"{}"),
        files=(),
        parameters=(),
        local=LOCAL,
        rows=(RowSource("item", *TABLE.shape),),
        norm_bound=1_000.0,
        run="run1",
    )
    epoch = journal.claim()
    return TableSide(folder, journal, epoch, signer, template, terms, said=lambda message: None)


def _port(folder: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        assert process.poll() is None, (folder / "intake.log").read_text(encoding="utf-8")
        try:
            return int(json.loads((folder / "intake.json").read_text(encoding="utf-8"))["port"])
        except (OSError, ValueError):
            time.sleep(0.02)
    raise AssertionError("the intake did not begin to serve")
