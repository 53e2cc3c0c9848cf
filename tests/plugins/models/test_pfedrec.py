"""PFedRec: a linear score of its own for every client, and nothing shared but items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtower.core.errors import RecipeError
from fedtower.plugins.models.pfedrec.model import PFedRec, ScoreFunction
from fedtower.recsys.models import Schema

SCHEMA = Schema(num_items=9, num_user_features=2, num_item_features=1, history_length=5)


def test_a_score_is_linear_in_the_items_row() -> None:
    tower = ScoreFunction(4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        tower.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        tower.bias.copy_(torch.tensor([0.25]))
    rows = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    vectors = tower.represent(torch.zeros(5, 4), torch.tensor([0, 3]), torch.zeros(2))
    assert tower.score(vectors, rows).tolist() == [[0.25, 3.25], [0.25, 3.25]]
    found = tower.queries(vectors) @ tower.keys(rows).T
    assert found.tolist() == tower.score(vectors, rows).tolist()


def test_nothing_is_shared_but_rows() -> None:
    declared = PFedRec(dim=8).declare(SCHEMA, torch.Generator().manual_seed(1))
    assert declared.parameters() == {}
    assert {name: value.shape for name, value in declared.device_parameters().items()} == {"weight": (8,), "bias": (1,)}
    assert [(table.num_rows, table.dim) for table in declared.tables] == [(9, 8)]
    assert np.abs(declared.device_parameters()["weight"]).max() <= 8**-0.5


@pytest.mark.parametrize("settings", [{"dim": 6}, {"dim": 0}, {"scale": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=r"model\."):
        PFedRec(**settings)  # type: ignore[arg-type]
