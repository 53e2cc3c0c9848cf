"""What a model declares: sizes that the tables' kernels can take, and parameters that each have one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtower.core.errors import FedtowerError
from fedtower.recsys.models import Declared, SharedTower, Table, array, linear
from fedtower.recsys.testing.examples import cases

CASES = cases()


@pytest.mark.parametrize("dim", [-4, 0, 1, 6, 63])
def test_a_table_of_a_width_that_the_kernels_lack_is_refused(dim: int) -> None:
    with pytest.raises(FedtowerError, match=rf"'item' has dimension {dim}.*multiple of 4; round it up"):
        Table("item", 10, dim, 0.1)


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_is_either_shared_or_on_the_device(name: str) -> None:
    model = CASES[name].model
    shared, own = model.parameters(), model.device_parameters()
    assert list(own) == ([] if name == "images" else ["own"])
    assert sorted([*shared, *own]) == sorted(name for name, _ in model.shared.named_parameters())


def test_without_a_tower_of_the_cloud_devices_see_the_tables_side_by_side() -> None:
    tables = (Table("item", 10, 8, 0.1), Table("bias", 10, 4, 0.1))
    declared = Declared(SharedTower(), tables)
    rows = torch.randn(3, 12)
    assert declared.cloud.width == 12
    assert declared.cloud(rows, torch.empty(3, 0)) is rows
    assert Declared(SharedTower()).cloud.width == 0


def test_parameters_are_copies() -> None:
    model = CASES["histories"].model
    model.parameters()["history.weight"][:] = 99.0
    assert not (model.parameters()["history.weight"] == 99.0).any()


def test_an_array_is_float32_and_a_copy() -> None:
    value = torch.ones(3, dtype=torch.float64, requires_grad=True)
    copied = array(value)
    copied[0] = 5.0
    assert copied.dtype == np.float32
    assert value.tolist() == [1.0, 1.0, 1.0]


def test_a_layer_starts_from_the_generator_alone() -> None:
    one, other = (linear(3, 2, torch.Generator().manual_seed(6)) for _ in range(2))
    torch.manual_seed(1)
    third = linear(3, 2, torch.Generator().manual_seed(6))
    for layer in (other, third):
        assert torch.equal(layer.weight, one.weight)
        assert torch.equal(layer.bias, one.bias)


@pytest.mark.parametrize("inputs", [4, 100])
def test_a_layer_starts_as_torchs_own_does(inputs: int) -> None:
    ours, theirs = linear(inputs, 2000, torch.Generator().manual_seed(6)), torch.nn.Linear(inputs, 2000)
    bound = inputs**-0.5
    for mine, yours in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        # The spread of a uniform draw is bound / sqrt(3); 2,000 values or more give it to 5 %.
        for value in (mine, yours):
            assert value.detach().abs().max() <= bound
            assert float(value.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
