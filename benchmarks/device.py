"""What one visit costs a device: processor seconds and memory with MNN, onnxruntime and torch, each in a fresh process.

    python benchmarks/device.py [--json FILE] [--repeat N] [--only local|network]

The visit is of ``dssm`` (64 dimensions, 200 history slots, 200 negatives, a batch of 32) with 20 steps, from a bundle
that is made first. *bare* is what cannot be undercut: a script of one process that loads the same MNN file with numpy
and MNN alone, checks nothing, and runs as many steps. Processor seconds are of the whole process and its children;
memory is the proportional set size summed over them, at its highest. The programs run in turns, so that a neighbour's
load falls on all of them alike; medians are printed.

*Over the network* is the same visit as `fedtower device` makes it, at a server that `fedtower serve` started: TLS,
check in, plan, artefacts, rows, 20 steps in MNN, submit, acknowledged when it is durable. The first visit enrols and
fetches the bundle, another one what has changed. CPU, memory and *wall* are of the whole process, in which it also
waits for a round to begin; *visit* is from its task to the acknowledgement. Bytes are those of the line, TLS and HTTP/2
included, counted on the way. What others need for a client that fetches, trains and sends once is quoted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SLOTS, NEGATIVES, BATCH = 20, 200, 200, 32

# The same visit at a server: whoever calls is the cohort.
SERVED = {
    "data.users": 200,
    "data.items": 1682,
    "data.mean_events": 150,
    "model.dim": 64,
    "local.steps": STEPS,
    "local.batch_size": BATCH,
    "local.negatives": NEGATIVES,
    "local.history_length": SLOTS // 2,
    "cohort.size": 1,
    "rounds": 10_000,
    "evaluation.every": 10_000,
    "checkpoint.every": 10_000,
    "transport.name": "grpc",
    "transport.wait_for": 1,
    "transport.presence_seconds": 3.0,
    "transport.deadline_seconds": 10.0,  # a round may be for the device that has just left
    "mode": "deployed",
}

# A client that fetches, trains and sends once, the whole process: CPU seconds and MB; FINDINGS of this project.
OTHERS = {
    "Flower's SuperNode": (5.6, 552),
    "Flower's older client, torch": (3.7, 389),
    "grpc and torch": (2.4, 319),
    "grpc and MNN, a script": (0.13, 54),
}

COMMON = """
import sys, time
began = time.process_time()
import numpy as np
data = np.load(sys.argv[2])
group = lambda name: {key.partition("/")[2]: data[key] for key in data.files if key.startswith(name + "/")}
"""

VISIT = """
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Work
def visit(local):
    rows = RowIds(data["offsets"], data["ids"])
    work = Work(data["clients"], data["steps"], data["examples"], group("inputs"), group("slots"), {"item": rows},
                {"item": data["rows"]})
    return Plan(1, group("parameters"), local), work
"""

DEVICE = (
    COMMON
    + VISIT
    + """
from fedtower.plugins.runtimes.ENGINE.device import open_bundle
runtime = open_bundle(sys.argv[1])
imported = time.process_time() - began
plan, work = visit(runtime.local)
updates, _ = runtime.train(plan, work)
"""
)

TORCH = (
    COMMON
    + VISIT
    + """
import torch
torch.set_num_threads(1)
from pathlib import Path
from fedtower.core.registry import discover
from fedtower.core.settings import Part
from fedtower.recsys.models import Schema
from fedtower.recsys.bundle import Bundle
local = Bundle.open(Path(sys.argv[1])).manifest.settings
registry = discover()
model = registry.make("model", Part("dssm")).declare(Schema(1682, 29, 18, 100), torch.Generator().manual_seed(1))
runtime = registry.make("runtime", Part("torch_loop")).open(model, local)
imported = time.process_time() - began
plan, work = visit(local)
updates, _ = runtime.train(plan, work)
"""
)

BARE = (
    COMMON
    + """
import json
import MNN
import MNN.expr as F
imported = time.process_time() - began
graph = json.load(open(sys.argv[1] + "/manifest.json"))["graphs"]["train"]
manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
module = MNN.nn.load_module_from_file(sys.argv[1] + "/train.mnn", [port["port"] for port in graph["inputs"]],
    [port["port"] for port in graph["outputs"]], runtime_manager=manager)
def put(value):
    held = F.placeholder(list(value.shape), F.NCHW, F.int if value.dtype.kind in "iu" else F.float)
    held.write(np.ascontiguousarray(value))
    return held
held = {name: put(value) for name, value in group("parameters").items()}
inputs, slots, rows = group("inputs"), group("slots"), data["rows"].copy()
rate = put(np.array(1.0, dtype=np.float32))
for at in range(int(data["steps"][0])):
    feed = []
    for port in graph["inputs"]:
        role, name = port["role"], port["name"]
        if role == "parameter": feed.append(held[name])
        elif role == "input": feed.append(put(inputs[name][0, at].astype(port["dtype"])))
        elif role == "slot": feed.append(put(rows[slots[name][0, at]]))
        else: feed.append(rate)
    for port, value in zip(graph["outputs"], module.forward(feed)):
        if port["role"] == "parameter": held[port["name"]] = value
        elif port["role"] == "gradient": np.subtract.at(rows, slots[port["name"]][0, at], value.read())
final = {name: np.array(value.read()) for name, value in held.items()}
"""
)

END = """
print("imported", imported)
print("ready", flush=True)
sys.stdin.readline()
"""

PROGRAMS = {
    "bare MNN script": BARE,
    "mnn": DEVICE.replace("ENGINE", "mnn"),
    "onnx": DEVICE.replace("ENGINE", "onnx"),
    "torch_loop": TORCH,
}


def main() -> None:
    """Print the table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["local", "network"])
    arguments = parser.parse_args()
    local = {} if arguments.only == "network" else locally(arguments.repeat)
    network = {} if arguments.only == "local" else over_the_network(arguments.repeat)
    libraries = ("numpy", "MNN", "onnxruntime", "torch", "grpcio")
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "python": platform.python_version(),
        "versions": {library: metadata.version(library) for library in libraries},
        "date": time.strftime("%Y-%m-%d"),
        "steps": STEPS,
        "repeat": arguments.repeat,
    }
    print(about)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, **local, "network": network}, indent=1) + "\n")


def locally(repeat: int) -> dict[str, Any]:
    """A visit of each program, without a network."""
    with tempfile.TemporaryDirectory(prefix="fedtower-benchmark-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--prepare", name], check=True)
        runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
        for _ in range(repeat):
            for program, text in PROGRAMS.items():
                runs[program].append(measure(text, folder))
        sizes = {path.name: path.stat().st_size for path in sorted((folder / "bundle").iterdir())}
    table = {
        program: {key: statistics.median(run[key] for run in held) for key in held[0]} for program, held in runs.items()
    }
    print(f"one visit of {STEPS} steps, medians of {repeat} interleaved runs")
    print(f"{'':18}{'CPU s':>8}{'import':>8}{'PSS MB':>8}{'processes':>11}{'x bare CPU':>12}{'x bare PSS':>12}")
    bare = table["bare MNN script"]
    for program, each in table.items():
        print(
            f"{program:18}{each['cpu_seconds']:8.3f}{each['import_cpu_seconds']:8.3f}{each['pss_megabytes']:8.1f}"
            f"{each['processes']:11.0f}{each['cpu_seconds'] / bare['cpu_seconds']:12.2f}"
            f"{each['pss_megabytes'] / bare['pss_megabytes']:12.2f}"
        )
    print("files: " + ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    return {"table": table, "files": sizes}


def measure(text: str, folder: Path) -> dict[str, float]:
    """One program, from its start to the end of its visit."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", text + END, str(folder / "bundle"), str(folder / "visit.npz")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    words = {}
    for line in process.stdout:
        if line.startswith("ready"):
            break
        if line.startswith("imported"):
            words["imported"] = float(line.split()[1])
    family = [process.pid, *children_of(process.pid)]
    memory = sum(pss_bytes(pid) for pid in family)
    cpu = sum(cpu_seconds(pid) for pid in family)
    _, errors = process.communicate("\n")
    if process.returncode:
        raise SystemExit(errors)
    return {
        "cpu_seconds": cpu,
        "import_cpu_seconds": words["imported"],
        "pss_megabytes": memory / 1e6,
        "processes": float(len(family)),
    }


def over_the_network(repeat: int) -> dict[str, dict[str, float]]:
    """First and later visits of `fedtower device` at a real server."""
    runs: dict[str, list[dict[str, float]]] = {"first visit": [], "another visit": []}
    with tempfile.TemporaryDirectory(prefix="fedtower-benchmark-") as name:
        folder = Path(name)
        fedtower("data", "shard", "dssm-synthetic", str(folder / "shards"), "-n", str(repeat), *options(SERVED))
        fedtower("certs", str(folder / "keys"), "--host", "127.0.0.1")
        fedtower("keygen", str(folder / "keys"))
        credentials = str(folder / "keys" / "credentials.sqlite")
        codes = fedtower("enrol", "codes", credentials, "-n", str(repeat), "--first-client", "0").split()
        with serving(folder) as port, Relay(port) as relay:
            for client, code in enumerate(codes):
                for visit, more in (("first visit", ["--code", code]), ("another visit", [])):
                    runs[visit].append(visit_of_device(folder, client, relay, more))
    table = {
        visit: {key: statistics.median(run[key] for run in held) for key in held[0]} for visit, held in runs.items()
    }
    print(f"\none visit of {STEPS} steps over the network, medians of {repeat}")
    print(f"{'':18}{'CPU s':>8}{'wall s':>8}{'visit s':>9}{'PSS MB':>8}{'kB down':>9}{'kB up':>8}")
    for visit, each in table.items():
        print(
            f"{visit:18}{each['cpu_seconds']:8.2f}{each['wall_seconds']:8.2f}{each['visit_seconds']:9.2f}"
            f"{each['pss_megabytes']:8.1f}{each['bytes_down'] / 1e3:9.0f}{each['bytes_up'] / 1e3:8.0f}"
        )
    for program, (cpu, memory) in OTHERS.items():
        print(f"{program:44}{cpu:5.2f} CPU s, {memory} MB (quoted)")
    return table


def visit_of_device(folder: Path, client: int, relay: Relay, more: Sequence[str]) -> dict[str, float]:
    """One task of one device, in a process of its own."""
    data = folder / "shards" / f"client-{client:06d}.safetensors"
    called = ["device", "--server", f"127.0.0.1:{relay.port}", "--data", str(data), "--keys", str(folder / "keys")]
    command = [sys.executable, "-m", "fedtower", *called, "--tasks", "1", "--json", *more]
    down, up, started = relay.down, relay.up, time.monotonic()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said)
        most = 0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            most = max(most, family_pss(process.pid))
            time.sleep(0.02)
        seconds, used = time.monotonic() - started, ended[2]
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        said.seek(0)
        events = [json.loads(line) for line in said]
    done = [event["seconds"] for event in events if event["event"] == "done"]
    if process.returncode or not done:
        raise SystemExit(f"the device ended with {process.returncode}, and said {events}")
    return {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": seconds,
        "visit_seconds": done[0],
        "pss_megabytes": most / 1e6,
        "bytes_down": float(relay.down - down),
        "bytes_up": float(relay.up - up),
    }


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A server of the model, and its port."""
    command = [sys.executable, "-m", "fedtower", "serve", "dssm-synthetic", "--port", "0", *options(SERVED)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--keys", str(folder / "keys"), "--runs", str(folder / "runs")], stdout=log, stderr=log
        )
        try:
            while "waiting for" not in (folder / "server.log").read_text():
                if server.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text())
                time.sleep(0.1)
            (ready,) = (folder / "runs").glob("*/intake.json")
            yield int(json.loads(ready.read_text())["port"])
        finally:
            server.terminate()
            server.wait()


class Relay:
    """A port that passes everything on to another, and counts the bytes."""

    def __init__(self, to: int) -> None:
        self.port = self.down = self.up = 0
        self._to, self._ready = to, threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(self._pass(reader, back, "up"), self._pass(there, writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        try:
            while data := await reader.read(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def fedtower(*arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "fedtower", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [each for key, value in settings.items() for each in ("-o", f"{key}={json.dumps(value)}")]


def family_pss(pid: int) -> int:
    """The memory of a process and of all that it started, as far as they are still there."""
    total = 0
    try:
        for each in [pid, *children_of(pid)]:
            total += pss_bytes(each)
    except (OSError, StopIteration):
        return 0
    return total


def children_of(pid: int) -> list[int]:
    """All the processes that a process started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children_of(child)]
    return found


def pss_bytes(pid: int) -> int:
    """The proportional set size: memory that two processes share counts half for each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def prepare(folder: Path) -> None:
    """The bundle and a visit's data; in a process of its own, as it needs torch."""
    import torch

    from fedtower.core.draws import Draws
    from fedtower.core.plan import LocalSettings
    from fedtower.core.registry import discover
    from fedtower.core.rows import localise
    from fedtower.core.runtime import Work
    from fedtower.core.settings import Part
    from fedtower.core.store import ClientStore
    from fedtower.recsys.export import Subject, export_model
    from fedtower.recsys.graphs import Visit
    from fedtower.recsys.learned import Learned
    from fedtower.recsys.models import Declared, Schema

    registry = discover()
    schema = Schema(num_items=1682, num_user_features=29, num_item_features=18, history_length=SLOTS // 2)
    model: Declared = registry.make("model", Part("dssm")).declare(schema, torch.Generator().manual_seed(1))
    draws, step = Draws(1), np.arange(STEPS)[None, :, None]
    ids = draws.integers(1682, "ids", step, np.arange(SLOTS + NEGATIVES)).reshape(1, -1)
    needed, where = localise(ids)
    where = where.reshape(1, STEPS, SLOTS + NEGATIVES)
    rows = (0.05 * draws.normal("rows", needed.ids[:, None], np.arange(model.cloud.width))).astype(np.float32)
    inputs: dict[str, Any] = {
        "target": draws.integers(SLOTS, "target", step, np.arange(BATCH)),
        "weight": np.ones((1, STEPS, BATCH), dtype=np.float32),
        "user": np.repeat(draws.normal("user", np.arange(29))[None, None], STEPS, axis=1).astype(np.float32),
    }
    slots = {"history": where[..., :SLOTS], "negatives": where[..., SLOTS:]}
    one = np.array([0]), np.array([STEPS]), np.array([STEPS * BATCH])
    work = Work(*one, inputs, slots, {"item": needed}, {"item": rows})
    local = LocalSettings(steps=STEPS, batch_size=BATCH, negatives=NEGATIVES, history_length=SLOTS // 2, lr=0.1)
    subject = Subject("dssm", model, local, Visit.of(model, work, model.cloud.width))
    learned = Learned(model, model.parameters(), ClientStore(1), None)
    export_model(subject, learned, folder / "bundle", registry)
    arrays: dict[str, Any] = {"clients": one[0], "steps": one[1], "examples": one[2], "rows": rows}
    arrays |= {"offsets": needed.offsets, "ids": needed.ids}
    groups = {"inputs": inputs, "slots": slots, "parameters": model.parameters()}
    arrays |= {f"{group}/{name}": value for group, held in groups.items() for name, value in held.items()}
    np.savez(folder / "visit.npz", **arrays)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]))
    else:
        main()
