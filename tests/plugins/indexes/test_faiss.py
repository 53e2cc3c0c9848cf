"""The index ``faiss``: the promises of all its kinds, why it looks for nearest neighbours, and what it leaves alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.settings import build
from fedtower.plugins.indexes.faiss.index import Faiss, FaissIndex, one_thread
from fedtower.recsys.retrieval import exact_search, recall
from fedtower.recsys.testing.index import IndexPromises, items, names, queries

KINDS = ("ivf_flat", "hnsw", "sq8")


class TestIvfFlat(IndexPromises):
    make = Faiss


class TestHnsw(IndexPromises):
    make = staticmethod(lambda: Faiss(kind="hnsw"))


class TestSq8(IndexPromises):
    make = staticmethod(lambda: Faiss(kind="sq8"))


def index_of(count: int = 2_000, **settings: Any) -> FaissIndex:
    return Faiss(**settings).build(items(count), names(count), Draws(1))


def recall_of(index: FaissIndex, count: int = 2_000) -> float:
    truth = names(count)[exact_search(items(count), queries(), 10)[0]]
    return recall(index.search(queries(), 10)[0], truth)


def test_nearest_neighbours_of_equally_long_items_are_the_largest_products() -> None:
    everything = index_of(nlist=1, nprobe=1)
    places, scores = exact_search(items(), queries(), 10)
    ids, found = everything.search(queries(), 10)
    np.testing.assert_array_equal(ids, names()[places])
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_hide_from_a_search_by_inner_product_what_nearest_neighbours_find(kind: str) -> None:
    nearest = recall_of(index_of(10_000, kind=kind), 10_000)
    product = recall_of(index_of(10_000, kind=kind, metric="inner_product"), 10_000)
    assert nearest > 0.93
    assert product < nearest - 0.25


def test_without_biases_both_find_nearly_all() -> None:
    plain, asked = items()[:, :-1], queries()[:, :-1]
    truth = names()[exact_search(plain, asked, 10)[0]]
    for metric in ("nearest", "inner_product"):
        index = Faiss(metric=metric).build(plain, names(), Draws(1))
        assert recall(index.search(asked, 10)[0], truth) > 0.95


@pytest.mark.parametrize(("kind", "narrow", "wide"), [("ivf_flat", "nprobe", "nprobe"), ("hnsw", "ef_search", "m")])
def test_a_wider_search_finds_more(kind: str, narrow: str, wide: str) -> None:
    little = recall_of(index_of(10_000, kind=kind, **{narrow: 1}), 10_000)
    much = recall_of(index_of(10_000, kind=kind, **{wide: 64}), 10_000)
    assert little < much
    assert much > 0.98


def test_a_byte_a_number_is_about_a_quarter_of_the_memory() -> None:
    flat, bytes_ = (len(index_of(10_000, kind=kind).snapshot()["faiss"]) for kind in ("ivf_flat", "sq8"))
    vectors = 10_000 * 12 * 4
    assert flat > vectors
    assert bytes_ - 10_000 * 8 - flat // 10 < vectors / 3.5  # without faiss's own ids and the lists' centres


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_index(kind: str) -> None:
    one, other = (Faiss(kind=kind).build(items(), names(), Draws(seed)) for seed in (1, 2))  # type: ignore[arg-type]
    assert not np.array_equal(one.snapshot()["faiss"], other.snapshot()["faiss"])


def test_bits_do_not_depend_on_how_many_threads_there_are() -> None:
    code = (
        "import sys, hashlib\n"
        "from fedtower.core.draws import Draws\n"
        "from fedtower.plugins.indexes.faiss.index import Faiss\n"
        "from fedtower.recsys.testing.index import items, names\n"
        "for kind in sys.argv[1:]:\n"
        "    blob = Faiss(kind=kind).build(items(), names(), Draws(1)).snapshot()['faiss']\n"
        "    print(hashlib.sha256(blob.tobytes()).hexdigest())\n"
    )
    here = [hashlib.sha256(index_of(kind=kind).snapshot()["faiss"].tobytes()).hexdigest() for kind in KINDS]
    child = subprocess.run(
        [sys.executable, "-c", code, *KINDS],
        env={**os.environ, "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.split() == here


def test_the_threads_of_torch_are_as_many_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread():
            assert faiss.omp_get_max_threads() == 1
        index_of(200).search(queries(), 5)
        with pytest.raises(RuntimeError), one_thread():
            raise RuntimeError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ef_search": 64}, "index.ef_search is a setting of kind = 'hnsw', not of 'ivf_flat'"),
        ({"kind": "hnsw", "nprobe": 8}, "index.nprobe is a setting of kind = 'ivf_flat' and 'sq8', not of 'hnsw'"),
        ({"nlist": 0}, "index.nlist must be at least 1"),
        ({"kind": "pq"}, 'index.kind must be "ivf_flat" or "hnsw" or "sq8"'),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build(Faiss, settings, path="index")


def test_more_lists_than_items_are_refused() -> None:
    with pytest.raises(RecipeError, match="nlist = 50 lists cannot be made of 20 items"):
        index_of(20, nlist=50)


def test_so_many_lists_as_were_asked_for_are_made() -> None:
    assert index_of(nlist=77).index.nlist == 77
    assert index_of().index.nlist == 45


@pytest.mark.parametrize("other", [{"kind": "hnsw"}, {"kind": "sq8"}, {"metric": "inner_product"}])
def test_a_saved_index_of_another_kind_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="was it built with another"):
        Faiss(**other).restore(index_of().snapshot())


def test_settings_of_a_search_are_taken_when_it_is_brought_back() -> None:
    saved = index_of().snapshot()
    assert Faiss(nprobe=3).restore(saved).index.nprobe == 3
    assert Faiss().restore(saved).index.nprobe == 16


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_cut_short_are_refused(kind: str) -> None:
    saved = dict(index_of(200, kind=kind).snapshot())
    for length in (0, 3, 60, len(saved["faiss"]) - 1):
        with pytest.raises(CheckpointError, match="cannot be read by faiss"):
            Faiss(kind=kind).restore({**saved, "faiss": saved["faiss"][:length]})  # type: ignore[arg-type]
