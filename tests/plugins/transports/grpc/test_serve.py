"""The intake's process, a real one: it drains when it is told to stop, says how it is, counts through a kill, and
writes one line a refusal.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from threading import Event, Semaphore, Thread
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.journal import Journal
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.transport import Abandoned
from fedtower.core.updates import Updates
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.signers.ed25519.signer import make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.credentials import ATTEMPT_BYTES, Credentials
from fedtower.plugins.transports.grpc.plans import PublishedPlan, open_plan
from fedtower.plugins.transports.grpc.rows import serve_rows
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.transport import rows_address
from fedtower.plugins.transports.grpc.web import Pages, Web
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub
from fedtower.recsys.bundle import Manifest, RowPort, write_manifest
from fedtower.recsys.process_log import logged
from fedtower.recsys.running import Running, to_json

CLIENTS, LOCAL = 2, LocalSettings(steps=1)
DSSM = resources.files("fedtower.recsys").joinpath("recipes/dssm-synthetic.toml").read_text("utf-8")
RECIPE = DSSM.replace("simulated", "deployed") + '[transport]\nname = "grpc"\n'


class Table:
    """Rows of one table that nobody steps."""

    generation = 0

    def fetch(self, source: str, ids: Any) -> Any:
        return np.zeros((len(ids), 4), np.float32)


@dataclass(frozen=True)
class Halfway:
    """An upload that stops in its middle: ``begun`` when the first half is sent, and let go on by ``go_on``."""

    begun: Event = field(default_factory=Event)
    go_on: Event = field(default_factory=Event)


@dataclass
class Child:
    """An intake in a process of its own, over a folder whose windows are opened here."""

    folder: Path
    side: TableSide
    tokens: list[str]
    config: Path
    process: subprocess.Popen[bytes] = field(init=False)
    page: str = ""
    target: str = ""

    def start(self) -> None:
        (self.folder / "intake.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "fedtower.plugins.transports.grpc.serve", str(self.config)]
        with (self.folder / "said").open("a") as said:
            self.process = subprocess.Popen(command, stderr=said)
        ready = soon(lambda: json.loads((self.folder / "intake.json").read_text()), self)
        self.target, self.page = f"127.0.0.1:{ready['port']}", ready["page"]

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        """The status, the body (JSON read) and the headers of an answer of the status page."""
        line = http.client.HTTPConnection(urlsplit(self.page).netloc, timeout=10.0)
        try:
            line.request(method, path, headers=headers)
            answer = line.getresponse()
            body = answer.read()
            is_json = "json" in (answer.headers["Content-Type"] or "")
            return answer.status, json.loads(body) if is_json and body else body.decode(), answer.headers
        finally:
            line.close()

    def call(self, client: int) -> tuple[grpc.Channel, FederationStub, tuple[tuple[str, str | bytes], ...]]:
        channel = grpc.insecure_channel(self.target)
        return channel, FederationStub(channel), (("authorization", f"Bearer {self.tokens[client]}"),)

    def check_in(self, client: int, token: str = "") -> pb.CheckInReply:
        channel, stub, metadata = self.call(client)
        with channel:
            asked = pb.CheckInRequest(protocol=1, num_examples=3)
            reply: pb.CheckInReply = stub.CheckIn(asked, metadata=metadata, timeout=10.0)
            return reply

    def leased(self, client: int) -> pb.Lease:
        found: pb.Lease = soon(lambda: lease if (lease := self.check_in(client).lease).lease else None, self)
        return found

    def update(self, lease: pb.Lease) -> bytes:
        data = self.side.artefacts.path(lease.plan.artefact.digest).read_bytes()
        plan = open_plan(lease.plan, data, self.side.signer.verifier())
        updates = Updates(weights=np.ones(1), dense={"w": np.full((1, 3), 0.5, np.float32)}, metrics={})
        belongs = Belongs(plan.federation, plan.model, plan.round, lease.lease)
        return encode_submission(Submission(belongs, updates, 3))

    def submit(self, client: int, lease: pb.Lease, payload: bytes, halfway: Halfway | None = None) -> pb.SubmitReply:
        """Send an update; the second half of it comes when it is let go on."""

        def parts() -> Iterator[pb.SubmitPart]:
            digest = Artefact.of("", payload).digest
            yield pb.SubmitPart(header=pb.SubmitHeader(lease=lease.lease, digest=digest, size=len(payload)))
            yield pb.SubmitPart(data=payload[:20])
            if halfway is not None:
                halfway.begun.set()
                assert halfway.go_on.wait(20.0)
            yield pb.SubmitPart(data=payload[20:])

        channel, stub, metadata = self.call(client)
        with channel:
            reply: pb.SubmitReply = stub.Submit(parts(), metadata=metadata, timeout=20.0)
            return reply

    def under_way(self, client: int, lease: pb.Lease, payload: bytes, halfway: Halfway) -> None:
        """Return when the server has the first half: a call that went after it on the same connection is answered."""
        assert halfway.begun.wait(20.0)
        channel, stub, metadata = self.call(client)
        with channel:
            request = pb.ResumeRequest(lease=lease.lease, digest=Artefact.of("", payload).digest)
            stub.Resume(request, metadata=metadata, timeout=20.0)

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [values for name, values in logged(self.folder) if name == "intake" and values["event"] == event]

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20.0)


def soon(look: Callable[[], Any], child: Child | None = None) -> Any:
    """What is found, as soon as it is; if that is of a process, before it ends."""
    for _ in range(1500):
        try:
            if found := look():
                return found
        except (OSError, ValueError, KeyError):
            pass
        assert child is None or child.process.poll() is None, (child.folder / "said").read_text()
        time.sleep(0.02)
    raise AssertionError("it did not come")


def with_rows(folder: Path) -> None:
    """Let the model of a run have rows."""
    (folder / "bundle").mkdir()
    port = RowPort("item", 4, 10)
    write_manifest(folder / "bundle", Manifest("m", "r", asdict(LOCAL), {}, (), (), (), (), port, {}))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = SQLite().open(tmp_path / "journal", "a federation")
    yield opened
    opened.close()


@pytest.fixture
def child(tmp_path: Path, journal: Journal) -> Iterator[Child]:
    """An intake that runs, with two devices that are enrolled."""
    credentials = Credentials(tmp_path / "credentials.sqlite")
    codes = credentials.make_codes(CLIENTS, first_client=0)
    tokens = [credentials.enrol(code, "a device", os.urandom(ATTEMPT_BYTES))[1] for code in codes]
    credentials.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        status_port = probe.getsockname()[1]
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "federation.json").write_text(json.dumps({"name": "a federation", "run": "1", "keys": str(tmp_path)}))
    config = {
        "folder": str(tmp_path),
        "federation": "a federation",
        "journal": {"name": "sqlite", "settings": {"busy_seconds": 0.5}},
        "transport": {},
        "credentials": str(tmp_path / "credentials.sqlite"),
        "drain_seconds": 3.0,
        "address": {"host": "127.0.0.1", "port": 0, "insecure": True, "status_port": status_port},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    template = PublishedPlan(
        federation="a federation",
        round=0,
        seed=1,
        bundle=Artefact.of("manifest.json", b"{}"),
        files=(),
        parameters=(),
        local=LOCAL,
        run="1",
    )
    side = TableSide(
        folder=tmp_path,
        journal=journal,
        epoch=journal.claim(),
        signer=make_key(tmp_path / "signing.pem", tmp_path / "signing.pub"),
        template=template,
        terms=Terms(lease_seconds=60.0, heartbeat_seconds=5.0, deadline_seconds=60.0, quorum=1.0),
        said=lambda message: None,
    )
    child = Child(tmp_path, side, tokens, tmp_path / "config.json")
    child.start()
    yield child
    child.end()


@pytest.fixture
def window(child: Child) -> Iterator[list[Updates]]:
    """A round that is open, and the updates that were read of it."""
    with opened(child) as came:
        yield came


@contextmanager
def opened(child: Child) -> Iterator[list[Updates]]:
    """A round that is open meanwhile."""
    came: list[Updates] = []
    plan, cohort = Plan(1, {"w": np.zeros(3, np.float32)}, LOCAL), Cohort(1, np.arange(CLIENTS), CLIENTS)

    def read() -> None:
        with suppress(Abandoned):
            came.extend(child.side.exchange(plan, cohort, None, Draws(1), None))  # type: ignore[arg-type]

    thread = Thread(target=read)
    thread.start()
    yield came
    child.side.journal.advance(child.side.epoch, 1, "train", "abandoned", "the test is over")
    thread.join(10.0)
    assert not thread.is_alive()


def test_told_to_stop_it_finishes_the_upload_and_gives_out_no_more_tasks(
    child: Child, journal: Journal, window: list[Updates]
) -> None:
    lease, halfway, replies = child.leased(0), Halfway(), list[pb.SubmitReply]()
    payload = child.update(lease)
    upload = Thread(target=lambda: replies.append(child.submit(0, lease, payload, halfway)))
    upload.start()
    child.under_way(0, lease, payload, halfway)
    child.process.send_signal(signal.SIGTERM)
    status, told, _ = soon(lambda: seen if "draining" in (seen := child.get("/health"))[1]["reasons"] else None)
    assert (status, told["status"]) == (503, "draining")
    assert child.check_in(1).come_back.reason == "this server is about to stop"
    assert child.process.poll() is None
    halfway.go_on.set()
    upload.join(20.0)
    assert replies[0].WhichOneof("outcome") == "acknowledged"
    assert child.process.wait(10.0) == 0
    assert journal.record(1, "train").accepted == 1
    assert child.lines("draining")[0]["uploads"] == 1
    assert child.lines("stopped")[0]["all_uploads_came"] is True


def test_an_upload_that_hangs_holds_it_up_no_longer_than_it_may(child: Child, window: list[Updates]) -> None:
    lease, never = child.leased(0), Halfway()
    payload = child.update(lease)
    ended: list[grpc.RpcError] = []

    def hang() -> None:
        try:
            child.submit(0, lease, payload, never)
        except grpc.RpcError as error:
            ended.append(error)

    upload = Thread(target=hang)
    upload.start()
    child.under_way(0, lease, payload, never)
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(20.0) == 0
    assert child.lines("stopped")[0]["all_uploads_came"] is False
    never.go_on.set()
    upload.join(20.0)
    assert ended


def test_after_the_last_round_it_stays_until_those_who_are_there_have_been_told(child: Child) -> None:
    for client in (0, 1):
        assert child.check_in(client).WhichOneof("outcome") == "come_back"
    (child.folder / "finished").write_text("all rounds are done")
    assert child.check_in(1).finished.reason == "all rounds are done"
    child.process.send_signal(signal.SIGTERM)
    soon(lambda: child.lines("draining"), child)
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(0.5)
    assert child.check_in(0).finished.reason == "all rounds are done"
    assert child.process.wait(20.0) == 0
    assert child.lines("stopped")[0]["all_told"] is True


def test_a_device_that_never_comes_back_holds_up_the_end_no_longer_than_it_may(child: Child) -> None:
    child.check_in(0)
    (child.folder / "finished").write_text("all rounds are done")
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(20.0) == 0
    assert child.lines("stopped")[0]["all_told"] is False


def test_health_says_what_is_wrong_and_when_it_is_well_again(child: Child) -> None:
    def reasons() -> dict[str, str]:
        status, told, _ = child.get("/health")
        assert status == (503 if told["reasons"] else 200)
        return dict(told["reasons"])

    soon(lambda: reasons() == {"table": "the table process is starting"})
    with_rows(child.folder)
    soon(lambda: reasons() == {"table": "the table process gives no rows"})
    current = Event()
    current.set()
    server = serve_rows(Table(), rows_address(child.folder), current)  # type: ignore[arg-type]
    soon(lambda: not reasons())
    with sqlite3.connect(child.folder / "journal" / "index.sqlite", isolation_level=None) as locked:
        locked.execute("BEGIN IMMEDIATE")
        assert "index.sqlite" in soon(lambda: reasons().get("journal"))
        locked.execute("ROLLBACK")
    locked.close()
    soon(lambda: not reasons())
    (child.folder / "intakes").rename(child.folder / "away")
    (child.folder / "intakes").write_text("a file where a folder should be")
    assert "cannot write" in soon(lambda: reasons().get("disk"))
    (child.folder / "intakes").unlink()
    (child.folder / "away").rename(child.folder / "intakes")
    soon(lambda: not reasons())
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    running = {"supervisor": Running.of("supervisor", os.getpid()), "table": Running("table", dead.pid, 7)}
    (child.folder / "processes.json").write_text(json.dumps(to_json(running)))
    soon(lambda: reasons() == {"table": "the table process is away, and is being started again"})
    (child.folder / "finished").write_text("all rounds are done")
    soon(lambda: not reasons())
    server.stop(None)
    assert [set(line) & {"table", "journal", "disk"} for line in child.lines("unwell")] == [
        {"table"},
        {"journal"},
        {"disk"},
        {"table"},
    ]


def test_who_should_have_rows_and_is_sent_away_is_not_well_served(child: Child) -> None:
    def reasons() -> dict[str, str]:
        return dict(child.get("/health")[1]["reasons"])

    with_rows(child.folder)
    current = Event()
    server = serve_rows(Table(), rows_address(child.folder), current)  # type: ignore[arg-type]
    soon(lambda: not reasons())  # there is no round yet, and devices are to come
    with opened(child):
        why = "the table process gives no rows yet: it is on the way to the round that is open"
        soon(lambda: reasons() == {"table": why})
        current.set()
        soon(lambda: not reasons())
    server.stop(None)


def test_a_refusal_is_one_line_that_says_whose_and_why(child: Child, window: list[Updates]) -> None:
    lease = child.leased(1)
    bad = child.submit(1, lease, b"\xff" * 200)
    assert bad.refusal.message
    assert child.check_in(0).lease.lease
    child.tokens[0] = child.tokens[0][:-4] + "AAAA"
    with pytest.raises(grpc.RpcError):
        child.check_in(0)
    mine, stranger = child.lines("refused")
    assert (mine["reason"], mine["call"], mine["client"], mine["round"], mine["task"]) == (
        "corrupt",
        "Submit",
        1,
        1,
        "train",
    )
    assert stranger["reason"] == "unknown_device"
    assert stranger["who"].startswith("ipv4:127.0.0.1")
    assert {"time", "process", "pid", "level"} <= mine.keys() & stranger.keys()
    assert child.tokens[0] not in (child.folder / "logs" / "intake.jsonl").read_text()


def test_what_was_counted_goes_on_after_a_kill(child: Child, window: list[Updates]) -> None:
    lease = child.leased(1)
    assert child.submit(1, lease, b"\xff" * 200).refusal.message
    soon(lambda: '"corrupt"' in (child.folder / "intakes" / "intake.json").read_text())
    child.process.kill()
    child.process.wait()
    child.start()
    told = child.get("/status.json")[1]
    assert told["refusals"] == {"corrupt": 1}
    assert told["bytes_up"] == 200
    assert 'fedtower_refusals_total{reason="corrupt"} 1.0' in child.get("/metrics")[1]
    assert child.submit(1, lease, b"\xff" * 200).refusal.message
    soon(lambda: child.get("/status.json")[1]["refusals"] == {"corrupt": 2})
    assert [path.name for path in (child.folder / "intakes").glob("*.json")] == ["intake.json"]


def test_the_page_answers_get_alone_and_calls_by_a_loopback_name_alone(child: Child) -> None:
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        status, _, headers = child.get("/", method)
        assert (status, headers["Allow"]) == (405, "GET")
    for path in ("/etc/passwd", "/../recipe.toml", "/status.json/", "/%2e%2e/credentials.sqlite"):
        assert child.get(path)[0] == 404
    for path in ("/", "/status.json", "/health", "/metrics"):
        assert child.get(path, Host="evil.example")[0] != 200
        assert child.get(path, Host="127.0.0.1.evil.example")[0] != 200
    for host in ("localhost:80", "127.0.0.1", "[::1]:9"):
        assert child.get("/", Host=host)[0] == 200
    status, page, headers = child.get("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_more_calls_at_once_than_it_takes_are_hung_up_on() -> None:
    entered, go_on, answers = Semaphore(0), Event(), list[int]()

    def health() -> tuple[bool, dict[str, Any]]:
        entered.release()
        assert go_on.wait(20.0)
        return True, {}

    def ask() -> None:
        with closing(http.client.HTTPConnection(urlsplit(web.address).netloc, timeout=20.0)) as line:
            line.request("GET", "/health")
            answers.append(line.getresponse().status)

    def nothing() -> Any:
        raise AssertionError("nobody asks for the status")

    web = Web("127.0.0.1", 0, Pages("127.0.0.1", nothing, health, CollectorRegistry()))
    callers = [Thread(target=ask) for _ in range(16)]
    for caller in callers:
        caller.start()
        assert entered.acquire(timeout=20.0)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        ask()
    go_on.set()
    for caller in callers:
        caller.join(20.0)
    assert answers == [200] * 16
    while len(answers) < 17:  # their places are free again, sooner or later
        with suppress(http.client.RemoteDisconnected, ConnectionResetError):
            ask()
    web.close()


def test_callers_that_say_nothing_do_not_keep_others_out_for_long(child: Child) -> None:
    host, port = urlsplit(child.page).netloc.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        assert soon(lambda: child.get("/health")[0] in (200, 503))
    finally:
        for each in silent:
            each.close()
