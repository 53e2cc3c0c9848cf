"""CNN: the convolutional network of the FedAvg paper.

McMahan et al., 2017, https://arxiv.org/abs/1602.05629, section 3: 1,663,370 parameters for 28 x 28 images of ten
classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fedtower.recsys.models import Declared, ExampleSchema, ExampleTower, Schema, as_images, convolution, layers, linear


@dataclass(frozen=True)
class CNN:
    """Everything is shared."""

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema, (channels, height, width) = as_images(schema, "cnn", smallest=4)
        return Declared(shared=Network(channels, height, width, schema.num_classes, generator))


class Network(ExampleTower):
    """32 maps and 64 maps of 5 x 5, each followed by the maximum over 2 x 2; 512, and the classes."""

    def __init__(self, channels: int, height: int, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = convolution(channels, 32, 5, generator, padding=2)
        self.second = convolution(32, 64, 5, generator, padding=2)
        self.hidden = layers((64 * (height // 4) * (width // 4), 512), generator)
        self.out = linear(512, num_classes, generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        images = inputs["dense"]
        maps = images if images.dim() == 4 else images[:, None]
        for convolve in (self.first, self.second):
            maps = max_pool2d(torch.relu(convolve(maps)), 2)
        logits: Tensor = self.out(self.hidden(maps.flatten(1)))
        return logits
