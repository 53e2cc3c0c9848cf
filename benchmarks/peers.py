"""fedtower's simulation beside other platforms', on one machine: the same clients, the same batches, the same numbers.

    python benchmarks/peers.py                            # makes an environment for the peers, measures, prints a table
    python benchmarks/peers.py --peers-python PATH        # an environment that has flwr[simulation] and pfl[pytorch]
    python benchmarks/peers.py --rounds 20 --only vectorized:workers=2 "pfl-research, 2 workers"

The workload is ``tower`` of benchmarks/simulation.py. Each contestant is a program of its own that trains a round of
100 clients when it is told to; they take turns of four rounds, so that what slows one down slows the others down too,
and the first of a turn is not counted: figures are of the steady state. Before anything
is timed, each has to give the mean update of a float64 reference. The peers get their shuffled batches and negatives
from a file; fedtower draws them itself, inside the time that is measured. Folding is in everybody's time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, softplus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peer_programs.answering import serve as take_turns
from benchmarks.simulation import (
    COHORT,
    GivenData,
    Workload,
    _children,
    _cpu_of,
    _runtime,
    cohort_of,
    tower,
)
from fedtower.core.recipe import Part
from fedtower.core.registry import discover

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
PEERS = {"flwr[simulation]": "1.41.0", "pfl[pytorch]": "0.6.0"}
OURS = ("torch_loop", "vectorized", "vectorized:workers=2")
FLOWER, PFL_1, PFL_2 = "Flower, 100 nodes", "pfl-research, 1 worker", "pfl-research, 2 workers"
# Of a parameter's largest change. Flower averages parameters in float32: they are rounded by 6e-8 of their size, which
# is 2e-5 of what a round changes. Another batch, or another negative, would be seen as more than 1e-3.
TURN = 4
TOLERANCE = 5e-5
AIMS = {PFL_2: 20.0, FLOWER: 75.0}


@dataclass
class Contestant:
    """A platform that waits for rounds: one process, or several that wait for each other."""

    name: str
    commands: Sequence[Sequence[str]]
    environments: Sequence[Mapping[str, str]]
    log: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **environment},
                )
                for command, environment in zip(self.commands, self.environments, strict=True)
            ]
        self._hear("ready")

    def train(self, number: int, path: Path | None = None) -> None:
        """One round, timed."""
        cpu, started = self._cpu_seconds(), time.perf_counter()
        for place, process in enumerate(self.processes):
            assert process.stdin is not None
            process.stdin.write(f"{number} {path if path and not place else '-'}\n")
            process.stdin.flush()
        self._hear("done")
        self.seconds.append(time.perf_counter() - started)
        self.cpu.append(self._cpu_seconds() - cpu)

    def stop(self) -> None:
        """End it, and all that it has started."""
        family = [pid for process in self.processes for pid in _children(process.pid)]
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in family:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue

    def _hear(self, word: str) -> None:
        for process in self.processes:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            if said != word:
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"{self.name} said {said!r}, not {word!r}; its log ends with {last}")

    def _cpu_seconds(self) -> float:
        mine = [process.pid for process in self.processes]
        return sum(_cpu_of(pid) for each in mine for pid in (each, *_children(each)))


def rounds_file(workload: Workload, rounds: int, path: Path) -> dict[str, Any]:
    """Every round's clients and batches, as fedtower draws them, written for all contestants."""
    data = workload.data
    assert isinstance(data, GivenData)
    seen, chosen, sizes = [], [], []
    clients = np.stack([cohort_of(number, COHORT) for number in range(rounds)])
    for number in range(rounds):
        work = data.work(workload.plan(number), clients[number])
        for place, size in enumerate(work.examples.tolist()):
            vector, items = (work.inputs[name].places[place] for name in ("vector", "items"))  # type: ignore[attr-defined]
            seen.append(vector.reshape(-1)[:size])
            chosen.append(items.reshape(-1, 5)[:size])
            sizes.append(size)
    arrays: dict[str, Any] = {
        "clients": clients,
        "offsets": np.concatenate([[0], np.cumsum(sizes)]),
        "seen": np.concatenate(seen),
        "chosen": np.concatenate(chosen),
        "vectors": data.vectors,
        "items": data.items,
        "lr": np.asarray(workload.local.lr),
        "batch_size": np.asarray(workload.local.batch_size),
    }
    arrays |= {f"initial/{name}": value for name, value in workload.declared.parameters().items()}
    np.savez(path, **arrays)
    return arrays


def reference(arrays: Mapping[str, Any], number: int) -> dict[str, NDArray[np.float64]]:
    """The mean delta of a round by examples, in float64, by autograd, one client and one step after another."""
    initial = {n.removeprefix("initial/"): torch.tensor(v).double() for n, v in arrays.items() if "initial/" in n}
    total = {name: torch.zeros_like(value) for name, value in initial.items()}
    offsets, cohort, batch = arrays["offsets"], arrays["clients"].shape[1], int(arrays["batch_size"])
    for place in range(number * cohort, (number + 1) * cohort):
        now = dict(initial)
        for first in range(offsets[place], offsets[place + 1], batch):
            here = slice(first, min(first + batch, offsets[place + 1]))
            now = {name: value.detach().requires_grad_() for name, value in now.items()}
            vectors = torch.tensor(arrays["vectors"][arrays["seen"][here]]).double()
            items = torch.tensor(arrays["items"][arrays["chosen"][here]]).double()
            hidden = torch.relu(linear(vectors, now["first.weight"], now["first.bias"]))
            user = linear(hidden, now["second.weight"], now["second.bias"])
            scores = (items * user[:, None, :]).sum(dim=2)
            loss = (softplus(-scores[:, 0]) + softplus(scores[:, 1:]).sum(dim=1)).mean()
            slopes = torch.autograd.grad(loss, list(now.values()))
            lr = float(arrays["lr"])
            now = {name: value - lr * slope for (name, value), slope in zip(now.items(), slopes, strict=True)}
        for name, value in now.items():
            total[name] += (value - initial[name]).detach() * float(offsets[place + 1] - offsets[place])
    examples = float(offsets[(number + 1) * cohort] - offsets[number * cohort])
    return {name: (value / examples).numpy() for name, value in total.items()}


def error_of(path: Path, wanted: Mapping[str, NDArray[np.float64]]) -> float:
    """The largest difference from the reference, as a share of the parameter's largest change."""
    with np.load(path) as held:
        return max(float(np.abs(held[name] - value).max() / np.abs(value).max()) for name, value in wanted.items())


def serve(name: str) -> None:
    """A runtime of fedtower as a contestant."""
    torch.set_num_threads(1)
    registry = discover(folder=None)
    workload = tower(registry)
    side = workload.side(_runtime(name, registry))
    aggregator = registry.make("aggregator", Part("fedavg"), path="aggregator")

    def train(number: int) -> dict[str, NDArray[Any]]:
        plan = workload.plan(number)
        total, _ = aggregator.fold([side.visit(plan, cohort_of(number, COHORT))], None)
        return {name: value[0] for name, value in total.dense.items()}

    take_turns(train)


def peers_python(given: Path | None) -> tuple[Path, dict[str, str]]:
    """The peers' interpreter, and why a peer is not to be had."""
    if given is not None:
        return given, {}
    folder = ROOT / ".venv-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}: a few minutes, once", flush=True)
        venv.create(folder, with_pip=True)
    missing = {}
    for name, version in PEERS.items():
        command = [str(python), "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}"]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            missing[name.partition("[")[0]] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return python, missing


def contestants(python: Path, data: Path, folder: Path) -> list[Contestant]:
    """All that can be measured, each with its command."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: listen on the loopback alone
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(folder / "flwr"),
        "PYTHONPATH": str(ROOT),
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "peers"}
    ranks = [{**quiet, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    research = [str(python), "-m", "benchmarks.peer_programs.pfl_research", str(data)]
    flower = [str(python), "-m", "benchmarks.peer_programs.flower", str(data)]
    found = [
        Contestant(name, [[sys.executable, str(HERE), "--serve", name]], [{}], folder / f"{place}.log")
        for place, name in enumerate(OURS)
    ]
    found.append(Contestant(PFL_1, [research], [quiet], folder / "pfl-1.log"))
    found.append(Contestant(PFL_2, [research, research], ranks, folder / "pfl-2.log"))
    found.append(Contestant(FLOWER, [flower], [quiet], folder / "flower.log"))
    return found


def measure(every: Sequence[Contestant], arrays: Mapping[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Figures of those that run and whose numbers are right, and why the others are not among them."""
    wanted = reference(arrays, 0)
    ready, failed, errors = [], {}, {}
    for each in every:
        try:
            each.start()
            for number in range(2):  # may compile, and fills caches
                each.train(number, folder / "average.npz" if number == 0 else None)
                if number == 0:
                    errors[each.name] = error_of(folder / "average.npz", wanted)
            if errors[each.name] > TOLERANCE:
                raise RuntimeError(
                    f"its mean update is {errors[each.name]:.1e} from the reference: its time says nothing"
                )
            ready.append(each)
            each.seconds, each.cpu = [], []
        except (OSError, RuntimeError) as error:
            failed[each.name] = str(error)
            each.stop()
    for start in range(2, 2 + rounds, TURN):
        for each in ready:
            for number in range(start, min(start + TURN, 2 + rounds)):
                each.train(number)
            # Whoever had the cores before has left its own data in their caches.
            del each.seconds[-TURN], each.cpu[-TURN]
    rows = {
        each.name: {
            "clients/s": COHORT / statistics.median(each.seconds),
            "best clients/s": COHORT / min(each.seconds),
            "CPU us/client": statistics.median(each.cpu) / COHORT * 1e6,
            "best CPU us/client": min(each.cpu) / COHORT * 1e6,
            "error": errors[each.name],
        }
        for each in ready
    }
    return {"contestants": rows, "failed": failed}


def show(result: Mapping[str, Any]) -> None:
    """The table, and the ratios."""
    rows = result["contestants"]
    print(f"{'':28s}{'clients/s':>11s}{'best':>9s}{'CPU us/client':>15s}{'best':>9s}{'error':>10s}")
    for name, row in rows.items():
        print(
            f"{name:28s}{row['clients/s']:11,.0f}{row['best clients/s']:9,.0f}{row['CPU us/client']:15,.0f}"
            f"{row['best CPU us/client']:9,.0f}{row['error']:10.1e}"
        )
    for name, why in result["failed"].items():
        print(f"{name:28s}not measured: {why}")
    for name, aim in AIMS.items():
        if name in rows and OURS[-1] in rows:
            ratio = rows[OURS[-1]]["clients/s"] / rows[name]["clients/s"]
            cost = rows[name]["CPU us/client"] / rows[OURS[-1]]["CPU us/client"]
            print(f"{OURS[-1]}: {ratio:.1f} times {name} by clients/s (aim {aim:g}), {cost:.1f} times by CPU")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help=f"rounds of every contestant, a multiple of {TURN}")
    parser.add_argument("--only", nargs="*", help="contestants by name; all when none is named")
    parser.add_argument("--peers-python", type=Path, help="an interpreter that has the peers")
    parser.add_argument("--out", type=Path, default=HERE.with_name("peers.json"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rounds < TURN or args.rounds % TURN:
        parser.error(f"--rounds must be a multiple of {TURN}")
    if args.serve:
        serve(args.serve)
        return
    python, missing = peers_python(args.peers_python)
    with tempfile.TemporaryDirectory(prefix="fedtower-peers-") as name:
        folder = Path(name)
        arrays = rounds_file(tower(discover(folder=None)), 2 + args.rounds, folder / "rounds.npz")
        every = contestants(python, folder / "rounds.npz", folder)
        if args.only:
            every = [each for each in every if each.name in args.only]
        try:
            result = measure(every, arrays, args.rounds, folder)
        finally:
            for each in every:
                each.stop()
    for peer, why in missing.items():
        print(f"{peer} could not be installed: {why}")
    show(result)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": PEERS,
        "load": os.getloadavg(),
    }
    args.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
