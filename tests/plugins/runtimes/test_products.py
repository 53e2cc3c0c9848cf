"""Small products as C++: the numbers of a product in double precision, however the operands lie."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtower.core.draws import Draws
from fedtower.plugins.runtimes.vectorized import compiled, lowering
from fedtower.plugins.runtimes.vectorized.graph import as_graph
from fedtower.plugins.runtimes.vectorized.products import is_small

LANES = 3


def matrix(seed: int, *shape: int) -> Tensor:
    """Numbers, some of them negative and some of them zero."""
    numbers = Draws(seed).normal("matrix", np.arange(int(np.prod(shape)))).reshape(shape)
    return torch.from_numpy(np.where(numbers > 1.2, 0.0, numbers).astype(np.float32))


# A product of each way of lying: rows or columns in one piece, a part of something wider, one for all lanes, with and
# without a rest in every direction.
WAYS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "rows by rows": (lambda a, b: (a, b), (LANES, 7, 5), (LANES, 5, 33)),
    "whole vectors": (lambda a, b: (a, b), (LANES, 32, 16), (LANES, 16, 64)),
    "right lies across": (lambda a, b: (a, b.mT), (LANES, 32, 20), (LANES, 100, 20)),
    "left lies across": (lambda a, b: (a.mT, b), (LANES, 32, 14), (LANES, 32, 17)),
    "both lie across": (lambda a, b: (a.mT, b.mT), (LANES, 9, 21), (LANES, 31, 9)),
    "a part of something wider": (lambda a, b: (a[:, :, 3:], b[:, 2:, :8]), (LANES, 6, 10), (LANES, 9, 11)),
    "one right side for all": (lambda a, b: (a, b.mT.expand(LANES, -1, -1)), (LANES, 40, 12), (18, 12)),
    "no lanes": (lambda a, b: (a, b), (50, 19), (19, 29)),
    "no lanes, right lies across": (lambda a, b: (a, b.T), (50, 19), (29, 19)),
    "the same matrix twice": (lambda a, b: (a, a.mT), (LANES, 12, 12), (1,)),
    "a vector": (lambda a, b: (a, b), (LANES, 1, 12), (LANES, 12, 8)),
}


def products(*operands: Tensor) -> list[Tensor]:
    pairs = zip(operands[::2], operands[1::2], strict=True)
    return [torch.matmul(*lie(a, b)) for (lie, _, _), (a, b) in zip(WAYS.values(), pairs, strict=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], list[Tensor], Path]:
    """Operands, what became of them, and the compiled file: one compilation for all ways."""
    shapes = [shape for _, left, right in WAYS.values() for shape in (left, right)]
    operands = [matrix(seed, *shape) for seed, shape in enumerate(shapes)]
    place = tmp_path_factory.mktemp("products") / "products.so"
    compiled._compile(as_graph(products, operands), operands, place)
    return operands, list(compiled._load(place)(operands)), place


@pytest.mark.parametrize("way", range(len(WAYS)), ids=list(WAYS))
def test_a_product_is_that_of_double_precision(way: int, made: tuple[list[Tensor], list[Tensor], Path]) -> None:
    operands, found, _ = made
    wanted = products(*(operand.double() for operand in operands))[way]
    assert found[way].shape == wanted.shape
    torch.testing.assert_close(found[way].double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_small_product_is_left_to_the_library(made: tuple[list[Tensor], list[Tensor], Path]) -> None:
    code = made[2].read_bytes()
    assert b"fedtower" in code  # the functions of our own source
    assert b"mm_out" not in code


@pytest.mark.parametrize(
    ("m", "k", "n", "small"),
    [(32, 64, 64, True), (2, 1, 2, True), (1, 64, 64, False), (64, 64, 1, False), (32, 2000, 8, False),
     (800, 800, 800, False)],
)  # fmt: skip
def test_large_products_and_vectors_are_not_ours(m: int, k: int, n: int, small: bool) -> None:
    assert is_small(m, k, n) is small


def test_a_compiler_that_does_not_take_our_products_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: object) -> str:
        raise AttributeError("no such door")

    monkeypatch.setattr(lowering, "body", refused)
    compiled._warn_of_products_once.cache_clear()
    operands, place = [matrix(1, 8, 5), matrix(2, 5, 9)], tmp_path / "library.so"
    with caplog.at_level(logging.WARNING, logger="fedtower.vectorized"):
        compiled._compile(as_graph(lambda a, b: [a @ b], operands), operands, place)
    assert "no such door" in caplog.text
    (found,) = compiled._load(place)(operands)
    torch.testing.assert_close(found, operands[0] @ operands[1])
