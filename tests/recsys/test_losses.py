"""Losses: by hand, and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedtower.core.plan import LocalSettings
from fedtower.recsys.losses import RANKING, bce, in_batch_softmax, sampled_softmax
from fedtower.recsys.step import make_loss
from fedtower.recsys.testing.examples import MeanUser

LOG = math.log


def scores(rows: int = 6, columns: int = 9, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * scale


def test_sampled_softmax_by_hand() -> None:
    # e^log2 / (e^log2 + e^0 + e^0) = 1/2, and e^0 / (e^0 + e^log3 + e^0) = 1/5.
    loss = sampled_softmax(torch.tensor([LOG(2), 0.0]), torch.tensor([[0.0, 0.0], [LOG(3), 0.0]]))
    torch.testing.assert_close(loss, torch.tensor([LOG(2), LOG(5)]))


def test_bce_by_hand() -> None:
    # -log sigmoid(log3) = log(4/3); the negatives' -log(1 - sigmoid) are log2 and log4, and their mean counts.
    loss = bce(torch.tensor([LOG(3)]), torch.tensor([[0.0, LOG(3)]]))
    torch.testing.assert_close(loss, torch.tensor([LOG(4 / 3) + (LOG(2) + LOG(4)) / 2]))


def test_in_batch_softmax_by_hand() -> None:
    # Rows 0 and 2 chose the same item: each leaves the other's column out.
    given = torch.tensor([[LOG(2), 0.0, 9.0], [0.0, LOG(2), 0.0], [9.0, 0.0, LOG(3)]])
    loss = in_batch_softmax(given, torch.tensor([8, 5, 8]))
    torch.testing.assert_close(loss, torch.tensor([LOG(3 / 2), LOG(2), LOG(4 / 3)]))


def test_sampled_softmax_is_torchs_cross_entropy() -> None:
    expected = functional.cross_entropy(scores(), torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(sampled_softmax(scores()[:, 0], scores()[:, 1:]), expected)


def test_bce_is_torchs_binary_cross_entropy() -> None:
    logits, labels = scores(), torch.zeros(6, 9)
    labels[:, 0] = 1.0
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(bce(logits[:, 0], logits[:, 1:]), each[:, 0] + each[:, 1:].mean(dim=1))


def test_in_batch_softmax_of_different_items_is_torchs_cross_entropy() -> None:
    square = scores(7, 7)
    expected = functional.cross_entropy(square, torch.arange(7), reduction="none")
    torch.testing.assert_close(in_batch_softmax(square, torch.arange(7) + 40), expected)


def test_another_column_of_the_same_item_changes_neither_loss_nor_gradient() -> None:
    square = scores(3, 3).requires_grad_()
    torch.autograd.backward(in_batch_softmax(square, torch.tensor([8, 5, 8])).sum())
    assert square.grad is not None
    assert square.grad[0, 2] == square.grad[2, 0] == 0.0
    assert torch.isfinite(square.grad).all()
    assert (square.grad.abs() > 0).sum() == 7


def test_a_batch_that_chose_one_item_has_nothing_to_learn() -> None:
    square = scores(4, 4).requires_grad_()
    loss = in_batch_softmax(square, torch.full((4,), 3))
    torch.autograd.backward(loss.sum())
    assert not loss.any()
    assert square.grad is not None
    assert not square.grad.any()


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", RANKING)
def test_scores_far_off_give_finite_losses_and_gradients(name: str, size: float) -> None:
    positive, negative = torch.tensor([size], requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    loss = RANKING[name](positive, negative)
    torch.autograd.backward(loss.sum())
    assert positive.grad is not None
    assert negative.grad is not None
    assert all(torch.isfinite(value).all() for value in (loss, positive.grad, negative.grad))
    assert float(loss.detach()) == pytest.approx(max(-size, 0), abs=3)


@pytest.mark.parametrize("name", RANKING)
def test_what_weighs_nothing_changes_nothing(name: str) -> None:
    tower = MeanUser(8, 3, torch.Generator().manual_seed(1))
    parameters = {key: value.detach() for key, value in tower.named_parameters()}
    history, negatives = scores(10, 8, scale=1.0), scores(5, 8, scale=2.0)
    loss = make_loss(tower, LocalSettings(steps=1, loss=name).loss)  # type: ignore[arg-type]

    def of(target: list[int], weight: list[float]) -> Tensor:
        inputs = {"target": torch.tensor(target), "weight": torch.tensor(weight), "user": torch.ones(3)}
        return loss(parameters, {"history": history, "negatives": negatives}, inputs)

    three = of([2, 5, 9], [1.0, 1.0, 1.0])
    torch.testing.assert_close(of([2, 5, 9, 0, 7], [1.0, 1.0, 1.0, 0.0, 0.0]), three)
    torch.testing.assert_close(of([2, 2, 5, 5, 9, 9], [0.5] * 6), three)
    assert of([1, 2], [0.0, 0.0]) == 0.0
