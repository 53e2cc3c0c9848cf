"""FedSGD: one step on all of everybody's examples is one step of full-batch descent, to rounding, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.plugins.datasets.mnist import example as digits
from fedtower.recsys.tasks import Labelled, make_task
from fedtower.recsys.training import Federated, Setting

REGISTRY = discover()


def setting_of(*overrides: str) -> Setting:
    recipe = load_recipe("fedsgd-mnist-mlp", overrides, REGISTRY)
    draws = Draws(recipe.seed)
    data = REGISTRY.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    return Setting(recipe, REGISTRY, make_task(data, recipe, draws), Hooks.none(), draws, time.monotonic)


def descent(
    parameters: Mapping[str, Any], images: torch.Tensor, labels: torch.Tensor, lr: float
) -> Iterator[list[Any]]:
    """The same network in plain torch, and its parameters after each step on everything."""
    ours = [torch.tensor(value) for value in parameters.values()]
    flat, shapes = nn.Flatten(), [tuple(value.shape) for value in ours if value.ndim == 2]
    linears = [nn.Linear(shape[1], shape[0]) for shape in shapes]
    network = nn.Sequential(flat, *[each for linear in linears[:-1] for each in (linear, nn.ReLU())], linears[-1])
    with torch.no_grad():
        for theirs, value in zip(network.parameters(), ours, strict=True):
            theirs.copy_(value)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    while True:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield [value.detach().numpy() for value in network.parameters()]


def agree(setting: Setting, steps: int) -> None:
    """Rounds and steps leave the same parameters, one after another."""
    assert isinstance(setting.task, Labelled)
    training = Federated(setting)
    everything = setting.task.examples.examples(np.arange(setting.task.num_clients))
    first = {name: np.array(value) for name, value in training._state.parameters.items()}
    images, labels = torch.from_numpy(everything.dense), torch.from_numpy(everything.labels.astype(np.int64))
    central = descent(first, images, labels, setting.recipe.local.lr * setting.recipe.server.lr)
    for _, report, wanted in zip(range(steps), training.rounds(), central, strict=False):
        assert report.metrics["steps"] == 1
        for name, value in zip(training._state.parameters, wanted, strict=True):
            np.testing.assert_allclose(training._state.parameters[name], value, rtol=1e-4, atol=2e-6, err_msg=name)
    assert any(np.abs(training._state.parameters[name] - value).max() > 1e-3 for name, value in first.items())


@pytest.mark.parametrize(
    ("partition", "runtime"),
    [
        ("iid", ["runtime.name=torch_loop"]),
        ("shards", ["runtime.name=torch_loop"]),
        ("iid", ["runtime.name=vectorized", "runtime.compile=false"]),
    ],
)
def test_rounds_of_everybody_are_steps_of_full_batch_descent(
    tmp_path: Path, partition: str, runtime: list[str]
) -> None:
    data = digits.write(tmp_path)
    small = [
        f"data.path={data['path']!r}",
        f"data.partition={partition}",
        "data.clients=6",
        "data.validation_images=30",
    ]
    agree(setting_of(*small, "cohort.size=6", "model.hidden=[16, 12]", *runtime), steps=10)


@pytest.mark.soak
def test_so_it_is_on_sixty_thousand_digits(shared_data: Path) -> None:
    data = [f"data.path={str(shared_data / 'mnist')!r}", "data.validation_images=0"]
    agree(setting_of(*data, "cohort.size=100"), steps=5)
