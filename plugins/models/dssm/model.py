"""DSSM: a user tower on the device, an item tower in the cloud, and their dot product.

Huang et al., 2013, https://doi.org/10.1145/2505515.2505665, the two towers; the user tower pools the history over
several windows, so that the newest items are seen apart, as in Covington et al., 2016,
https://doi.org/10.1145/2959100.2959190, who pool it whole. Scores are dot products plus an item bias, not cosines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtower.core.errors import RecipeError
from fedtower.recsys.models import (
    CloudTower,
    Declared,
    ExampleSchema,
    Schema,
    SequenceTower,
    Table,
    as_sequences,
    linear,
)


@dataclass(frozen=True)
class DSSM:
    """Item table and item tower in the cloud, user tower shared, and on request a vector of each user's own on her
    device.

    History items and target items are rows of the same table.
    """

    dim: int = field(default=64, metadata={"help": "width of user and item vectors, a multiple of 4"})
    hidden: int = field(default=128, metadata={"help": "width of the user tower's hidden layer"})
    windows: tuple[int, ...] = field(
        default=(20, 5, 1),
        metadata={"help": "pool the newest so many items, each apart; the whole history is always pooled"},
    )
    item_hidden: int = field(
        default=0, metadata={"help": "width of the item tower's hidden layer; 0: row plus linear features"}
    )
    user_vector: bool = field(
        default=False, metadata={"help": "a vector of each user's own, which never leaves the device"}
    )
    scale: float = field(default=0.05, metadata={"help": "standard deviation of the item table's first values"})

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise RecipeError(f"model.dim must be a positive multiple of 4, not {self.dim}")
        for name, value, least in (("hidden", self.hidden, 1), ("item_hidden", self.item_hidden, 0)):
            if value < least:
                raise RecipeError(f"model.{name} must be at least {least}, not {value}")
        if not self.scale >= 0:
            raise RecipeError(f"model.scale is a standard deviation, so it cannot be {self.scale}")
        if any(window < 1 for window in self.windows):
            raise RecipeError(f"model.windows must be numbers of items from 1 on, not {list(self.windows)}")

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema = as_sequences(schema, "dssm")
        windows = (schema.history_length, *(window for window in self.windows if window < schema.history_length))
        return Declared(
            tables=(
                Table("item", schema.num_items, self.dim, self.scale),
                Table(
                    "item_bias", schema.num_items, 4, 0.0
                ),  # four is the narrowest table there is; the first column is used
            ),
            cloud=ItemTower(self.dim, schema.num_item_features, self.item_hidden, generator),
            shared=UserTower(self.dim, schema.num_user_features, self.hidden, windows, self.user_vector, generator),
            on_device=("user_vector",) if self.user_vector else (),
        )


class ItemTower(CloudTower):
    """An item's vector and bias from its row and its features: ``row + W features``, or ``row + MLP(row, features)``.

    Shape:
        rows ``(n, D + 4)``, features ``(n, F)`` -> ``(n, D + 1)``, the bias last
    """

    def __init__(self, dim: int, num_features: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim, self.width = dim, dim + 1
        if hidden:
            self.residual = nn.Sequential(
                linear(dim + num_features, hidden, generator), nn.ReLU(), linear(hidden, dim, generator)
            )
        else:
            self.features = nn.Parameter(torch.zeros(num_features, dim))
        self.hidden = hidden

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        vector, bias = rows[:, : self.dim], rows[:, self.dim : self.dim + 1]
        if self.hidden:
            vector = vector + self.residual(torch.cat([vector, features], dim=1))
        else:
            vector = vector + features @ self.features
        return torch.cat([vector, bias], dim=1)


class UserTower(SequenceTower):
    """A user's vector from pools of her history: a small network on them, plus a weighted sum of them as they are."""

    def __init__(
        self,
        dim: int,
        num_features: int,
        hidden: int,
        windows: tuple[int, ...],
        user_vector: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.dim, self.windows = dim, windows
        self.first = linear(len(windows) * dim + num_features, hidden, generator)
        self.second = linear(hidden, dim, generator)
        self.mixture = nn.Parameter(torch.full((len(windows),), 1.0 / len(windows)))
        self.user_vector = nn.Parameter(torch.zeros(dim)) if user_vector else None

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        age = (
            target[:, None] - torch.arange(history.shape[0], device=history.device)[None, :]
        )  # 1 for the item just before
        vectors = history[:, : self.dim]
        pools = []
        for window in self.windows:
            seen = ((age >= 1) & (age <= window)).to(history.dtype)
            pools.append((seen @ vectors) / seen.sum(dim=1, keepdim=True).clamp(min=1.0))
        features = user[None, :].expand(len(target), -1)
        vector: Tensor = self.second(torch.relu(self.first(torch.cat([*pools, features], dim=1))))
        vector = vector + sum(weight * pool for weight, pool in zip(self.mixture, pools, strict=True))
        return vector if self.user_vector is None else vector + self.user_vector

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        return vectors @ rows[:, : self.dim].T + rows[:, self.dim]

    def queries(self, vectors: Tensor) -> Tensor:
        """A one after each vector, for the items' biases: ``(B, D)`` -> ``(B, D + 1)``."""
        return torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)

    def keys(self, rows: Tensor) -> Tensor:
        """The rows as they are, the bias last: ``(n, D + 1)``."""
        return rows
