"""How many clients a second a simulation trains, and what a client costs: every runtime in one interleaved run.

    python benchmarks/simulation.py                  # the three workloads; prints a table, writes simulation.json
    python benchmarks/simulation.py --population     # 100 to 1,000,000 registered clients at one cohort size
    python benchmarks/simulation.py tower --rounds 40 --runtimes vectorized:workers=2 torch_loop
    python benchmarks/simulation.py tower --runtimes vectorized 'vectorized:workers=2,cluster="local"'       # Ray

A client's visit is timed from the draw of its batches to its updates: data preparation, fetched rows, training and the
store of what it keeps, all by way of ``core/client.py``, as a run does it. Steady state: the first rounds, which may
compile, are not counted. CPU time is that of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedtower.core.client import ClientData, ClientSide
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.recipe import Part, load_recipe
from fedtower.core.registry import Registry, discover
from fedtower.core.rows import RowStore
from fedtower.core.runtime import Lookup, Work
from fedtower.core.store import ClientStore
from fedtower.recsys.batches import SequenceData
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.models import Declared, ExampleTower, PlainRows, Schema, SequenceTower, Table, linear
from fedtower.recsys.population import Population
from fedtower.recsys.splits import make_split
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import make_task
from fedtower.recsys.training import Federated, Setting
from fedtower.recsys.vocabulary import Vocabulary

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

USERS, ITEMS, COHORT = 6_040, 3_706, 100  # MovieLens 1M

# Measured elsewhere, on an idle machine of two cores whose FMA peak is 2.4 times this project's usual one, on the tower
# workload and with everyone's result equal to a float64 reference (FINDINGS, "Speed of simulation"): not run here.
ELSEWHERE = {
    "Flower's simulation, 100 nodes": 232.0,
    "pfl-research, 2 workers": 838.0,
    "a torch loop, 2 processes": 1_224.0,
    "a fused kernel in C, 2 threads": 63_068.0,
}
TURN = 4  # rounds on end, the first of which is not counted
DEFAULT = ("torch_loop", "vectorized", "vectorized:workers=2", "onnx", "mnn")


@dataclass(frozen=True)
class Workload:
    """What clients train, on what data."""

    name: str
    summary: str
    declared: Declared
    local: LocalSettings
    data: ClientData
    rows: RowStore | None
    flops: float = 0.0  # of a visit, multiplications and additions of its matrix products

    def side(self, runtime: Any) -> ClientSide:
        """The client's half of a round with a runtime in it."""
        opened = runtime.open(self.declared, self.local)
        data = opened.prepares(self.data) if hasattr(opened, "prepares") else self.data
        store = ClientStore(USERS)
        for name, value in self.declared.device_parameters().items():
            store.declare(name, value)
        own = self.declared.on_device
        return ClientSide(data, opened, self.rows, (), store, Hooks.none(), Draws(1), device_state=own)

    def plan(self, round: int) -> Plan:
        """What a cohort is sent."""
        return Plan(round, self.declared.parameters(), self.local)


class GivenTower(ExampleTower):
    """The user tower of FINDINGS: 64-64-32 on a given vector, its dot product with five given items, the first chosen.

    Inputs ``vector`` (B, 64) and ``items`` (B, 5, 32).
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = linear(64, 64, generator), linear(64, 32, generator)

    def losses(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor], loss: str) -> Tensor:
        user = self.second(torch.relu(self.first(inputs["vector"])))
        scores = (inputs["items"] * user[:, None, :]).sum(dim=2)
        return softplus(-scores[:, 0]) + softplus(scores[:, 1:]).sum(dim=1)


@dataclass(frozen=True, eq=False)
class GivenData:
    """Clients whose examples are pairs of given vectors: what they saw last, and what they chose next."""

    offsets: IntArray
    seen: IntArray  # (E,) rows of vectors
    chosen: IntArray  # (E,) rows of items
    vectors: FloatArray  # (ITEMS, 64)
    items: FloatArray  # (ITEMS, 32)
    draws: Draws

    @staticmethod
    def make(draws: Draws) -> GivenData:
        """20 to 2,314 examples a client, 165 on average, drawn as MovieLens 1M has them."""
        normal = draws.normal("examples", np.arange(USERS, dtype=np.int64))
        sizes = np.clip(np.exp(4.55 + 1.02 * normal), 20, 2_314).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        every = np.arange(offsets[-1], dtype=np.int64)
        return GivenData(
            offsets,
            draws.integers(ITEMS, "seen", every),
            draws.integers(ITEMS, "chosen", every),
            draws.normal("vectors", np.arange(ITEMS)[:, None], np.arange(64)[None, :]).astype(np.float32),
            draws.normal("items", np.arange(ITEMS)[:, None], np.arange(32)[None, :]).astype(np.float32) * 0.2,
            draws,
        )

    @property
    def mean_steps(self) -> float:
        """Steps of 32 in one pass, the mean over clients."""
        return float((-(-np.diff(self.offsets) // 32)).mean())

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """One pass over each client's examples, shuffled, with four negatives drawn for each."""
        size, count = plan.local.batch_size, np.diff(self.offsets)[clients]
        steps = -(-count // size)
        owner = np.repeat(np.arange(len(clients), dtype=np.int64), count)
        position = np.arange(len(owner), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
        key = self.draws.bits("order", plan.round, clients[owner], position)
        # One sort of one word: the client in the high bits, the draw in the others.
        order = np.argsort((owner << 48) | ((key >> 16) & 0xFFFFFFFFFFFF))
        at = (self.offsets[clients][owner] + position)[order]
        chosen = np.empty((len(at), 5), dtype=np.int64)
        chosen[:, 0] = self.chosen[at]
        chosen[:, 1:] = self.draws.integers(ITEMS, "negatives", plan.round, at[:, None], np.arange(4)[None, :])

        shape = (len(clients), int(steps.max()), size)
        place = owner * shape[1] * size + position
        seen = np.zeros(shape, dtype=np.int64)
        items = np.zeros((*shape, 5), dtype=np.int64)
        weight = np.zeros(shape, dtype=np.float32)
        seen.reshape(-1)[place] = self.seen[at]
        items.reshape(-1, 5)[place] = chosen
        weight.reshape(-1)[place] = 1.0
        inputs: dict[str, Any] = {
            "vector": Lookup(self.vectors, seen),
            "items": Lookup(self.items, items),
            "weight": weight,
        }
        return Work(clients, steps, count, inputs)


class Attention(SequenceTower):
    """A model that no runtime has seen: the newest item asks, all before it answer."""

    def __init__(self, dim: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim = dim
        self.query, self.value = linear(dim, dim, generator), linear(dim, dim, generator)
        self.features = linear(num_features, dim, generator)
        self.scale = nn.Parameter(torch.ones(dim))
        self.own = nn.Parameter(torch.zeros(dim))

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        place = torch.arange(history.shape[0], device=history.device)[None, :]
        newest = (place == target[:, None] - 1).to(history.dtype) @ history
        logits = (self.query(newest) @ history.T) / self.dim**0.5
        weights = torch.softmax(torch.where(place < target[:, None], logits, -1e9), dim=1)
        mixed = nn.functional.layer_norm(newest + weights @ self.value(history), (self.dim,), self.scale)
        vectors: Tensor = mixed + torch.tanh(self.features(user)) + self.own
        return vectors

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        return vectors @ rows.T


def tower(registry: Registry) -> Workload:
    """(a) The workload of FINDINGS."""
    data = GivenData.make(Draws(1))
    declared = Declared(GivenTower(torch.Generator().manual_seed(1)))
    # Forward, weight gradients, and the gradient of the hidden layer, of full batches.
    flops = data.mean_steps * 32 * 2 * (2 * (64 * 64 + 64 * 32) + 64 * 32)
    summary = (
        f"user tower 64-64-32 on given vectors, BCE, 4 negatives, SGD, one epoch of 32: {data.mean_steps:.2f} steps"
    )
    return Workload("tower", summary, declared, LocalSettings(epochs=1, lr=0.05, loss="bce"), data, None, flops)


def dssm(registry: Registry) -> Workload:
    """(b) The shipped two-tower model with a history, fetched rows and row deltas, as in dssm-synthetic."""
    local = LocalSettings(steps=1, lr=1.0, negatives=100, history_length=50)
    return _dssm("dssm", 32, local, registry)


def dssm_ml_1m(registry: Registry) -> Workload:
    """The same, as in dssm-ml-1m: four times the arithmetic."""
    local = LocalSettings(steps=1, lr=1.0, negatives=200, history_length=100)
    return _dssm("dssm-ml-1m", 64, local, registry)


def _dssm(name: str, dim: int, local: LocalSettings, registry: Registry) -> Workload:
    population = in_memory(registry)
    schema = Schema(ITEMS, population.num_user_features, population.num_item_features, local.history_length)
    model = registry.make("model", Part("dssm", {"dim": dim}), path="model")
    declared = model.declare(schema, torch.Generator().manual_seed(1))
    batch, negatives, slots, pools = local.batch_size, local.negatives, 2 * local.history_length, 4
    width = pools * dim + population.num_user_features
    # Pools, two layers and scores; backward, each but the pools' masks and the first layer's features twice more.
    forward = pools * slots * dim + 3 * (width * 128 + 128 * dim + (slots + negatives) * dim)
    flops = 2.0 * batch * (forward + pools * slots * dim)
    summary = (
        f"{dim} wide, one step of 32, {negatives} negatives, {local.history_length} events of history, rows both ways"
    )
    return _sequences(name, summary, declared, local, population, flops)


def unseen(registry: Registry) -> Workload:
    """(c) A model plugin that no runtime has seen, trained for several steps by Adam, with a vector of its own."""
    population = in_memory(registry)
    declared = Declared(
        Attention(32, population.num_user_features, torch.Generator().manual_seed(1)),
        (Table("item", ITEMS, 32, 0.1),),
        PlainRows(32),
        on_device=("own",),
    )
    local = LocalSettings(
        steps=3, lr=0.01, optimizer="adam", row_lr=0.1, negatives=50, history_length=50, batch_size=16
    )
    summary = "attention over 50 events, a vector of the user's own, Adam, up to 3 steps of 16, 50 negatives"
    return _sequences("unseen", summary, declared, local, population)


WORKLOADS: dict[str, Callable[[Registry], Workload]] = {
    "tower": tower,
    "dssm": dssm,
    "dssm-ml-1m": dssm_ml_1m,
    "unseen": unseen,
}


def in_memory(registry: Registry) -> Population:
    """The synthetic data set in the shape of MovieLens 1M, generated once and held as a downloaded one is."""
    settings = {"users": USERS, "items": ITEMS}
    made = registry.make("dataset", Part("synthetic", settings), path="data").load(
        draws=Draws(1), progress=lambda message: None
    )
    parts = [made.events(np.arange(start, min(start + 256, USERS))) for start in range(0, USERS, 256)]
    return EventTable.build(
        "synthetic in memory",
        users=Vocabulary(np.arange(USERS)),
        items=Vocabulary(np.arange(ITEMS)),
        client_rows=np.concatenate([part.clients[part.owners] for part in parts]),
        item_rows=np.concatenate([part.items for part in parts]),
        times=np.concatenate([part.times for part in parts]),
        user_table=made.user_features(np.arange(USERS)),
        item_table=made.item_features(np.arange(ITEMS)),
    )


def _sequences(
    name: str, summary: str, declared: Declared, local: LocalSettings, population: Population, flops: float = 0.0
) -> Workload:
    draws = Draws(1)
    split = make_split("leave_one_out", population, validation=True, test_fraction=0.1, draws=draws)
    rows = CloudTables(declared, population.item_features, RowSettings(), torch.Generator().manual_seed(2))
    return Workload(name, summary, declared, local, SequenceData(population, split, draws), rows, flops)


@dataclass
class Figures:
    """What one runtime took for each round of a workload."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def clients_per_second(self, cohort: int) -> float:
        """By the median round."""
        return cohort / statistics.median(self.seconds)

    def cpu_us(self, cohort: int) -> float:
        """CPU microseconds a client, by the median round."""
        return statistics.median(self.cpu) / cohort * 1e6

    def best_cpu_us(self, cohort: int) -> float:
        """The same by the best round: what a busy machine leaves of the truth."""
        return min(self.cpu) / cohort * 1e6


def measure(workload: Workload, names: Sequence[str], registry: Registry, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every runtime, a few on end and in turn: what slows one down slows the others down too."""
    sides, failed = {}, {}
    for name in names:
        try:
            sides[name] = workload.side(_runtime(name, registry))
            sides[name].visit(workload.plan(1), cohort_of(0, args.cohort))  # may compile
            sides[name].discard()
        except Exception as error:  # an engine that cannot run this workload is told, and the others are measured
            failed[name] = f"{type(error).__name__}: {error}"
            sides.pop(name, None)
    figures = {name: Figures() for name in sides}
    for start in range(1, args.rounds + 1, TURN):
        for name, side in sides.items():
            for round in range(start, start + TURN):
                plan, clients = workload.plan(round), cohort_of(round, args.cohort)
                cpu, started = cpu_seconds(), time.perf_counter()
                for first in range(0, len(clients), args.block):
                    block = clients[first : first + args.block]
                    side.visit(plan, block)
                    side.settle(block, np.ones(len(block), dtype=bool))  # everybody's update counts
                if round > start:  # whoever had the cores before has left its own data in their caches
                    figures[name].seconds.append(time.perf_counter() - started)
                    figures[name].cpu.append(cpu_seconds() - cpu)
    rows = {
        name: {
            "clients/s": each.clients_per_second(args.cohort),
            "CPU us/client": each.cpu_us(args.cohort),
            "best CPU us/client": each.best_cpu_us(args.cohort),
        }
        for name, each in figures.items()
    }
    for side in sides.values():
        close = getattr(side.runtime, "close", None)
        if close:
            close()
    return {"workload": workload.name, "summary": workload.summary, "runtimes": rows, "failed": failed}


def cohort_of(round: int, size: int) -> IntArray:
    """The clients of a round."""
    return np.sort(Draws(7).permutation(USERS, "cohort", round)[:size])


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started, the running ones too."""
    own = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in (0, -1))
    return own + sum(_cpu_of(child) for child in _children(os.getpid()))


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def _cpu_of(pid: int) -> float:
    # utime and stime are in ticks of 10 ms: too coarse for one round, so the scheduler's nanoseconds are summed.
    try:
        return sum(int(p.read_text().split()[0]) for p in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    except OSError:
        return 0.0


def _runtime(name: str, registry: Registry) -> Any:
    part, _, settings = name.partition(":")
    told = {key: json.loads(value) for key, value in (pair.split("=") for pair in settings.split(",") if pair)}
    return registry.make("runtime", Part(part, told), path="runtime")


def fma_peak() -> float:
    """GFLOP/s of a large matrix product on one core, the most a library reaches here; about 0.8 of the FMA peak."""
    torch.set_num_threads(1)
    a, out, best = torch.randn(768, 768), torch.empty(768, 768), 0.0
    for _ in range(12):
        started = time.thread_time()
        torch.mm(a, a, out=out)
        best = max(best, 2 * 768**3 / (time.thread_time() - started) / 1e9)
    return best


def show(result: dict[str, Any], workload: Workload, peak: float) -> None:
    """The table of one workload."""
    rows = result["runtimes"]
    base = rows.get("torch_loop", {}).get("clients/s")
    print(f"\n{result['workload']}: {result['summary']}")
    print(f"  {'runtime':34s} {'clients/s':>10s} {'CPU us/client':>14s} {'best':>8s} {'x torch_loop':>13s}")
    for name, row in rows.items():
        ratio = f"{row['clients/s'] / base:13.1f}" if base else f"{'-':>13s}"
        cost = f"{row['CPU us/client']:14,.0f} {row['best CPU us/client']:8,.0f}"
        print(f"  {name:34s} {row['clients/s']:10,.0f} {cost} {ratio}")
    for name, why in result["failed"].items():
        print(f"  {name:34s} not measured: {why.splitlines()[0][:110]}")
    if workload.flops:
        best = max(rows, key=lambda name: rows[name]["clients/s"])
        limit = workload.flops / peak / 1e3
        result["limit CPU us/client"] = limit
        print(
            f"  matrix products at this core's library peak of {peak:.0f} GFLOP/s: {limit:.0f} CPU us a client, so "
            f"{best} spends {rows[best]['CPU us/client'] / limit:.1f} times the limit"
        )
    if workload.name == "tower":
        result["elsewhere"] = {name: rows[best]["clients/s"] / value for name, value in ELSEWHERE.items()}
        for name, value in ELSEWHERE.items():
            print(f"  {rows[best]['clients/s'] / value:8.2f} x {name} ({value:,.0f} clients/s, measured elsewhere)")


def populations(args: argparse.Namespace) -> list[dict[str, float]]:
    """Rounds of one cohort size in populations of 100 to 1,000,000, each in a fresh process."""
    print(f"{'population':>10s} {'s/round':>9s} {'CPU s/round':>12s} {'RSS MB':>8s} {'growth MB/round':>16s}")
    rows = []
    for population in (100, 1_000, 10_000, 100_000, 1_000_000):
        command = [sys.executable, __file__, "--one", str(population), "--rounds", str(args.rounds)]
        done = subprocess.run([*command, "--cohort", str(args.cohort)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{population:10,d} {row['seconds']:9.3f} {row['CPU seconds']:12.3f} {row['RSS MB']:8.0f} "
            f"{row['growth MB/round']:16.2f}",
            flush=True,
        )
    return rows


def one_population(population: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of rounds of ``dssm-synthetic``, each client with a vector of her own, evaluation left out."""
    registry = discover(folder=None)
    told = [f"data.users={population}", f"cohort.size={min(args.cohort, population)}", "model.user_vector=true"]
    told += ['runtime.name="vectorized"', f"rounds={args.rounds + 3}"]
    recipe = load_recipe("dssm-synthetic", told, registry)
    draws = Draws(recipe.seed)
    data = registry.make("dataset", recipe.data.part, path="data").load(draws=draws, progress=lambda message: None)
    setting = Setting(recipe, registry, make_task(data, recipe, draws), Hooks.none(), draws, time.monotonic)
    rounds = Federated(setting).rounds()
    for _ in range(3):  # compiles, and fills the caches of the data set
        next(rounds)
    before, cpu, seconds = _rss(), [], []
    for _ in range(args.rounds):
        used, started = cpu_seconds(), time.perf_counter()
        next(rounds)
        seconds.append(time.perf_counter() - started)
        cpu.append(cpu_seconds() - used)
    return {
        "population": population,
        "seconds": statistics.median(seconds),
        "CPU seconds": statistics.median(cpu),
        "RSS MB": _rss(),
        "growth MB/round": (_rss() - before) / args.rounds,
    }


def _rss() -> float:
    """Resident megabytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all of them when none is named")
    parser.add_argument("--rounds", type=int, default=12, help=f"rounds of every runtime, in turns of {TURN}")
    parser.add_argument("--cohort", type=int, default=COHORT, help="clients a round")
    parser.add_argument("--block", type=int, default=COHORT, help="clients visited together")
    parser.add_argument("--runtimes", nargs="*", help="names, with settings as in vectorized:workers=2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("simulation.json"))
    parser.add_argument("--population", action="store_true", help="populations of 100 to 1,000,000 instead")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(one_population(args.one, args)))
        return
    if args.population:
        args.out.with_name("simulation-population.json").write_text(json.dumps(populations(args), indent=1) + "\n")
        return
    registry = discover(folder=None)
    offered = {offer.name for offer in registry.offers("runtime")}
    names = args.runtimes or [name for name in DEFAULT if name.partition(":")[0] in offered]
    peak = fma_peak()
    results = []
    for name in args.workloads or list(WORKLOADS):
        workload = WORKLOADS[name](registry)
        results.append(measure(workload, names, registry, args))
        show(results[-1], workload, peak)
    told = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak GFLOP/s": peak,
        "results": results,
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
