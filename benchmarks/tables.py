"""How fast embedding tables train, and how fast a cloud table gives and takes rows, in one process and in several.

    python benchmarks/tables.py                    # everything; prints tables, writes tables.json
    python benchmarks/tables.py training --steps 5
    python benchmarks/tables.py rows --processes 1 2 3

``training``: samples a second of TorchRec's fused optimisers beside ``nn.EmbeddingBag(sparse=True)`` and torch's
sparse ones, on the same tables, ids and gradients, a step of each in turn. ``rows``: rows a second that CloudTables
fetches and applies, and samples a second of a whole step on rows by id, alone and spread over the processes of a
torchrun. CPU time is that of all threads of a process.
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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtower.core.draws import Draws
from fedtower.core.plan import RowSettings
from fedtower.core.rows import sum_duplicates
from fedtower.recsys.models import Declared, PlainRows, SharedTower, Table
from fedtower.recsys.processes import Processes, together
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tables.quiet import quietly

with quietly():
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

IntArray = NDArray[np.int64]

# Distinct values of the 26 categories of Criteo's challenge data, the largest cut to 800,000: 4.6 million rows.
CRITEO = (
    *(1_460, 583, 800_000, 800_000, 305, 24, 12_517, 633, 3, 93_145, 5_683, 800_000, 3_194, 27, 14_992, 800_000, 10),
    *(5_652, 2_173, 4, 800_000, 18, 15, 286_181, 105, 142_572),
)
MOVIELENS = (6_040, 3_706)  # users and items of MovieLens 1M
SHAPES = {"DLRM, 26 tables of 16": (CRITEO, 16), "MovieLens 1M, 2 tables of 64": (MOVIELENS, 64)}
BATCHES = (2_048, 8_192)
DEVICES, ROWS_EACH, ITEMS, WIDTH = 1_000, 97, 1_000_000, 64


@dataclass(frozen=True)
class Contender:
    """One way of stepping tables: ids (T, B) in, a gradient (B, T D) back."""

    name: str
    step: Callable[[IntArray, Tensor], None]


def fused(name: str, sizes: Sequence[int], dim: int, optimizer: Any, **settings: float) -> Contender:
    """TorchRec's collection, stepped inside the backward pass."""
    keys = [f"t{place}" for place in range(len(sizes))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=key, embedding_dim=dim, num_embeddings=size, feature_names=[key])
                for key, size in zip(keys, sizes, strict=True)
            ],
            optimizer_type=optimizer,
            optimizer_kwargs={"lr": 0.01, **settings},
            device=torch.device("cpu"),
        )

    def step(ids: IntArray, gradient: Tensor) -> None:
        lengths = torch.ones(ids.size, dtype=torch.int64)
        values = collection(KeyedJaggedTensor(keys, values=torch.from_numpy(ids.reshape(-1)), lengths=lengths)).values()
        values.backward(gradient)

    return Contender(name, step)


def sparse(name: str, sizes: Sequence[int], dim: int, optimizer: Any) -> Contender:
    """torch's own bags with sparse gradients."""
    bags = nn.ModuleList(nn.EmbeddingBag(size, dim, mode="sum", sparse=True) for size in sizes)
    stepper = optimizer(list(bags.parameters()), lr=0.01)

    def step(ids: IntArray, gradient: Tensor) -> None:
        offsets = torch.arange(ids.shape[1])
        stepper.zero_grad(set_to_none=True)
        rows = [bag(torch.from_numpy(of), offsets) for bag, of in zip(bags, ids, strict=True)]
        torch.cat(rows, dim=1).backward(gradient)  # type: ignore[no-untyped-call]
        stepper.step()

    return Contender(name, step)


def contenders(sizes: Sequence[int], dim: int) -> list[Contender]:
    """Everyone, on tables of these sizes."""
    return [
        fused("fused rowwise Adagrad", sizes, dim, RowWiseAdagrad, eps=1e-8),
        fused("fused SGD", sizes, dim, torch.optim.SGD),
        fused("fused Adagrad", sizes, dim, torch.optim.Adagrad, eps=1e-8),
        sparse("EmbeddingBag(sparse) + SGD", sizes, dim, torch.optim.SGD),
        sparse("EmbeddingBag(sparse) + Adagrad", sizes, dim, torch.optim.Adagrad),
        sparse("EmbeddingBag(sparse) + SparseAdam", sizes, dim, torch.optim.SparseAdam),
    ]


def ids_of(sizes: Sequence[int], batch: int, step: int) -> IntArray:
    """One id a sample and table, (T, B), the first rows more often than the last, as values of clicks are."""
    draws = Draws(3).uniform("ids", step, np.arange(len(sizes))[:, None], np.arange(batch)[None, :])
    ids: IntArray = (draws**3 * np.array(sizes)[:, None]).astype(np.int64)
    return ids


def training(steps: int) -> list[dict[str, Any]]:
    """CPU milliseconds a step and samples a CPU second of everyone, a step of each in turn."""
    results = []
    for shape, (sizes, dim) in SHAPES.items():
        rivals = contenders(sizes, dim)
        for batch in BATCHES:
            gradient = torch.randn(batch, dim * len(sizes), generator=torch.Generator().manual_seed(1))
            spent: dict[str, list[float]] = {rival.name: [] for rival in rivals}
            for step in range(steps + 2):
                ids = ids_of(sizes, batch, step)
                for rival in rivals:
                    spent[rival.name].append(timed(rival.step, ids, gradient)[0])
            cost = {name: statistics.median(values[2:]) for name, values in spent.items()}
            results.append(
                {"shape": shape, "batch": batch, "CPU ms": {name: 1e3 * each for name, each in cost.items()}}
            )
            show_training(shape, batch, cost)
    return results


def show_training(shape: str, batch: int, cost: dict[str, float]) -> None:
    """One table: what a step costs, and how many times faster than torch's sparse Adagrad that is."""
    print(f"\n{shape}, batch {batch:,}")
    print(f"  {'':36s} {'CPU ms a step':>14s} {'samples/CPU s':>14s} {'x sparse Adagrad':>17s}")
    base = cost["EmbeddingBag(sparse) + Adagrad"]
    for name, each in cost.items():
        print(f"  {name:36s} {1e3 * each:14.2f} {batch / each:14,.0f} {base / each:17.1f}")


def timed(action: Callable[..., object], *arguments: Any) -> tuple[float, float]:
    """CPU seconds of this process, and seconds, that an action takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    action(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall


def rates(processes: Processes, steps: int) -> dict[str, float]:
    """Rows a second fetched and applied, and samples a second of a DLRM step: by the clock, and by the CPU time of the
    leading process.
    """
    tables = cloud(Table("item", ITEMS, WIDTH, 0.1), processes)
    spent: dict[str, list[tuple[float, float]]] = {"fetch": [], "apply": [], "step": []}
    if processes.leads:
        for step in range(steps + 2):
            raw, deltas = deltas_of(step)
            distinct = np.unique(raw)
            spent["fetch"].append(timed(tables.fetch, "item", distinct))
            summed = sum_duplicates(raw, deltas)
            spent["apply"].append(timed(tables.apply, {"item": summed}, 1.0))
        processes.order("end")
    else:
        processes.serve(tables.help)
    categories = cloud(Table("category", sum(CRITEO), 16, 0.1), processes)
    for step in range(steps + 2):
        spent["step"].append(timed(one_step, categories, processes, step))
    distinct_rows = len(np.unique(deltas_of(0)[0]))
    sizes = {"fetch": distinct_rows, "apply": distinct_rows, "step": BATCHES[0]}
    out = {}
    for name, pairs in spent.items():
        for kind, values in zip(("CPU", "wall"), zip(*pairs[2:], strict=True), strict=False):
            out[f"{name} per {kind} s"] = sizes[name] / statistics.median(values)
    return out


def cloud(table: Table, processes: Processes) -> CloudTables:
    """A table of plain rows, as a model declares it."""
    declared = Declared(SharedTower(), (table,), PlainRows(table.dim), source=table.name)
    settings = RowSettings(optimizer="rowwise_adagrad", lr=0.1)
    generator = torch.Generator().manual_seed(1)
    return CloudTables(
        declared, lambda ids: np.zeros((len(ids), 0), np.float32), settings, generator, processes=processes
    )


def deltas_of(round: int) -> tuple[IntArray, NDArray[np.float32]]:
    """What a cohort sends: the row ids of every device one after another, some of them many devices', and deltas."""
    draws = Draws(5).uniform("rows", round, np.arange(DEVICES * ROWS_EACH))
    ids = (draws**3 * ITEMS).astype(np.int64)
    return ids, np.full((len(ids), WIDTH), 1e-3, dtype=np.float32)


def one_step(tables: CloudTables, processes: Processes, step: int) -> None:
    """This process's share of a batch: distinct rows, looked up, used, and stepped on the way back."""
    batch = -(-BATCHES[0] // processes.count)
    starts = np.concatenate([[0], np.cumsum(CRITEO)[:-1]])
    ids = ids_of(CRITEO, BATCHES[0], step)[:, processes.rank * batch : (processes.rank + 1) * batch] + starts[:, None]
    needed, where = np.unique(ids, return_inverse=True)
    tables.begin(1.0)
    used = tables.rows("category", needed)[torch.from_numpy(where.reshape(-1))]
    used.backward(torch.ones_like(used))  # type: ignore[no-untyped-call]
    tables.finish()


def in_processes(count: int, steps: int) -> dict[str, float]:
    """The rates of ``count`` processes that torchrun starts."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "rates.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "ranks", "--steps", str(steps), "--json", str(place)], check=True, env=environment)
        rates: dict[str, float] = json.loads(place.read_text(encoding="utf-8"))
        return rates


def show_rows(rows: dict[str, dict[str, float]]) -> None:
    """One table: rates by the number of processes."""
    print(
        f"\n{DEVICES:,} devices x {ROWS_EACH} rows of {WIDTH} out of {ITEMS:,}, duplicates summed; "
        f"DLRM step of {BATCHES[0]:,}"
    )
    names = (
        "fetch per CPU s",
        "fetch per wall s",
        "apply per CPU s",
        "apply per wall s",
        "step per CPU s",
        "step per wall s",
    )
    print(f"  {'processes':10s}" + "".join(f"{name:>18s}" for name in names))
    for count, each in rows.items():
        print(f"  {count:10s}" + "".join(f"{each[name]:18,.0f}" for name in names))
    print("  (CPU of the leading process alone)")


def main() -> None:
    """Measure what the command line asks for, print it, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "training", "rows", "ranks"], default="all")
    parser.add_argument("--steps", type=int, default=15, help="steps of each that count")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many hold the tables")
    parser.add_argument("--json", type=Path, default=Path("tables.json"), help="where the results are written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # The default, which torch warns of unless somebody says it.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    if args.what == "ranks":  # one of the processes of in_processes()
        with together() as processes:
            measured = rates(processes, args.steps)
            if processes.leads:
                args.json.write_text(json.dumps(measured), encoding="utf-8")
        return
    result: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    if args.what in ("all", "training"):
        result["training"] = training(args.steps)
    if args.what in ("all", "rows"):
        result["rows"] = {str(count): in_processes(count, args.steps) for count in args.processes}
        show_rows(result["rows"])
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()
