"""The networks for numbers and images: their published sizes, and torch's own modules as oracles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedtower.core.errors import RecipeError
from fedtower.plugins.models.cnn.model import CNN
from fedtower.plugins.models.lenet5.model import LeNet5
from fedtower.plugins.models.mlp.model import MLP
from fedtower.recsys.models import Declared, ExampleSchema
from fedtower.recsys.testing.examples import CLICKS
from fedtower.recsys.testing.model import ModelPromises

DIGITS = ExampleSchema((28, 28), num_classes=10)


class TestMLP(ModelPromises):
    make = MLP


class TestLeNet5(ModelPromises):
    make = LeNet5


class TestCNN(ModelPromises):
    make = CNN


def declare(model: MLP | LeNet5 | CNN, schema: ExampleSchema = DIGITS) -> Declared:
    return model.declare(schema, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "parameters"),
    # McMahan et al., 2017, section 3, give the first and the last; the second is LeNet-5 with all maps connected.
    [(MLP(hidden=(200, 200)), 199_210), (LeNet5(), 61_706), (CNN(), 1_663_370)],
)
def test_they_have_as_many_parameters_as_published(model: MLP | LeNet5 | CNN, parameters: int) -> None:
    assert sum(value.size for value in declare(model).parameters().values()) == parameters


def oracle(model: LeNet5 | CNN) -> nn.Sequential:
    """The same network, layer after layer of torch's own."""
    if isinstance(model, LeNet5):
        maps = [
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
        return nn.Sequential(
            *maps, nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )
    maps = [nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    maps += [nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))


@pytest.mark.parametrize("model", [LeNet5(), CNN()])
def test_they_are_the_networks_of_their_papers(model: LeNet5 | CNN) -> None:
    declared, theirs = declare(model), oracle(model)
    with torch.no_grad():
        for mine, yours in zip(declared.shared.parameters(), theirs.parameters(), strict=True):
            yours.copy_(mine)
        images = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(2))
        logits = declared.shared.logits({}, {"dense": images})  # type: ignore[operator]
        torch.testing.assert_close(logits, theirs(images[:, None]))


def test_colours_are_channels() -> None:
    for model in (LeNet5(), CNN()):
        declared = declare(model, ExampleSchema((3, 32, 32), num_classes=5))
        assert declared.shared.logits({}, {"dense": torch.rand(2, 3, 32, 32)}).shape == (2, 5)  # type: ignore[operator]


def test_fully_connected_layers_take_numbers_and_a_label_that_is_0_or_1() -> None:
    declared = declare(MLP(hidden=(4,)), ExampleSchema((7,)))
    assert declared.shared.logits({}, {"dense": torch.rand(3, 7)}).shape == (3,)  # type: ignore[operator]


@pytest.mark.parametrize("model", [LeNet5(), CNN()])
@pytest.mark.parametrize(
    "schema",
    [ExampleSchema((13,), num_classes=10), ExampleSchema((28, 28)), ExampleSchema((3, 3), num_classes=2), CLICKS],
)
def test_what_is_no_image_of_a_class_is_refused(model: LeNet5 | CNN, schema: ExampleSchema) -> None:
    with pytest.raises(RecipeError, match=r"model.name"):
        declare(model, schema)


def test_categories_are_refused_by_a_model_without_rows() -> None:
    with pytest.raises(RecipeError, match="wide_deep"):
        declare(MLP(), CLICKS)
