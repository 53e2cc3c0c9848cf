"""Parity says what is equal, what is not, and what is absent; only the first is enough."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import Registry, discover
from fedtower.core.runtime import Work
from fedtower.core.updates import Updates
from fedtower.plugins.runtimes.torch_loop.runtime import Loop, TorchLoop
from fedtower.recsys import parity as parity_module
from fedtower.recsys.device_commands import parity as command
from fedtower.recsys.models import Declared
from fedtower.recsys.parity import Line, _nudged, parity

SMALL = (
    "cohort.size=3",
    "local.negatives=20",
    "local.history_length=10",
    "local.steps=2",
    "model.dim=8",
    "data.users=60",
)


@dataclass(frozen=True)
class Scaled:
    """The plain runtime, with every delta a little longer."""

    factor: float = 1.0

    def open(self, model: Declared, local: LocalSettings) -> Longer:
        return Longer(TorchLoop().open(model, local), self.factor)


@dataclass(frozen=True)
class Longer:
    inner: Loop
    factor: float

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, NDArray[np.float32]]]:
        updates, own = self.inner.train(plan, work)
        return replace(
            updates, dense={name: delta * np.float32(self.factor) for name, delta in updates.dense.items()}
        ), own


class Nothing(Scaled):
    """A runtime that leaves everything where it was."""

    def __init__(self) -> None:
        super().__init__(0.0)


def lines_of(monkeypatch: pytest.MonkeyPatch, *others: str, registry: Registry | None = None) -> list[Line]:
    monkeypatch.setattr(parity_module, "OTHERS", others)
    registry = registry or discover()
    return list(parity(load_recipe("dssm-synthetic", SMALL, registry), registry))


def with_runtime(name: str, target: str) -> Registry:
    registry = discover()
    registry.runtime(name, target)
    return registry


def test_the_plain_runtime_is_equal_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(monkeypatch, "torch_loop")
    assert [(line.moment, line.what) for line in lines] == [
        (moment, what) for moment in ("step", "visit", "round") for what in ("parameters", "rows")
    ]
    assert all(line.holds and line.distance == 0 and line.moved > 1e-4 for line in lines)


def test_a_runtime_that_goes_a_thousandth_too_far_is_beyond_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "__init__", lambda self: object.__setattr__(self, "factor", 1.002))
    lines = lines_of(monkeypatch, "far", registry=with_runtime("far", f"{__name__}:Scaled"))
    assert [line.holds for line in lines] == [line.what == "rows" for line in lines]


def test_a_runtime_that_moves_nothing_is_not_equal_however_short_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = with_runtime("still", f"{__name__}:Nothing")
    monkeypatch.setattr(parity_module, "OTHERS", ("still",))
    recipe = load_recipe("dssm-synthetic", (*SMALL, "local.lr=0.0001"), registry)
    wrong = [line for line in parity(recipe, registry) if line.what == "parameters"]
    assert wrong
    assert all(line.distance < line.tolerance and not line.holds for line in wrong)


def test_a_runtime_that_nobody_offers_is_absent_and_the_rest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(monkeypatch, "nobody", "torch_loop")
    assert [line.verdict[:7] for line in lines if line.runtime == "nobody"] == ["absent:"] * 3
    assert len([line for line in lines if line.holds]) == 6


def test_the_command_prints_the_whole_table_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_module, "OTHERS", ("torch_loop", "nobody"))
    words = ["dssm-synthetic", "--json", *(word for option in SMALL for word in ("-o", option))]
    done = CliRunner().invoke(command, words, obj=discover())
    assert [line["runtime"] for line in json.loads(done.stdout)] == ["torch_loop"] * 6 + ["nobody"] * 3
    assert isinstance(done.exception, parity_module.ParityError)
    assert "nobody did not" in str(done.exception)


def test_all_four_are_expected() -> None:
    assert (parity_module.REFERENCE, *parity_module.OTHERS) == ("torch_loop", "vectorized", "onnx", "mnn")


def test_every_optimiser_has_a_tolerance() -> None:
    names = set(get_args(get_type_hints(LocalSettings)["optimizer"]))
    for tolerances in (*parity_module.TOLERANCES.values(), parity_module.SHARES):
        assert set(tolerances) == names


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "adam"])
def test_every_runtime_that_is_expected_is_equal(optimizer: str) -> None:
    registry = discover()
    recipe = load_recipe("dssm-synthetic", (*SMALL, f"local.optimizer={optimizer}", "local.lr=0.01"), registry)
    assert all(line.holds for line in parity(recipe, registry))


def test_a_nudge_moves_no_number_further_than_to_its_neighbour() -> None:
    given = {"w": np.array([[0.0, 1.0], [-2.5, 3e-20]], np.float32)}
    moved = [_nudged(given, Draws(4), nudge)["w"] for nudge in range(1, 30)]
    below, above = (np.nextafter(given["w"], np.float32(end)) for end in (-np.inf, np.inf))
    for value in moved:
        assert value.dtype == np.float32
        assert np.all((value >= below) & (value <= above))
    assert all(len({value[at] for value in moved}) == 3 for at in np.ndindex(2, 2))
