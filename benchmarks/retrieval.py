"""What an index finds and costs: recall@10, time to build, time of a query, and size, for each kind of index.

    python benchmarks/retrieval.py [--items N] [--repeat N] [--json FILE]

100,000 items of 64 dimensions in 1,000 clusters, and 1,000 queries near them: once as they are (*plain*), and once with
a bias for each item, as a model that knows what is popular has it (*biased*: Gumbel distributed, scale 4; one dimension
more). Times are processor microseconds, all queries in one call. The indexes answer in turns, ``--repeat`` times, so
that a neighbour's load falls on all of them alike; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part
from fedtower.recsys.retrieval import Index, exact_search, recall

DIM, CLUSTERS, QUERIES, K = 64, 1_000, 1_000, 10
INDEXES = {
    "exact": Part("exact"),
    "ivf_flat": Part("faiss"),
    "ivf_flat, nprobe 8": Part("faiss", {"nprobe": 8}),
    "ivf_flat, nlist 1264, nprobe 8": Part("faiss", {"nlist": 1264, "nprobe": 8}),
    "hnsw": Part("faiss", {"kind": "hnsw"}),
    "sq8": Part("faiss", {"kind": "sq8"}),
    "ivf_flat, inner_product": Part("faiss", {"metric": "inner_product"}),
    "hnsw, inner_product": Part("faiss", {"kind": "hnsw", "metric": "inner_product"}),
}
FloatArray = NDArray[np.float32]


def plain(items: int) -> tuple[FloatArray, FloatArray]:
    """Items ``(I, D)`` and queries ``(B, D)`` around the same centres."""
    return _around("item", items), _around("query", QUERIES)


def biased(items: int) -> tuple[FloatArray, FloatArray]:
    """The same with a bias as one more dimension, in which every query is 1."""
    vectors, queries = plain(items)
    bias = -4 * np.log(-np.log1p(-Draws(2).uniform("bias", np.arange(items)[:, None])))
    return (
        np.concatenate([vectors / 3, bias], axis=1).astype(np.float32),
        np.concatenate([queries, np.ones((len(queries), 1))], axis=1).astype(np.float32),
    )


def _around(what: str, count: int) -> FloatArray:
    """``count`` vectors, each near one of the centres."""
    draws, places, axes = Draws(1), np.arange(count)[:, None], np.arange(DIM)[None, :]
    cluster = draws.integers(CLUSTERS, f"cluster of {what}", places)
    near = draws.normal("centre", cluster, axes) + 0.7 * draws.normal(what, places, axes)
    return near.astype(np.float32)


def measure(vectors: FloatArray, queries: FloatArray, repeat: int, registry: Registry) -> dict[str, dict[str, Any]]:
    """The figures of every index."""
    ids = np.arange(len(vectors), dtype=np.int64)
    truth = exact_search(vectors, queries, K)[0]
    table: dict[str, dict[str, Any]] = {}
    built: dict[str, Index] = {}
    for name, part in INDEXES.items():
        began = time.process_time()
        built[name] = registry.make("index", part).build(vectors, ids, Draws(1))
        seconds = time.process_time() - began
        size = sum(array.nbytes for array in built[name].snapshot().values())
        found = recall(built[name].search(queries, K)[0], truth)
        table[name] = {"recall": found, "build_cpu_s": seconds, "megabytes": size / 1e6, "us": []}
    for _ in range(repeat):
        for name, index in built.items():
            began = time.process_time()
            index.search(queries, K)
            table[name]["us"].append((time.process_time() - began) / len(queries) * 1e6)
    return {name: {**row, "us": statistics.median(row["us"])} for name, row in table.items()}


def main() -> None:
    """Measure both, print, and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("retrieval.json"))
    args = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("numpy", "faiss-cpu")}
    about = {"cores": os.cpu_count(), "python": platform.python_version(), **versions, "items": args.items}
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    tables = {}
    for data in (plain, biased):
        tables[data.__name__] = measure(*data(args.items), args.repeat, discover())
        print(f"\n{data.__name__:32} recall@{K}  build, CPU s  us a query     MB")
        for name, row in tables[data.__name__].items():
            print(
                f"{name:32} {row['recall']:9.3f} {row['build_cpu_s']:13.2f} {row['us']:11.1f} {row['megabytes']:6.1f}"
            )
    args.json.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
