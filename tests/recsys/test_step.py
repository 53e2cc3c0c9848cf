"""The step: torch's own gradient descent, as a pure function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings
from fedtower.core.rows import step_rows, sum_duplicates
from fedtower.core.testing.promises import Untouched
from fedtower.recsys.models import SequenceTower
from fedtower.recsys.step import Step, make_loss, make_step, pure
from fedtower.recsys.testing.examples import MeanUser, cases

WIDTH, SLOTS, NEGATIVES, ITEMS = 8, 10, 6, 7  # fewer items than slots: rows come up more than once


class Central(nn.Module):
    """The same model as anybody would write it: one embedding table, one tower, the obvious loop over targets."""

    def __init__(self, table: Tensor, tower: SequenceTower, loss: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(table), WIDTH, _weight=table.clone())
        self.tower = tower
        self.loss = loss

    def forward(self, history: Tensor, negatives: Tensor, target: Tensor, weight: Tensor, user: Tensor) -> Tensor:
        losses = []
        for place in target.tolist():
            vector = self.tower.represent(self.embedding(history[:place]), torch.tensor([place]), user)
            rows = self.embedding(torch.cat([history[place : place + 1], negatives]))
            logits = self.tower.score(vector, rows)
            labels = torch.eye(1, logits.shape[1])
            if self.loss == "bce":
                each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")[0]
                losses.append(each[0] + each[1:].mean())
            else:
                losses.append(nn.functional.cross_entropy(logits, labels))
        return (torch.stack(losses) * weight).sum() / weight.sum()


def tower(seed: int = 1) -> MeanUser:
    return MeanUser(WIDTH, 3, torch.Generator().manual_seed(seed))


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def at_first(step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tower's parameters, and the optimiser's state before the first step."""
    parameters = parameters_of(tower())
    return parameters, step.init(parameters)


def batch(seed: int = 2) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A table (I, W), the items in the slots, and the inputs of one step."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(ITEMS, WIDTH, generator=generator)
    history = torch.randint(ITEMS, (SLOTS,), generator=generator)
    negatives = torch.randint(ITEMS, (NEGATIVES,), generator=generator)
    inputs = {
        "target": torch.tensor([0, 1, 4, 9, 9]),
        "weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
        "user": torch.randn(3, generator=generator),
    }
    return table, history, negatives, inputs


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
def test_steps_are_those_of_torch_optim_sgd_on_an_ordinary_module(loss: Any) -> None:
    table, history, negatives, inputs = batch()
    central = Central(table, tower(), loss)
    optimizer = torch.optim.SGD(central.parameters(), lr=0.3)
    step = make_step(tower(), LocalSettings(steps=1, loss=loss))
    parameters, rows = parameters_of(tower()), table.numpy().copy()
    state = step.init(parameters)
    where = np.concatenate([history.numpy(), negatives.numpy()])
    for _ in range(4):
        optimizer.zero_grad()
        expected = central(history, negatives, **inputs)
        torch.autograd.backward(expected)
        optimizer.step()

        slots = {"history": torch.from_numpy(rows[history]), "negatives": torch.from_numpy(rows[negatives])}
        parameters, state, slopes, got = step(parameters, state, slots, inputs, 0.3)
        rows = step_rows(rows, where, np.concatenate([slopes[name].numpy() for name in slots]), 0.3)

        torch.testing.assert_close(got, expected.detach())
        torch.testing.assert_close(parameters, parameters_of(central.tower))
        torch.testing.assert_close(torch.from_numpy(rows), central.embedding.weight.detach())


def test_the_gradients_of_the_slots_sum_to_the_dense_embeddings_gradient() -> None:
    table, history, negatives, inputs = batch()
    central = Central(table, tower(), "sampled_softmax")
    torch.autograd.backward(central(history, negatives, **inputs))
    step = make_step(tower(), LocalSettings(steps=1))
    slots = {"history": table[history], "negatives": table[negatives]}
    _, _, slopes, _ = step(*at_first(step), slots, inputs, 1.0)
    assert slopes["history"].shape == (SLOTS, WIDTH)
    ids, summed = sum_duplicates(
        np.concatenate([history.numpy(), negatives.numpy()]),
        np.concatenate([slopes["history"].numpy(), slopes["negatives"].numpy()]),
    )
    dense = np.zeros((ITEMS, WIDTH), dtype=np.float32)
    dense[ids] = summed
    assert central.embedding.weight.grad is not None
    np.testing.assert_allclose(dense, central.embedding.weight.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_a_step_leaves_its_inputs_and_the_tower_alone_and_repeats_to_the_bit() -> None:
    table, history, negatives, inputs = batch()
    module = tower()
    before = parameters_of(module)
    step = make_step(module, LocalSettings(steps=1))
    given = (*at_first(step), {"history": table[history], "negatives": table[negatives]}, inputs)
    with Untouched(*({name: value.numpy() for name, value in part.items()} for part in given)):
        once = step(*given, 0.5)
    again = step(*given, 0.5)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert all(value.grad is None for value in module.parameters())


def test_padding_changes_nothing() -> None:
    table, history, negatives, inputs = batch()
    slots = {"history": table[history], "negatives": table[negatives]}
    shorter = {"target": inputs["target"][:4], "weight": inputs["weight"][:4], "user": inputs["user"]}
    step = make_step(tower(), LocalSettings(steps=1))
    for padded, plain in zip(
        step(*at_first(step), slots, inputs, 0.5), step(*at_first(step), slots, shorter, 0.5), strict=True
    ):
        torch.testing.assert_close(padded, plain)


def test_a_batch_of_padding_moves_nothing() -> None:
    table, history, negatives, inputs = batch()
    slots = {"history": table[history], "negatives": table[negatives]}
    nothing = {**inputs, "weight": torch.zeros(5)}
    step = make_step(tower(), LocalSettings(steps=1))
    parameters, _, slopes, loss = step(*at_first(step), slots, nothing, 0.5)
    torch.testing.assert_close(parameters, parameters_of(tower()), rtol=0, atol=0)
    assert not any(value.any() for value in slopes.values())
    assert loss == 0.0


def test_a_target_is_scored_by_the_slot_it_stands_at() -> None:
    table, history, negatives, inputs = batch()
    slots = {"history": table[history], "negatives": table[negatives]}
    positive, negative = pure(tower(), "scores")(parameters_of(tower()), slots, inputs)
    vectors = tower().represent(slots["history"], inputs["target"], inputs["user"])
    expected = [vectors[place] @ slots["history"][slot] for place, slot in enumerate(inputs["target"].tolist())]
    torch.testing.assert_close(positive, torch.stack(expected).detach())
    torch.testing.assert_close(negative, (vectors @ slots["negatives"].T).detach())


def test_a_method_runs_with_the_parameters_it_is_given() -> None:
    module, other = tower(seed=1), tower(seed=2)
    arguments = (torch.ones(4, WIDTH), torch.tensor([2]), torch.ones(3))
    with_others = pure(module, "represent")(parameters_of(other), *arguments)
    torch.testing.assert_close(with_others, other.represent(*arguments).detach())
    partly = {"own": torch.full((WIDTH,), 3.0)}
    torch.testing.assert_close(pure(module, "represent")(partly, *arguments), module.represent(*arguments) + 3.0)


def test_in_batch_softmax_is_refused_with_the_reason_and_two_ways_out() -> None:
    with pytest.raises(RecipeError, match=r"its own positives.*sampled_softmax.*mode = 'standalone'"):
        make_loss(tower(), "in_batch_softmax")


@pytest.mark.parametrize(
    ("name", "loss"),
    [("histories", "cross_entropy"), ("clicks", "sampled_softmax"), ("images", "in_batch_softmax")],
)
def test_a_loss_of_other_data_is_refused_before_the_first_step(name: str, loss: Any) -> None:
    with pytest.raises(RecipeError, match=rf"local.loss = '{loss}' is not for this model and data; there are"):
        make_step(cases()[name].model.shared, LocalSettings(steps=1, loss=loss))
