"""MLP: fully connected layers with ReLU between them.

With two hidden layers of 200 it is the 2NN of McMahan et al., 2017, https://arxiv.org/abs/1602.05629, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtower.core.errors import RecipeError
from fedtower.recsys.models import Declared, ExampleSchema, ExampleTower, Schema, as_dense, layers, linear


@dataclass(frozen=True)
class MLP:
    """Shared layers and nothing else: numbers or an image in, a logit or one of each class out."""

    hidden: tuple[int, ...] = field(default=(128, 64), metadata={"help": "widths of the hidden layers"})

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise RecipeError(f"model.hidden must be widths from 1 on, not {list(self.hidden)}")

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema = as_dense(schema, "mlp")
        return Declared(shared=Layers(schema.num_dense, self.hidden, schema.num_classes, generator))


class Layers(ExampleTower):
    """Hidden layers, and a linear one."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.is_binary = num_classes == 0
        self.hidden = layers((inputs, *hidden), generator)
        self.out = linear((inputs, *hidden)[-1], max(num_classes, 1), generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.out(self.hidden(inputs["dense"].flatten(1)))
        return logits[:, 0] if self.is_binary else logits
