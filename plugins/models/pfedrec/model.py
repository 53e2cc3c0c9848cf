"""PFedRec: a score function of each client's own, which never leaves the device, over item vectors that all share.

Zhang et al., 2023, https://www.ijcai.org/proceedings/2023/507. Its second personalisation, item vectors that each
client has tuned before it is judged, is ``evaluation.personal = true``. The paper steps the score function and then the
items on every batch; here one step moves both, from the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtower.core.errors import RecipeError
from fedtower.recsys.models import Declared, ExampleSchema, PlainRows, Schema, SequenceTower, Table, as_sequences


@dataclass(frozen=True)
class PFedRec:
    """Item table in the cloud; one linear layer on each device, from an item's vector to a logit.

    There are no shared parameters: all that devices send is deltas of the rows that they touched.
    """

    dim: int = field(default=32, metadata={"help": "width of the item vectors, a multiple of 4"})
    scale: float = field(default=0.1, metadata={"help": "standard deviation of the item table's first values"})

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise RecipeError(f"model.dim must be a positive multiple of 4, not {self.dim}")
        if not self.scale > 0:
            raise RecipeError(f"model.scale must be above 0, or nothing is ever learnt; it is {self.scale}")

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema = as_sequences(schema, "pfedrec")
        return Declared(
            tables=(Table("item", schema.num_items, self.dim, self.scale),),
            cloud=PlainRows(self.dim),
            shared=ScoreFunction(self.dim, generator),
            on_device=("weight", "bias"),
        )


class ScoreFunction(SequenceTower):
    """``w . row + b``: how much this client likes an item, whatever it has seen before."""

    def __init__(self, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(1))

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        """Weight and bias, for every target: ``(B, D + 1)``."""
        return torch.cat([self.weight, self.bias])[None, :].expand(len(target), -1)

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        return vectors[:, :-1] @ rows.T + vectors[:, -1:]

    def queries(self, vectors: Tensor) -> Tensor:
        """The score function as it is, its bias last."""
        return vectors

    def keys(self, rows: Tensor) -> Tensor:
        """A one after each row, for the bias: ``(n, D + 1)``."""
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
