"""Training losses: how badly a model ranks what a user chose among what she did not, one value an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedtower.core.errors import RecipeError

Loss = Callable[[Tensor, Tensor], Tensor]


def sampled_softmax(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Cross entropy of the chosen item among itself and the negatives.

    .. math:: -\log \frac{e^{s^+_b}}{e^{s^+_b} + \sum_n e^{s^-_{b,n}}}

    Jean et al., 2015, https://arxiv.org/abs/1412.2007; the correction for the sampling distribution is left out, as the
    negatives are uniform and it would be a constant.

    Shape:
        positive ``(B,)``, negative ``(B, N)`` -> ``(B,)``

    >>> sampled_softmax(torch.tensor([0.0]), torch.tensor([[0.0]]))
    tensor([0.6931])
    """
    return torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Binary cross entropy, the chosen item against the mean over its negatives.

    .. math:: \log(1 + e^{-s^+_b}) + \frac{1}{N} \sum_n \log(1 + e^{s^-_{b,n}})

    He et al., 2017, https://arxiv.org/abs/1708.05031, equation 7, with the negatives' sum as a mean, so that its
    weight does not depend on how many are drawn.

    Shape:
        positive ``(B,)``, negative ``(B, N)`` -> ``(B,)``

    >>> bce(torch.tensor([0.0]), torch.tensor([[0.0]]))
    tensor([1.3863])
    """
    return softplus(-positive) + softplus(negative).mean(dim=1)


def in_batch_softmax(scores: Tensor, items: Tensor) -> Tensor:
    r"""Cross entropy of each example's own item among the items of the whole batch.

    A column whose item is the example's own item, chosen by somebody else, is left out of its sum. Yi et al., 2019,
    https://doi.org/10.1145/3298689.3346996, without the correction for item frequency.

    Shape:
        scores ``(B, B)``, column b belonging to ``items[b]``; items ``(B,)`` -> ``(B,)``

    >>> in_batch_softmax(torch.zeros(2, 2), torch.tensor([4, 7]))
    tensor([0.6931, 0.6931])
    """
    others = (items[:, None] == items[None, :]) & ~torch.eye(len(items), dtype=torch.bool, device=items.device)
    return torch.logsumexp(scores.masked_fill(others, float("-inf")), dim=1) - scores.diagonal()


def logistic(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Binary cross entropy of labels that are 0 or 1.

    .. math:: \log(1 + e^{z_b}) - y_b z_b

    Shape:
        logits ``(B,)``, labels ``(B,)`` -> ``(B,)``

    >>> logistic(torch.tensor([0.0]), torch.tensor([1.0]))
    tensor([0.6931])
    """
    return softplus(logits) - labels.to(logits.dtype) * logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross entropy of a label that is one of K classes.

    .. math:: \log \sum_k e^{z_{bk}} - z_{b y_b}

    Shape:
        logits ``(B, K)``, labels ``(B,)``, 0 .. K-1 -> ``(B,)``

    >>> cross_entropy(torch.zeros(1, 10), torch.tensor([3]))
    tensor([2.3026])
    """
    # The label's logit is picked by a mask: a gather's gradient is a scatter, which device engines get wrong.
    own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)[None, :]
    return torch.logsumexp(logits, dim=1) - torch.where(own, logits, 0.0).sum(dim=1)


RANKING: dict[str, Loss] = {"sampled_softmax": sampled_softmax, "bce": bce}
"""The losses over sampled negatives, by their name in a recipe."""

LABELLING: dict[str, Loss] = {"bce": logistic, "cross_entropy": cross_entropy}
"""The losses of labelled examples, by their name in a recipe."""


def check_labels(loss: str, num_classes: int) -> None:
    """Refuse a loss that does not fit the labels: 0 and 1 (``num_classes`` 0), or one of so many classes.

    Raises:
        RecipeError: it is for labels of the other kind.
    """
    fitting = "cross_entropy" if num_classes else "bce"
    if loss in LABELLING and loss != fitting:
        labels = f"one of {num_classes} classes" if num_classes else "0 or 1"
        raise RecipeError(
            f"local.loss = {loss!r} does not fit this data, whose labels are {labels}: set local.loss = {fitting!r}, "
            f"or choose another data set"
        )


def loss_of(losses: Mapping[str, Loss], name: str) -> Loss:
    """The loss of that name. Raises RecipeError, with the reason where there is one to give."""
    if name in losses:
        return losses[name]
    if name == "in_batch_softmax" and losses is RANKING:
        raise RecipeError(
            f"local.loss = {name!r} cannot be trained on clients that are single users: the other items of a user's "
            f"batch are items that the same user chose, so its in-batch negatives would be its own positives. Use "
            f"local.loss = 'sampled_softmax' (or 'bce'), or mode = 'standalone', where a batch holds many users"
        )
    raise RecipeError(f"local.loss = {name!r} is not for this model and data; there are {', '.join(losses)}")
