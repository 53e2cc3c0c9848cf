"""Devices that each judge their own shard say together what the simulation says of all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.draws import Draws
from fedtower.core.registry import discover
from fedtower.core.round import make_plan
from fedtower.core.rows import RowStore
from fedtower.plugins.datasets.mnist.dataset import MNIST
from fedtower.plugins.datasets.mnist.example import write as write_digits
from fedtower.plugins.runtimes.mnn.device import format_of
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.bundle_of_run import export_run
from fedtower.recsys.device import BundleScorer
from fedtower.recsys.evaluation import MetricSum
from fedtower.recsys.on_device import Held
from fedtower.recsys.own_model import tuned
from fedtower.recsys.run import Run
from fedtower.recsys.shards import read_shard, write_shards
from fedtower.recsys.splits import Split
from fedtower.recsys.training import Federated

REGISTRY = discover()
HEADS = {
    "local.on_device": ["out"],
    "model.hidden": [8],
    "cohort.size": 4,
    "local.batch_size": 8,
    "local.lr": 0.2,
    "evaluation.every": 0,
    "runtime.name": "torch_loop",
}


def devices(run: Run, folder: Path) -> tuple[Bundle, list[Held]]:
    """The run's bundle, and each of its clients with a shard of its own."""
    task = run.trained.setting.task
    split: Split | None = getattr(task, "split", None)
    data: Any = getattr(task, "population", None) or getattr(task, "examples", None)
    write_shards(folder / "shards", data, split, np.arange(task.num_clients), lambda done: None)
    bundle = export_run(run.folder, folder / "bundle", REGISTRY, formats=["onnx", "mnn"])
    paths = sorted((folder / "shards").glob("client-*"))
    return bundle, [Held(read_shard(path), run.trained.setting.draws) for path in paths]


def together(said: Iterable[Mapping[str, MetricSum]]) -> dict[str, float]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for sums in said:
        for name, (total, count) in sums.items():
            totals[name][0] += total
            totals[name][1] += count
    return {name: total / count for name, (total, count) in totals.items()}


@pytest.fixture(scope="module")
def scored(federated_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, BundleScorer, list[Held]]:
    bundle, held = devices(federated_run, tmp_path_factory.mktemp("devices"))
    return federated_run, BundleScorer(bundle, format_of()), held


@pytest.mark.parametrize("protocol", ["sampled", "full"])
def test_devices_rank_as_the_simulation_does(scored: tuple[Run, BundleScorer, list[Held]], protocol: Any) -> None:
    run, scorer, held = scored
    learned = run.trained.training.learned()
    rows: RowStore | None = learned.rows
    settings = replace(run.trained.setting.recipe.evaluation, protocol=protocol)
    said = []
    for device in held:
        own = {name: value[0].numpy() for name, value in learned.own(device.client).items()}
        said.append(device.judge(scorer, rows, own, "test", settings))
    want = run.trained.evaluate(protocol).metrics
    got = together(said)
    assert set(got) == {name for name in want if not name.startswith("coverage") and name != "AUC"}
    for name, value in got.items():
        assert value == pytest.approx(want[name], abs=1e-6), name


def test_newer_parameters_are_used_in_place_of_the_bundles(scored: tuple[Run, BundleScorer, list[Held]]) -> None:
    run, scorer, held = scored
    learned = run.trained.training.learned()
    settings = run.trained.setting.recipe.evaluation
    nothing = {name: np.zeros_like(value) for name, value in learned.parameters.items()}
    flat = BundleScorer(scorer.bundle, scorer.format, newer=nothing)
    own = {name: value[0].numpy() for name, value in learned.own(held[0].client).items()}
    judged = held[0].judge(flat, learned.rows, own, "test", settings)
    assert judged != held[0].judge(scorer, learned.rows, own, "test", settings)
    # So are a device's own in place of those, as its copies of what is shared are.
    assert judged == held[0].judge(scorer, learned.rows, {**own, **nothing}, "test", settings)


@pytest.fixture(scope="module")
def tuning(small: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, BundleScorer, list[Held]]:
    """A run whose clients have heads of their own, and tune the model for themselves before they judge."""
    folder = tmp_path_factory.mktemp("tuning")
    own = {"model.user_vector": False, "local.on_device": ["second"], "local.steps": 2, "local.head_first": 1}
    asked = {**own, "local.row_lr": 2.0, "evaluation.personal": True}
    run = fedtower.run("dssm-synthetic", {**small, **asked, "rounds": 2}, runs=folder / "runs")
    bundle, held = devices(run, folder)
    return run, BundleScorer(bundle, format_of()), held


@pytest.mark.parametrize("protocol", ["sampled", "full"])
def test_devices_that_tune_rank_as_the_simulation_does(
    tuning: tuple[Run, BundleScorer, list[Held]], protocol: Any
) -> None:
    run, scorer, held = tuning
    training = run.trained.training
    assert isinstance(training, Federated)
    plan, settings = make_plan(training._state, training._parts), run.trained.setting.recipe.evaluation
    asked, said, untuned = replace(settings, protocol=protocol), [], []
    for device in held:
        own, rows = tuned(plan, training._parts.client, device.client)
        said.append(device.judge(scorer, rows, own, "test", asked))
        untuned.append(device.judge(scorer, training.learned().rows, {}, "test", asked))
    want = run.trained.evaluate(protocol).metrics
    got = together(said)
    assert len(got) > 3
    for name, value in got.items():
        assert value == pytest.approx(want[name], abs=1e-6), name
    assert together(untuned) != got


def test_devices_tell_digits_as_the_simulation_does(tmp_path: Path) -> None:
    digits = write_digits(tmp_path)
    overrides = {"data.path": digits["path"], "data.clients": 12, "data.validation_images": 30, "rounds": 2}
    small = {"cohort.size": 4, "local.batch_size": 8, "evaluation.every": 0}
    run = fedtower.run("fedavg-mnist-mlp", {**overrides, **small}, runs=tmp_path / "runs")
    bundle, held = devices(run, tmp_path)
    scorer = BundleScorer(bundle, format_of())
    got = together(device.judge(scorer, None, {}, "test", run.trained.setting.recipe.evaluation) for device in held)
    want = run.trained.evaluate().metrics
    assert set(got) == {"accuracy", "logloss"}
    for name, value in got.items():
        assert value == pytest.approx(want[name], abs=1e-6), name


def test_devices_with_heads_of_their_own_tell_the_digits_that_they_know_as_the_simulation_does(tmp_path: Path) -> None:
    digits = MNIST(Path(write_digits(tmp_path)["path"]), clients=5, partition="shards", validation_images=30)
    images = digits.load(draws=Draws(3), progress=lambda message: None)
    write_shards(tmp_path / "shards", images, None, np.arange(5), lambda done: None)
    shards = {"data.name": "shards", "data.path": str(tmp_path / "shards"), "rounds": 2}
    run = fedtower.run("fedavg-mnist-mlp", {**shards, **HEADS}, runs=tmp_path / "runs")
    learned, settings = run.trained.training.learned(), run.trained.setting.recipe.evaluation
    scorer = BundleScorer(
        export_run(run.folder, tmp_path / "of shards", REGISTRY, formats=["onnx", "mnn"]), format_of()
    )
    said = []
    for path in sorted((tmp_path / "shards").glob("client-*")):
        device = Held(read_shard(path), run.trained.setting.draws)
        own = {name: value[0].numpy() for name, value in learned.own(device.client).items()}
        said.append(device.judge(scorer, None, own, "test", settings))
    assert [{each.cases for each in sums.values()} for sums in said] == [{1}] * 5, "a device is one case"
    got, want = together(said), run.trained.evaluate()
    assert set(got) == set(want.metrics) == {"accuracy", "logloss"}
    for name, value in got.items():
        assert value == pytest.approx(want.metrics[name], abs=1e-6), name
    held = read_shard(tmp_path / "shards" / "client-000000.safetensors").arrays
    known = np.isin(held["test/labels"], held["training/labels"])
    assert 0 < known.sum() < len(known)
    assert want.users == 5
