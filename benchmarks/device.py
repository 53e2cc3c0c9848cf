"""What one visit costs a device: processor seconds and memory with MNN, onnxruntime and torch, each in a fresh process.

    python benchmarks/device.py [--json FILE] [--repeat N]

The visit is of ``dssm`` (64 dimensions, 200 history slots, 200 negatives, a batch of 32) with 20 steps, from a bundle
that is made first. *bare* is what cannot be undercut: a script of one process that loads the same MNN file with numpy
and MNN alone, checks nothing, and runs as many steps. Processor seconds are of the whole process and its children;
memory is the proportional set size summed over them, at its highest. The programs run in turns, so that a neighbour's
load falls on all of them alike; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SLOTS, NEGATIVES, BATCH = 20, 200, 200, 32

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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedtower-benchmark-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--prepare", name], check=True)
        runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
        for _ in range(arguments.repeat):
            for program, text in PROGRAMS.items():
                runs[program].append(measure(text, folder))
        sizes = {path.name: path.stat().st_size for path in sorted((folder / "bundle").iterdir())}
    table = {
        program: {key: statistics.median(run[key] for run in held) for key in held[0]} for program, held in runs.items()
    }
    libraries = ("numpy", "MNN", "onnxruntime", "torch")
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {library: metadata.version(library) for library in libraries},
        "date": time.strftime("%Y-%m-%d"),
        "steps": STEPS,
        "repeat": arguments.repeat,
    }
    print(f"one visit of {STEPS} steps, medians of {arguments.repeat} interleaved runs; {about}")
    print(f"{'':18}{'CPU s':>8}{'import':>8}{'PSS MB':>8}{'processes':>11}{'x bare CPU':>12}{'x bare PSS':>12}")
    bare = table["bare MNN script"]
    for program, each in table.items():
        print(
            f"{program:18}{each['cpu_seconds']:8.3f}{each['import_cpu_seconds']:8.3f}{each['pss_megabytes']:8.1f}"
            f"{each['processes']:11.0f}{each['cpu_seconds'] / bare['cpu_seconds']:12.2f}"
            f"{each['pss_megabytes'] / bare['pss_megabytes']:12.2f}"
        )
    print("files: " + ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, "table": table, "files": sizes}, indent=1) + "\n")


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
