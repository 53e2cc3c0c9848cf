"""What an intake takes in: updates a second over loopback with TLS, every check and durability, beside two limits.

    python benchmarks/server.py [--json FILE] [--repeat N] [--quick] [--only BYTES:CLIENTS ...] [--folder DIR]

The intake is the process that `fedtower serve` starts, with its journal; windows are opened, and what was accepted is
read and folded, by the table side, in this process. Every client is enrolled, has its own token and its own lease, and
fetches rows under it before the clock starts; an update is dense deltas and 16 rows. So many clients submit at the same
time, from a few processes on the same cores, over shared connections; when one is acknowledged, the next one of the
cohort submits. Beside that, in the same run, by the same clients and in turns:

* *bare grpc.aio*: the same bytes over the same TLS in one message to a handler that only adds arrays, and nothing else;
  *in parts* to one that takes them in parts of 256 KiB, as devices send them;
* *bare appends*: payloads to a file, flushed (fdatasync) group by group; no network.

*Visits* are what Flower's servers were measured with, a pull and a push: check in, fetch the plan and the model,
submit. Those figures of Flower are quoted: they were taken on a machine of this kind, without TLS, nothing durable.
Medians are printed. Peak RSS is of a fresh intake each time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from fedtower.core.checking import CheckSettings
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.group_commit import GroupCommit, Limits
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.receiving import Reception
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part
from fedtower.core.signing import Signer
from fedtower.core.tally import Tally
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.signers.ed25519.signer import make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.certificates import issue_server, make_authority
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.plans import PublishedPlan, RowSource, decode_plan
from fedtower.plugins.transports.grpc.rows import LockedRows, serve_rows
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.tensors import to_tensor
from fedtower.plugins.transports.grpc.tls import DeviceTls, ServerTls
from fedtower.plugins.transports.grpc.transport import rows_address
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.opening import as_deployed
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.serving import Door, Worker, found, intake_config, intake_module, with_ports

# Uploads of a run, by bytes: some seconds each. Where there are more clients than that, each submits once.
UPLOADS = {10_000: 6_000, 1_000_000: 800, 10_000_000: 80}
LOADS = [(nbytes, clients) for nbytes in UPLOADS for clients in (50, 500, 5_000) if nbytes * clients <= 5e9]
VISITS = [(10_000, 50), (1_000_000, 50), (1_000_000, 200), (10_000_000, 50)]
QUICK_LOADS, QUICK_VISITS, QUICK_UPLOADS = [(10_000, 50), (1_000_000, 50)], [(10_000, 50)], {10_000: 600, 1_000_000: 60}

# Updates a second and peak RSS in MB of a pull and a push; FINDINGS of this project, 2 cores, load on the same cores.
FLOWER = {
    "SuperLink": {(10_000, 50): (16, 283), (1_000_000, 50): (13, 560), (10_000_000, 50): (6, 1_500)},
    "older gRPC server": {
        (10_000, 50): (3_130, 89),
        (1_000_000, 50): (217, 503),
        (1_000_000, 200): (147, 1_600),
        (10_000_000, 50): (16, 3_700),
    },
}

LIMITS = ("bare grpc.aio", "bare appends")
PROGRAMS = (*LIMITS, "bare, in parts", "intake")
TENSORS, ROWS, WIDTH, TABLE_ROWS = 4, 16, 64, 10_000
GENERATORS, CONNECTIONS = 2, 4
PART_BYTES = 256 << 10
SERVICE = "/fedtower.v1.Federation/"
LEASE_AT = b"this is a lease:"
LOST = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
LOCAL = LocalSettings(steps=1)


def main() -> None:
    """Print the tables, and write them as JSON on request."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a minute: fewer sizes and uploads, one run")
    parser.add_argument("--only", nargs="+", metavar="BYTES:CLIENTS", help="these loads, and no visits")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is measured")
    arguments = parser.parse_args()
    loads, visits, uploads = (QUICK_LOADS, QUICK_VISITS, QUICK_UPLOADS) if arguments.quick else (LOADS, VISITS, UPLOADS)
    if arguments.only:
        loads = [(int(nbytes), int(clients)) for nbytes, _, clients in (each.partition(":") for each in arguments.only)]
        visits = []
    repeat = 1 if arguments.quick else arguments.repeat
    libraries = ("grpcio", "protobuf", "numpy", "cryptography")
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "versions": {library: metadata.version(library) for library in libraries},
        "date": time.strftime("%Y-%m-%d"),
        "repeat": repeat,
        "generators": GENERATORS,
        "connections": GENERATORS * CONNECTIONS,
    }
    print(f"medians of {repeat} interleaved runs; {about}")
    with tempfile.TemporaryDirectory(prefix="fedtower-benchmark-", dir=arguments.folder) as name:
        most = max(max(uploads[nbytes], clients) for nbytes, clients in loads + visits)
        bench = Bench.make(Path(name), most)
        measured = [measure(bench, *load, uploads[load[0]], repeat, arguments.programs) for load in loads]
        visited = [visit(bench, *load, uploads[load[0]], repeat) for load in visits]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, "loads": measured, "visits": visited}, indent=1) + "\n")


def measure(
    bench: Bench, nbytes: int, clients: int, uploads: int, repeat: int, wanted: Sequence[str]
) -> dict[str, Any]:
    """One load: the intake and its limits in turns."""
    count = max(uploads, clients)
    programs: dict[str, Callable[[], dict[str, float]]] = {
        "bare grpc.aio": lambda: bench.bare(nbytes, clients, count, "bare"),
        "bare, in parts": lambda: bench.bare(nbytes, clients, count, "parts"),
        "bare appends": lambda: bench.appends(nbytes, clients, min(count, int(2e9 / nbytes))),
        "intake": lambda: bench.intake(nbytes, clients, count, "submit"),
    }
    table = in_turns({name: programs[name] for name in wanted}, repeat)
    limit = min((each["per_second"] for name, each in table.items() if name in LIMITS), default=float("nan"))
    print(f"\n{nbytes:,} bytes, {clients:,} clients, {count:,} updates\n{HEADER}")
    for program, each in table.items():
        show(program, each, nbytes, limit)
    return {"nbytes": nbytes, "clients": clients, "updates": count, "limit_per_second": limit, "table": table}


def visit(bench: Bench, nbytes: int, clients: int, uploads: int, repeat: int) -> dict[str, Any]:
    """Visits, a pull and a push, beside what is known of Flower's servers."""
    count = max(uploads // 2, clients)
    each = in_turns({"intake": lambda: bench.intake(nbytes, clients, count, "visit")}, repeat)["intake"]
    print(f"\n{nbytes:,} bytes pulled and pushed, {clients:,} clients, {count:,} visits\n{HEADER}")
    show("intake", each, nbytes, each["per_second"])
    for server, figures in FLOWER.items():
        if (nbytes, clients) in figures:
            rate, rss = figures[nbytes, clients]
            times = f"the intake: {each['per_second'] / rate:.1f} times"
            print(f"{'Flower ' + server:22}{rate:10,}{rate * nbytes / 1e6:8.1f}{'':>9}{rss:12,}   {times} (quoted)")
    return {"nbytes": nbytes, "clients": clients, "visits": count, "intake": each}


HEADER = (
    f"{'':22}{'updates/s':>10}{'MB/s':>8}{'CPU us':>9}{'peak RSS MB':>12}{'p99 ms':>9}{'of limit':>10}{'folded/s':>10}"
)


def show(program: str, each: Mapping[str, float], nbytes: int, limit: float) -> None:
    """One line of a table."""
    rate, peak, wait = each["per_second"], each.get("peak_megabytes", 0.0), 1e3 * each.get("p99_seconds", 0.0)
    folded = f"{each['folded_per_second']:10,.0f}" if "folded_per_second" in each else ""
    back = f"   {each['sent_back']:,.0f} times sent back" if each.get("sent_back") else ""
    print(
        f"{program:22}{rate:10,.0f}{rate * nbytes / 1e6:8.1f}{each['cpu_microseconds']:9,.0f}{peak:12,.0f}{wait:9,.0f}"
        f"{rate / limit:10.2f}{folded}{back}"
    )


def in_turns(programs: Mapping[str, Callable[[], dict[str, float]]], repeat: int) -> dict[str, dict[str, float]]:
    """The medians of each program's figures."""
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
    for _ in range(repeat):
        for program, run in programs.items():
            runs[program].append(run())
    return {
        program: {key: statistics.median(run[key] for run in held) for key in held[0]} for program, held in runs.items()
    }


@dataclass(frozen=True)
class Bench:
    """A federation with all who take part, in a folder that every run has a copy of."""

    folder: Path
    keys: Path
    signer: Signer
    registry: Registry
    tokens: Sequence[tuple[int, str]]

    @classmethod
    def make(cls, folder: Path, clients: int) -> Bench:
        """Certificates, a signing key, and so many clients, enrolled."""
        keys = folder / "keys"
        keys.mkdir()
        issue_server(make_authority(keys), keys, ["127.0.0.1"], 30)
        signer = make_key(keys / "signing.pem", keys / "signing.pub")
        credentials = Credentials(keys / "credentials.sqlite")
        codes = credentials.make_codes(clients, first_client=0)
        enrolled = [credentials.enrol(code, "", os.urandom(16)) for code in codes]
        for _, token in enrolled:  # who takes part has called before
            credentials.by_token(token)
        credentials.close()
        return cls(folder, keys, signer, discover(), [(device.client, token) for device, token in enrolled])

    def intake(self, nbytes: int, clients: int, count: int, task: str) -> dict[str, float]:
        """So many updates into a fresh intake, and then folded."""
        parameters = parameters_of(nbytes)
        with self._serving() as (server, port, folder, federation, journal):
            side = TableSide(
                folder=folder.path,
                journal=journal,
                epoch=journal.claim(),
                signer=self.signer,
                template=template(federation),
                terms=Terms(lease_seconds=3600.0, heartbeat_seconds=60.0, deadline_seconds=3600.0, quorum=1.0),
                said=print,
            )
            folded = Folded(side, parameters, count, self.registry)
            folded.open()
            rows = serve_rows(LockedRows.of(Table()), rows_address(folder.path), side.current)
            try:
                figures = self._generated(server, port, nbytes, clients, count, task, federation)
            finally:
                rows.stop(None).wait()
            return figures | folded.close()

    def bare(self, nbytes: int, clients: int, count: int, task: str) -> dict[str, float]:
        """So many updates to a handler that only adds arrays."""
        command = [sys.executable, __file__, "--bare", str(self.keys)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                return self._generated(server.pid, int(server.stdout.readline()), nbytes, clients, count, task, "")
            finally:
                server.terminate()

    def appends(self, nbytes: int, clients: int, count: int) -> dict[str, float]:
        """So many payloads appended to a file, each waited for by one of the clients."""
        path, payload = self.folder / "appended", os.urandom(nbytes)
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def append(several: Sequence[bytes]) -> Sequence[None]:
            os.writev(file, several)
            os.fdatasync(file)
            return [None] * len(several)

        commits: GroupCommit[bytes, None, None] = GroupCommit("bare", append, lambda done: done, Limits())
        waiting: deque[Future[None]] = deque()
        most = min(clients, max(1, (32 << 20) // nbytes))  # what waits lies in memory
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            if len(waiting) == most:
                waiting.popleft().result()
            waiting.append(commits.submit(payload, nbytes))
        for future in waiting:
            future.result()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        commits.close()
        os.close(file)
        path.unlink()
        return {"per_second": count / seconds, "cpu_microseconds": 1e6 * cpu / count}

    @contextmanager
    def _serving(self) -> Iterator[tuple[int, int, RunFolder, str, Any]]:
        """An intake, started as `fedtower serve` does: its process, its port, its folder, and its journal."""
        recipe = as_deployed("dssm-synthetic", [], self.registry)
        folder = RunFolder.create(recipe, self.registry, self.folder / "runs")
        found(folder, self.keys)
        door = with_ports(Door(certificate=str(self.keys / "server.pem"), key=str(self.keys / "server.key")))
        config = folder.path / "intake-config.json"
        config.write_text(json.dumps(intake_config(folder, recipe, door)), encoding="utf-8")
        federation = folder.federation().name
        journal = self.registry.make("journal", recipe.journal, path="journal").open(
            folder.path / "journal", federation
        )
        command = [sys.executable, "-m", intake_module(self.registry, recipe), str(config)]
        worker = Worker("intake", command, {**os.environ})
        worker.start()
        try:
            while not (folder.path / "intake.json").is_file():
                time.sleep(0.02)
            assert worker.pid is not None
            yield worker.pid, door.port, folder, federation, journal
        finally:
            worker.ask_to_end()
            worker.end(15.0)
            journal.close()
            shutil.rmtree(folder.path)

    def _generated(
        self, server: int, port: int, nbytes: int, clients: int, count: int, task: str, federation: str
    ) -> dict[str, float]:
        """What the generators measured, and what the server needed for it."""
        asked = {
            "port": port,
            "authority": str(self.keys / "authority.pem"),
            "nbytes": nbytes,
            "clients": max(clients // GENERATORS, 1),
            "task": task,
            "federation": federation,
        }
        shares = [self.tokens[start:count:GENERATORS] for start in range(GENERATORS)]
        generators = [generator({**asked, "tokens": share}) for share in shares]
        for each in generators:
            expect(each, "ready")
        idle = status_megabytes(server, "VmRSS")
        with profiled(server):
            cpu = cpu_seconds(server)
            for each in generators:
                tell(each, "go")
            results = [json.loads(expect(each, "{")) for each in generators]
        cpu, peak = cpu_seconds(server) - cpu, status_megabytes(server, "VmHWM")
        for each in generators:
            each.communicate()
        seconds = max(each["ended"] for each in results) - min(each["started"] for each in results)
        waited = np.concatenate([each["waited"] for each in results])
        assert len(waited) == count, f"{len(waited)} of {count} updates were acknowledged"
        return {
            "per_second": count / seconds,
            "cpu_microseconds": 1e6 * cpu / count,
            "server_cores": cpu / seconds,
            "generator_cores": sum(each["cpu"] for each in results) / seconds,
            "idle_megabytes": idle,
            "peak_megabytes": peak,
            "p50_seconds": float(np.percentile(waited, 50)),
            "p99_seconds": float(np.percentile(waited, 99)),
            "sent_back": float(sum(each["sent_back"] for each in results)),
        }


class Folded:
    """The table side of one round: its window is opened, and what was accepted is folded when the load is over."""

    def __init__(self, side: TableSide, parameters: Mapping[str, Any], count: int, registry: Registry) -> None:
        self._plan = Plan(1, parameters, LOCAL)
        self._cohort = Cohort(1, np.arange(count), count)
        self._side, self._registry, self._count = side, registry, count
        self._over = threading.Event()
        self._figures: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run)

    def open(self) -> None:
        """Open the window."""
        self._thread.start()
        while not (self._side.windows / "000001-train.json").is_file():
            time.sleep(0.01)

    def close(self) -> dict[str, float]:
        """Fold, and say how quickly."""
        self._over.set()
        self._thread.join()
        return self._figures

    def _run(self) -> None:
        arriving = self._side.exchange(self._plan, self._cohort, None, Draws(1), None)  # type: ignore[arg-type]
        first = next(arriving)
        self._over.wait()
        tally, hooks = Tally(self._cohort), Hooks(self._registry.manager)
        reception = Reception(self._plan, self._cohort, (), CheckSettings(max_norm=1e6), Devices(), hooks, tally)  # type: ignore[arg-type]
        aggregator = self._registry.make("aggregator", Part("fedavg"))
        started, cpu = time.perf_counter(), time.thread_time()
        total, _ = aggregator.fold(tally.count(reception.accepted(chain([first], arriving))), {})
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu
        assert total.weights[0] == len(tally.survivors()) == self._count
        self._figures = {"folded_per_second": self._count / seconds, "fold_cpu_microseconds": 1e6 * cpu / self._count}


class Devices:
    """What the table process knows of clients that are elsewhere."""

    def leased(self, clients: Any) -> None:
        """Nothing: the intake has compared the rows."""

    def settle(self, clients: Any, counted: Any) -> None:
        """A device is told by the intake."""


class Table:
    """Rows that devices fetch."""

    generation = 0

    def fetch(self, source: str, ids: Any) -> Any:
        """The rows of ``ids``."""
        return np.zeros((len(ids), WIDTH), dtype=np.float32)

    def apply(self, deltas: Any, lr_scale: float) -> None:
        """Nobody steps here."""
        raise AssertionError

    def snapshot(self) -> Mapping[str, Any]:
        """Nothing is kept."""
        return {}

    def restore(self, arrays: Any) -> None:
        """Nothing was kept."""


def template(federation: str) -> PublishedPlan:
    """A plan of any round."""
    return PublishedPlan(
        federation=federation,
        round=0,
        seed=1,
        bundle=Artefact.of("manifest.json", b"{}"),
        files=(),
        parameters=(),
        local=LOCAL,
        rows=(RowSource("item", TABLE_ROWS, WIDTH),),
        norm_bound=1e6,
        run="benchmark",
    )


def parameters_of(nbytes: int) -> dict[str, Any]:
    """Parameters whose deltas are, with the rows, so many bytes."""
    numbers = (nbytes - ROWS * (4 * WIDTH + 4)) // 4 // TENSORS
    return {f"tower.{place}.weight": np.zeros(numbers, dtype=np.float32) for place in range(TENSORS)}


@contextmanager
def profiled(pid: int) -> Iterator[None]:
    """py-spy (from PyPI) watches a process meanwhile, if FEDTOWER_BENCHMARK_PROFILE names a file for what it sees."""
    path = os.environ.get("FEDTOWER_BENCHMARK_PROFILE")
    if path is None:
        yield
        return
    command = ["py-spy", "record", "-p", str(pid), "-d", "600", "-r", "200", "-f", "raw", "-o", path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as watching:
        time.sleep(0.5)  # it looks at the interpreter before it begins
        yield
        watching.send_signal(signal.SIGINT)


# The generators: so many clients in one process.


def generator(asked: Mapping[str, Any]) -> subprocess.Popen[str]:
    """A process of clients, which has been told who they are."""
    command = [sys.executable, __file__, "--generate"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    tell(process, json.dumps(asked))
    return process


def tell(process: subprocess.Popen[str], line: str) -> None:
    """A line to a process."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def expect(process: subprocess.Popen[str], beginning: str) -> str:
    """The next line of a process, which begins as expected."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(beginning):
        raise SystemExit(f"a generator failed, and said {line!r}")
    return line


@dataclass
class Generator:
    """Clients of one process: each submits when its turn comes, so many of them at the same time."""

    channels: Sequence[grpc.aio.Channel]
    asked: Mapping[str, Any]
    template: bytes = b""
    shared: Sequence[bytes] = ()
    sent_back: int = 0

    async def run(self, read: Callable[[], str], write: Callable[[str], None]) -> None:
        """Prepare, wait for the word, submit, and say how long it took."""
        tokens = [(int(client), (("authorization", f"Bearer {token}"),)) for client, token in self.asked["tokens"]]
        task = self.asked["task"]
        prepared: list[Any] = [None] * len(tokens)
        if task == "submit":
            prepared = await self._all(tokens, self._prepare, 32)
        elif task in ("bare", "parts"):
            payload = np.full(self.asked["nbytes"] // 4, 1e-3, np.float32).tobytes()
            self.shared = [payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)]
            self.template = payload
            await self._each(0, tokens[0], None)
        write("ready")
        await asyncio.to_thread(read)
        waited: list[float] = []

        async def timed(place: int, who: Any) -> None:
            began = time.monotonic()
            await self._each(place, who, prepared[place])
            waited.append(time.monotonic() - began)

        started, cpu = time.monotonic(), time.process_time()
        await self._all(tokens, timed, self.asked["clients"])
        ended, cpu = time.monotonic(), time.process_time() - cpu
        figures = {"started": started, "ended": ended, "cpu": cpu, "waited": waited, "sent_back": self.sent_back}
        write(json.dumps(figures))

    async def _all(self, tokens: Sequence[Any], do: Callable[[int, Any], Any], many: int) -> list[Any]:
        """Do it for everyone, so many at a time."""
        turns = iter(enumerate(tokens))
        results: list[Any] = [None] * len(tokens)

        async def work() -> None:
            for place, who in turns:
                results[place] = await do(place, who)

        await asyncio.gather(*(work() for _ in range(min(many, len(tokens)))))
        return results

    async def _each(self, place: int, who: Any, prepared: Any) -> None:
        """One client's turn."""
        channel: Any = self.channels[place % len(self.channels)]
        task = self.asked["task"]
        if task == "bare":
            await channel.unary_unary("/bare/Add")(self.template, metadata=who[1])
        elif task == "parts":
            await channel.stream_unary("/bare/AddParts")(several(self.shared), metadata=who[1])
        else:
            if prepared is None:
                prepared = await self._prepare(place, who, pull=True)
            while True:
                try:
                    answer = await channel.stream_unary(SERVICE + "Submit")(several(prepared), metadata=who[1])
                except grpc.aio.AioRpcError as error:  # an answer that comes before all is sent is lost in this client
                    if error.code() not in LOST:
                        raise
                    answer = pb.SubmitReply(come_back=pb.ComeBack(seconds=1.0)).SerializeToString()
                reply = pb.SubmitReply.FromString(answer)
                pause = reply.come_back.seconds or reply.refusal.retry_after_seconds
                if not pause:
                    break
                self.sent_back += 1
                await asyncio.sleep(pause * random.uniform(0.7, 1.3))
            if reply.WhichOneof("outcome") != "acknowledged":
                raise SystemExit(f"an update was not acknowledged: {reply}")

    async def _prepare(self, place: int, who: Any, *, pull: bool = False) -> Sequence[bytes]:
        """Check in, fetch rows (and the model), and make the messages of an upload."""
        channel: Any = self.channels[place % len(self.channels)]
        metadata = who[1]
        request = pb.CheckInRequest(protocol=1, federation=self.asked["federation"], num_examples=10)
        while True:
            answer = await channel.unary_unary(SERVICE + "CheckIn")(request.SerializeToString(), metadata=metadata)
            reply = pb.CheckInReply.FromString(answer)
            if reply.WhichOneof("outcome") == "lease":
                break
            await asyncio.sleep(0.05)
        lease = reply.lease.lease
        if pull or not self.template:
            plan = decode_plan(await self._fetch(channel, lease, reply.lease.plan.artefact.digest, metadata))
            if pull:
                for each in plan.parameters:
                    await self._fetch(channel, lease, each.digest, metadata)
            if not self.template:
                self._make_template(plan)
        ids = to_tensor(np.arange(ROWS, dtype=np.uint32))
        rows = pb.FetchRowsRequest(lease=lease, source="item", ids=ids).SerializeToString()
        async for chunk in channel.unary_stream(SERVICE + "FetchRows")(rows, metadata=metadata):
            assert pb.RowsChunk.FromString(chunk).WhichOneof("outcome") == "part"
        first = self.template[:PART_BYTES].replace(LEASE_AT, lease, 1)
        digest = hashlib.sha256(first)
        digest.update(memoryview(self.template)[PART_BYTES:])
        header = pb.SubmitHeader(lease=lease, digest=digest.digest(), size=len(self.template))
        return [pb.SubmitPart(header=header).SerializeToString(), data_part(first), *self.shared]

    async def _fetch(self, channel: Any, lease: bytes, digest: bytes, metadata: Any) -> bytes:
        """An artefact."""
        request = pb.FetchRequest(lease=lease, digest=digest).SerializeToString()
        chunks = [c async for c in channel.unary_stream(SERVICE + "Fetch")(request, metadata=metadata)]
        return b"".join(pb.Chunk.FromString(chunk).data for chunk in chunks)

    def _make_template(self, plan: PublishedPlan) -> None:
        """The update that everybody sends, but for its lease, which lies in its first part."""
        values = {
            name: np.full((1, *value.shape), 1e-3, np.float32)
            for name, value in parameters_of(self.asked["nbytes"]).items()
        }
        rows = Rows(np.array([0, ROWS]), np.arange(ROWS), np.full((ROWS, WIDTH), 1e-3, np.float32))
        updates = Updates(weights=np.ones(1), dense=values, rows={"item": rows}, metrics={"loss": np.ones(1)})
        belongs = Belongs(plan.federation, plan.model, plan.round, LEASE_AT)
        self.template = encode_submission(Submission(belongs, updates, 10))
        assert self.template.count(LEASE_AT, 0, PART_BYTES) == 1
        rest = self.template[PART_BYTES:]
        self.shared = [data_part(rest[at : at + PART_BYTES]) for at in range(0, len(rest), PART_BYTES)]


def data_part(data: bytes) -> bytes:
    """A part of an upload, serialised."""
    return pb.SubmitPart(data=data).SerializeToString()


async def several(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    """The messages, as a call sends them."""
    for message in messages:
        yield message


async def generate() -> None:
    """Be a generator: what is asked for comes as one line of JSON."""
    asked = json.loads(await asyncio.to_thread(sys.stdin.readline))
    credentials = DeviceTls(Path(asked["authority"])).credentials()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 1 << 20)]
    channels = [grpc.aio.secure_channel(f"127.0.0.1:{asked['port']}", credentials, options) for _ in range(CONNECTIONS)]
    await Generator(channels, asked).run(sys.stdin.readline, lambda line: print(line, flush=True))
    for channel in channels:
        await channel.close()


# The limit: arrays are added, and nothing else.


async def bare(keys: Path) -> None:
    """Be a server whose handlers add arrays, until SIGTERM."""
    total = np.zeros(0, np.float32)

    def add(data: bytes) -> bytes:
        nonlocal total
        values = np.frombuffer(data, np.float32)
        total = total + values if len(total) == len(values) else values
        return b""

    async def whole(data: bytes, _context: Any) -> bytes:
        return add(data)

    async def in_parts(parts: AsyncIterator[bytes], _context: Any) -> bytes:
        return add(b"".join([part async for part in parts]))

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    methods: dict[str, Any] = {
        "Add": grpc.unary_unary_rpc_method_handler(whole),
        "AddParts": grpc.stream_unary_rpc_method_handler(in_parts),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
    tls = ServerTls(keys / "server.pem", keys / "server.key")
    port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def status_megabytes(pid: int, name: str) -> float:
    """A line of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--generate"]:
        asyncio.run(generate())
    elif sys.argv[1:2] == ["--bare"]:
        asyncio.run(bare(Path(sys.argv[2])))
    else:
        main()
