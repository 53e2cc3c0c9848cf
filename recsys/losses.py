"""Training losses: how badly a model ranks what a user chose among what she did not, one value an example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

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


LOSSES: dict[str, Loss] = {"sampled_softmax": sampled_softmax, "bce": bce}
"""The losses over sampled negatives, by their name in a recipe."""
