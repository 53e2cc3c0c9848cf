"""What a model declares: tables and towers with a Placement; everything that trains or serves it is written elsewhere,
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtower.core.errors import FedtowerError


@dataclass(frozen=True)
class Schema:
    """What a model has to know of the data: sizes only."""

    num_items: int
    num_user_features: int
    num_item_features: int
    history_length: int


@dataclass(frozen=True)
class Table:
    """An embedding table in the cloud, drawn from a normal distribution with deviation ``scale``; ``dim`` is a
    multiple of 4.
    """

    name: str
    num_rows: int
    dim: int
    scale: float

    def __post_init__(self) -> None:
        if self.dim % 4 or self.dim < 4:
            raise FedtowerError(
                f"the table {self.name!r} has dimension {self.dim}, but the tables' kernels need a multiple of 4; "
                f"round it up and let the "
                f"tower use what it needs"
            )


class CloudTower(nn.Module):
    """Computes the rows that devices see from the rows of tables: ``forward(rows (n, sum of dims), features (n, F)) ->
    (n, W)``.
    """

    width: int

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        """The rows as devices see them."""
        raise NotImplementedError


class SharedTower(nn.Module):
    """What trains on the device: from a history of rows to user vectors, and from those to scores.

    One call is one step's batch: B targets in one stretch of T events. Everything that is drawn or learnt is in the
    parameters; a tower has no buffers, no dropout, and does not know how it is run.
    """

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        """The user as seen by each target: only the slots before ``target[b]`` may be looked at.

        Shape:
            history ``(T, W)``, oldest first; target ``(B,)``, 0 .. T; user ``(F,)`` -> ``(B, D)``
        """
        raise NotImplementedError

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """How well each item suits each user vector.

        Shape:
            vectors ``(B, D)``, rows ``(n, W)`` -> ``(B, n)``
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Declared:
    """A model's parts: tables and a tower in the cloud behind the rows of ``item``, a tower on the device.

    ``on_device`` names the parameters of ``shared`` that are each client's own and never leave it.
    """

    tables: tuple[Table, ...]
    cloud: CloudTower
    shared: SharedTower
    on_device: tuple[str, ...] = field(default=())

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """The shared parameters: what a plan carries."""
        return {name: array(value) for name, value in self.shared.named_parameters() if name not in self.on_device}

    def device_parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """The first value of the parameters that live on devices."""
        return {name: array(value) for name, value in self.shared.named_parameters() if name in self.on_device}


class Model(Protocol):
    """The seam of a model plugin: a frozen dataclass of settings that declares its parts for a data set."""

    def declare(self, schema: Schema, generator: torch.Generator) -> Declared:
        """Tables and towers, initialised from ``generator`` alone."""
        ...


def array(value: Tensor) -> NDArray[np.float32]:
    """A tensor's values, copied to numpy."""
    return value.detach().to("cpu", torch.float32).numpy().copy()


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, initialised as torch does (He et al., 2015, uniform), but from a generator that is handed in."""
    layer = nn.Linear(inputs, outputs)
    bound = 1.0 / max(inputs, 1) ** 0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
