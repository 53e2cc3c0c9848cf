"""A whole run on the fast runtime has the same bits, however its cohorts are cut up and whoever trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fedtower
from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.datasets.criteo import example as clicks

ROUNDS = 3
WAYS = [(64, 1), (64, 1), (7, 1), (1, 1), (1, 2), (7, 2), (64, 2)]  # the width of a block, and workers; one way twice
FAST = {"runtime.name": "vectorized", "rounds": ROUNDS, "evaluation.every": 0}

Given = Callable[[Path], tuple[str, Mapping[str, Any]]]


@pytest.fixture(params=["dssm", "wide_deep"])
def given(request: pytest.FixtureRequest, small: Mapping[str, Any], tmp_path: Path) -> tuple[str, Mapping[str, Any]]:
    """A recipe on histories, and one on labelled examples; cohorts of more than one block of 7."""
    if request.param == "dssm":
        return "dssm-synthetic", {**small, **FAST, "cohort.size": 20, "local.steps": 3}
    data = {f"data.{key}": value for key, value in clicks.write(tmp_path).items()}
    return "wide-deep-criteo", {**data, **FAST, "cohort.size": 10, "transport.name": "in_process"}


def test_a_run_in_blocks_of_1_7_and_64_with_1_and_2_workers(
    given: tuple[str, Mapping[str, Any]], tmp_path: Path
) -> None:
    recipe, overrides = given
    ends = []
    for block, workers in WAYS:
        way = {"transport.block": block, "runtime.workers": workers}
        done = fedtower.run(recipe, {**overrides, **way}, runs=tmp_path / "runs")
        ends.append(read_checkpoint(done.folder / "checkpoints", ROUNDS))
    assert any(name.startswith("parameters/") for name in ends[0])
    assert any(name.startswith("tables/") for name in ends[0])
    for end in ends[1:]:
        assert_same_bits(end, ends[0])
