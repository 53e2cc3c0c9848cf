"""Central: a batch of many clients at once, where the data is the cloud's to see, and the mean loss over it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedtower.core.runtime import Work
from fedtower.recsys.models import SharedTower
from fedtower.recsys.step import Tensors, pure

IntArray = NDArray[np.int64]


def common_rows(work: Work) -> tuple[IntArray, dict[str, IntArray]]:
    """The distinct rows of a whole batch, (n,), and each slot's place among them, (C, slots)."""
    needed = next(iter(work.row_ids.values()))
    items, inverse = np.unique(needed.ids, return_inverse=True)
    return items, {
        name: inverse[needed.offsets[:-1].reshape(-1, *[1] * (places.ndim - 2)) + places[:, 0]]
        for name, places in work.slots.items()
    }


def mean_loss(
    tower: SharedTower,
    loss: str,
    shared: Tensors,
    own: Tensors,
    slots: Mapping[str, Tensor],
    inputs: Tensors,
    total: float | None = None,
) -> Tensor:
    """The mean loss over all examples of a batch, by weight, ``()``; of a share of a batch of weight ``total``, its
    part of that mean.

    Shape:
        ``shared[name]`` (*shape), everybody's; ``own[name]`` (C, *shape), each client's; ``slots[name]`` (C, *slots, W)
        rows; ``inputs[name]`` (C, *shape), ``weight`` (C, B) among them.
    """
    # vmap pairs the entries of two dictionaries by their order: both begin with the shared ones.
    axes = {**dict.fromkeys(shared), **dict.fromkeys(own, 0)}
    losses = pure(tower, "losses")

    def of_client(parameters: Tensors, slots: Tensors, inputs: Tensors) -> Tensor:
        return losses(parameters, slots, inputs, loss)

    each = vmap(of_client, in_dims=(axes, 0, 0))({**shared, **own}, slots, inputs)
    mean: Tensor = (each * inputs["weight"]).sum() / (inputs["weight"].sum() if total is None else total)
    return mean
