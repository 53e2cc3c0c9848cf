"""Wide & Deep: what its two parts add up to, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fedtower.core.errors import RecipeError
from fedtower.plugins.models.wide_deep.model import WideDeep
from fedtower.recsys.models import ExampleSchema
from fedtower.recsys.testing.examples import CLICKS
from fedtower.recsys.testing.model import ModelPromises


class TestWideDeep(ModelPromises):
    make = WideDeep


class TestWideDeepWithoutHiddenLayers(ModelPromises):
    @staticmethod
    def make() -> WideDeep:
        return WideDeep(hidden=())


def test_the_logit_is_the_sum_of_both_parts() -> None:
    declared = WideDeep(dim=4, hidden=()).declare(CLICKS, torch.Generator().manual_seed(1))
    rows, dense = torch.randn(2, 3, 5), torch.randn(2, 3)
    parts = {name: value.detach() for name, value in declared.shared.named_parameters()}
    wide = rows[:, :, 4].sum(dim=1) + dense @ parts["wide.weight"][0] + parts["wide.bias"]
    deep = torch.cat([dense, rows[:, :, :4].reshape(2, 12)], dim=1) @ parts["out.weight"][0] + parts["out.bias"]
    logits = declared.shared.logits({"category": rows}, {"dense": dense})  # type: ignore[operator]
    torch.testing.assert_close(logits, wide + deep)


def test_a_device_gets_an_embedding_and_one_weight_of_each_row() -> None:
    declared = WideDeep(dim=8).declare(CLICKS, torch.Generator().manual_seed(1))
    assert [(table.num_rows, table.dim) for table in declared.tables] == [(18, 8), (18, 4)]
    rows = torch.randn(5, 12)
    assert torch.equal(declared.cloud(rows, torch.zeros(5, 0)), rows[:, :9])


@pytest.mark.parametrize("settings", [{"dim": 6}, {"dim": 0}, {"hidden": (0,)}])
def test_widths_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="model"):
        WideDeep(**settings)  # type: ignore[arg-type]


def test_classes_and_data_without_categories_are_refused() -> None:
    for schema in (ExampleSchema((3,), (5,), num_classes=4), ExampleSchema((3,))):
        with pytest.raises(RecipeError, match="criteo"):
            WideDeep().declare(schema, torch.Generator())
