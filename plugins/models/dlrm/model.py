"""DLRM: numbers become a vector like those of the categories, and all vectors meet each other in dot products.

Naumov et al., 2019, https://arxiv.org/abs/1906.00091, section 2; each unordered pair once, no vector with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtower.core.errors import RecipeError
from fedtower.recsys.models import (
    Declared,
    ExampleSchema,
    ExampleTower,
    PlainRows,
    Schema,
    Table,
    as_clicks,
    layers,
    linear,
)


@dataclass(frozen=True)
class DLRM:
    """One table in the cloud, an embedding of every category; both networks are shared."""

    dim: int = field(default=16, metadata={"help": "width of every vector, a multiple of 4"})
    bottom: tuple[int, ...] = field(
        default=(64,), metadata={"help": "widths of the hidden layers from the numbers to their vector"}
    )
    top: tuple[int, ...] = field(
        default=(64, 32), metadata={"help": "widths of the hidden layers from the dot products to the logit"}
    )
    scale: float = field(default=0.05, metadata={"help": "standard deviation of the embeddings' first values"})

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise RecipeError(f"model.dim must be a positive multiple of 4, not {self.dim}")
        for name in ("bottom", "top"):
            if any(width < 1 for width in getattr(self, name)):
                raise RecipeError(f"model.{name} must be widths from 1 on, not {list(getattr(self, name))}")

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema = as_clicks(schema, "dlrm")
        return Declared(
            tables=(Table("category", schema.num_rows, self.dim, self.scale),),
            cloud=PlainRows(self.dim),
            shared=Interaction(schema.num_dense, len(schema.cardinalities), self.dim, self.bottom, self.top, generator),
            source="category",
        )


class Interaction(ExampleTower):
    """``top(v_0, <v_i, v_j> for i < j)``, where ``v_0 = bottom(numbers)`` and the others are the categories' rows."""

    def __init__(
        self,
        num_dense: int,
        num_fields: int,
        dim: int,
        bottom: tuple[int, ...],
        top: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        first = dim + num_fields * (num_fields + 1) // 2
        self.bottom = layers((num_dense, *bottom, dim), generator)
        self.top = layers((first, *top), generator)
        self.out = linear((first, *top)[-1], 1, generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        dense: Tensor = self.bottom(inputs["dense"].flatten(1))
        products = dot_products(torch.cat([dense[:, None, :], slots["category"]], dim=1))
        logits: Tensor = self.out(self.top(torch.cat([dense, products], dim=1)))[:, 0]
        return logits


def dot_products(vectors: Tensor) -> Tensor:
    """The dot product of each unordered pair of vectors once, in the order of :func:`pairs`.

    Picking a triangle out of their matrix by index has a scatter for its gradient, which device engines get wrong. So
    the triangle is cut into a rectangle, first half against second half, and two smaller triangles, which fold into
    another rectangle: slices, and one mask.

    Shape:
        ``(B, n, D)`` -> ``(B, n (n - 1) / 2)``
    """
    count = vectors.shape[1]
    half, rest = (count + 1) // 2, count // 2
    products = vectors @ vectors.transpose(1, 2)
    row = torch.arange(half - 1, device=vectors.device)[:, None]
    column = torch.arange(rest, device=vectors.device)[None, :]
    folded = torch.where(column > row, products[:, half : 2 * half - 1, half:], products[:, 1:half, :rest])
    return torch.cat([products[:, :half, half:].flatten(1), folded.flatten(1)], dim=1)


def pairs(count: int) -> list[tuple[int, int]]:
    """Which two of ``count`` vectors each of the dot products is of.

    >>> pairs(4)
    [(0, 2), (0, 3), (1, 2), (1, 3), (1, 0), (2, 3)]
    """
    half, rest = (count + 1) // 2, count // 2
    between = [(row, half + column) for row in range(half) for column in range(rest)]
    within = [
        (half + row, half + column) if column > row else (1 + row, column)
        for row in range(half - 1)
        for column in range(rest)
    ]
    return between + within
