"""dssm: the promises of a model, its windows by hand, and its item tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtower.core.errors import RecipeError
from fedtower.plugins.models.dssm.model import DSSM, ItemTower, UserTower
from fedtower.recsys.models import Declared, Schema, SequenceTower
from fedtower.recsys.testing.model import ModelPromises

SCHEMA = Schema(num_items=30, num_user_features=2, num_item_features=3, history_length=9)


class TestDSSM(ModelPromises):
    make = DSSM


class TestDSSMWithEverything(ModelPromises):
    make = staticmethod(lambda: DSSM(dim=8, hidden=12, windows=(4, 1), item_hidden=6, user_vector=True))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def declared(schema: Schema = SCHEMA, **changes: Any) -> Declared:
    return DSSM(**{"dim": 4, "hidden": 5, "windows": (3, 1), **changes}).declare(schema, generator())


def tower_of(model: Declared) -> SequenceTower:
    assert isinstance(model.shared, SequenceTower)
    return model.shared


def only_pools(tower: UserTower, weights: list[float]) -> None:
    """Switch the small network off, and mix the pools with these weights."""
    with torch.no_grad():
        tower.second.weight.zero_()
        tower.second.bias.zero_()
        tower.mixture.copy_(torch.tensor(weights))


def counted(events: int) -> Tensor:
    """Rows (T, 4 + 1): event t is the vector (10**t, 0, 0, 0), so that a sum says which events are in it."""
    rows = torch.zeros(events, 5)
    rows[:, 0] = 10.0 ** torch.arange(events)
    return rows


def test_windows_by_hand() -> None:
    tower: Any = declared().shared
    assert tower.windows == (9, 3, 1)
    history, target, user = counted(6), torch.tensor([5, 2, 1, 0, 6]), torch.zeros(2)
    for weights, pooled in (
        ([1.0, 0, 0], [11111 / 5, 11 / 2, 1.0, 0.0, 111111 / 6]),  # the whole history before the target
        ([0, 1.0, 0], [11100 / 3, 11 / 2, 1.0, 0.0, 111000 / 3]),  # the newest three, fewer at first
        ([0, 0, 1.0], [10000.0, 10.0, 1.0, 0.0, 100000.0]),  # the newest one
    ):
        only_pools(tower, weights)
        torch.testing.assert_close(tower.represent(history, target, user)[:, 0].detach(), torch.tensor(pooled))


def test_the_whole_history_ends_where_the_settings_say() -> None:
    # In training the slots reach further back than a target may look.
    tower: Any = declared(Schema(30, 2, 3, history_length=2)).shared
    assert tower.windows == (2, 1)
    only_pools(tower, [1.0, 0.0])
    seen = tower.represent(counted(6), torch.tensor([5]), torch.zeros(2))
    assert float(seen[0, 0].detach()) == pytest.approx(11000 / 2)


def test_the_network_sees_pools_and_user_features() -> None:
    tower: Any = declared().shared
    history, user = torch.randn(6, 5, generator=generator()), torch.tensor([0.5, -2.0])
    vectors = history[:, :4]
    pools = [vectors[:4].mean(dim=0), vectors[1:4].mean(dim=0), vectors[3]]
    hidden = torch.relu(tower.first.weight @ torch.cat([*pools, user]) + tower.first.bias)
    mixed = sum(weight * pool for weight, pool in zip(tower.mixture, pools, strict=True))
    expected = tower.second.weight @ hidden + tower.second.bias + mixed
    torch.testing.assert_close(tower.represent(history, torch.tensor([4]), user)[0], expected)


@settings(deadline=None)
@given(st.integers(1, 12), st.data())
def test_what_comes_at_the_target_or_later_shows_nowhere(slots: int, data: st.DataObject) -> None:
    model = declared(user_vector=True)
    target = data.draw(st.lists(st.integers(0, slots), min_size=1, max_size=5))
    place = data.draw(st.integers(0, len(target) - 1))
    history = torch.randn(slots, 5, generator=generator())
    changed = history.clone()
    changed[target[place] :] = torch.randn(slots - target[place], 5, generator=generator(9)) * 50
    seen, again = (tower_of(model).represent(rows, torch.tensor(target), torch.ones(2)) for rows in (history, changed))
    assert torch.equal(seen[place], again[place])


def test_an_items_bias_is_no_part_of_a_user() -> None:
    model = declared()
    history = torch.randn(6, 5, generator=generator())
    biased = history.clone()
    biased[:, 4] += 7.0
    target = torch.tensor([3, 6])
    seen, again = (tower_of(model).represent(rows, target, torch.zeros(2)) for rows in (history, biased))
    assert torch.equal(seen, again)
    torch.testing.assert_close(tower_of(model).score(seen, biased), tower_of(model).score(seen, history) + 7.0)


def test_scores_by_hand() -> None:
    score = tower_of(declared()).score(
        torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]),
        torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.5], [1.0, 1.0, 1.0, 9.0, -1.0]]),
    )
    assert score.tolist() == [[11.5, 2.0], [0.5, 8.0]]


def test_the_item_tower_begins_as_the_row_itself() -> None:
    tower = ItemTower(4, 3, hidden=0, generator=generator())
    rows, features = torch.randn(6, 8, generator=generator()), torch.randn(6, 3, generator=generator())
    assert tower.width == 5
    assert torch.equal(tower(rows, features), rows[:, :5])  # the last three columns are there for the kernels alone


def test_the_item_tower_without_a_hidden_layer_is_row_plus_features() -> None:
    tower = ItemTower(4, 3, hidden=0, generator=generator())
    (weight,) = tower.parameters()
    with torch.no_grad():
        weight.copy_(torch.arange(12.0).reshape(weight.shape))
    out = tower(torch.zeros(1, 8), torch.tensor([[1.0, 0.0, 2.0]]))
    assert out.tolist() == [[16.0, 19.0, 22.0, 25.0, 0.0]]


def test_the_item_tower_with_a_hidden_layer_is_row_plus_network() -> None:
    tower = ItemTower(4, 3, hidden=6, generator=generator())
    rows, features = torch.randn(2, 8, generator=generator()), torch.randn(2, 3, generator=generator())
    residual: Any = tower.residual
    first, _, second = residual
    hidden = torch.relu(torch.cat([rows[:, :4], features], dim=1) @ first.weight.T + first.bias)
    torch.testing.assert_close(tower(rows, features)[:, :4], rows[:, :4] + hidden @ second.weight.T + second.bias)
    assert torch.equal(tower(rows, features)[:, 4], rows[:, 4])


@pytest.mark.parametrize("hidden", [0, 6])
def test_the_item_tower_learns_from_features(hidden: int) -> None:
    tower = ItemTower(4, 3, hidden, generator())
    torch.autograd.backward(tower(torch.ones(2, 8), torch.ones(2, 3)).sum())
    assert all(value.grad is not None and value.grad.any() for value in tower.parameters())


def test_a_users_own_vector_is_added_stays_on_the_device_and_starts_at_zero() -> None:
    without, with_one = declared(), declared(user_vector=True)
    assert (without.on_device, with_one.on_device) == ((), ("user_vector",))
    assert "user_vector" not in with_one.parameters()
    assert not with_one.device_parameters()["user_vector"].any()
    history, target = torch.randn(6, 5, generator=generator()), torch.tensor([3, 6])
    expected = tower_of(without).represent(history, target, torch.zeros(2))
    assert torch.equal(tower_of(with_one).represent(history, target, torch.zeros(2)), expected)
    tower: Any = with_one.shared
    with torch.no_grad():
        tower.user_vector += torch.tensor([1.0, 2.0, 3.0, 4.0])
    moved = tower_of(with_one).represent(history, target, torch.zeros(2)) - expected
    torch.testing.assert_close(moved, torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2))


def test_tables_have_the_sizes_of_the_data() -> None:
    item, bias = declared().tables
    assert (item.name, item.num_rows, item.dim, item.scale) == ("item", 30, 4, 0.05)
    assert (bias.name, bias.num_rows, bias.scale) == ("item_bias", 30, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 6}, "model.dim must be a positive multiple of 4, not 6"),
        ({"dim": 0}, "model.dim must be a positive multiple of 4, not 0"),
        ({"hidden": 0}, "model.hidden must be at least 1, not 0"),
        ({"item_hidden": -1}, "model.item_hidden must be at least 0, not -1"),
        ({"scale": -0.1}, "model.scale is a standard deviation, so it cannot be -0.1"),
        ({"windows": (5, 0)}, r"model.windows must be numbers of items from 1 on, not \[5, 0\]"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DSSM(**settings)
