"""Wide & Deep: a linear model that remembers, beside a network that generalises.

Cheng et al., 2016, https://arxiv.org/abs/1606.07792, section 3, without cross products of features: the file of
clicks names none. Both parts are trained together, on the sum of their logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtower.core.errors import RecipeError
from fedtower.recsys.models import (
    CloudTower,
    Declared,
    ExampleSchema,
    ExampleTower,
    Schema,
    Table,
    as_clicks,
    layers,
    linear,
)


@dataclass(frozen=True)
class WideDeep:
    """Two tables in the cloud, an embedding and a weight of every category; what adds them up is shared."""

    dim: int = field(default=16, metadata={"help": "width of a category's embedding, a multiple of 4"})
    hidden: tuple[int, ...] = field(default=(64, 32), metadata={"help": "widths of the network's hidden layers"})
    scale: float = field(default=0.05, metadata={"help": "standard deviation of the embeddings' first values"})

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise RecipeError(f"model.dim must be a positive multiple of 4, not {self.dim}")
        if any(width < 1 for width in self.hidden):
            raise RecipeError(f"model.hidden must be widths from 1 on, not {list(self.hidden)}")

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema = as_clicks(schema, "wide_deep")
        return Declared(
            tables=(
                Table("category", schema.num_rows, self.dim, self.scale),
                # Four is the narrowest table there is; the first column is used.
                Table("wide", schema.num_rows, 4, 0.0),
            ),
            cloud=EmbeddingAndWeight(self.dim),
            shared=WideAndDeep(schema.num_dense, len(schema.cardinalities), self.dim, self.hidden, generator),
            source="category",
        )


class EmbeddingAndWeight(CloudTower):
    """A category's row: its embedding, and its weight last. ``(n, D + 4) -> (n, D + 1)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim + 1

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        return rows[:, : self.width]


class WideAndDeep(ExampleTower):
    """The weights of the categories and a linear map of the numbers, plus a network on embeddings and numbers."""

    def __init__(
        self, num_dense: int, num_fields: int, dim: int, hidden: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.dim = dim
        self.wide = linear(num_dense, 1, generator)
        self.deep = layers((num_dense + num_fields * dim, *hidden), generator)
        self.out = linear((num_dense + num_fields * dim, *hidden)[-1], 1, generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        rows, dense = slots["category"], inputs["dense"].flatten(1)
        embeddings, weights = rows[..., : self.dim], rows[..., self.dim]
        hidden = self.deep(torch.cat([dense, embeddings.flatten(1)], dim=1))
        logits: Tensor = weights.sum(dim=1) + self.wide(dense)[:, 0] + self.out(hidden)[:, 0]
        return logits
