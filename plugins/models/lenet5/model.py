"""LeNet-5: two convolutions with pooling, three fully connected layers.

LeCun et al., 1998, https://doi.org/10.1109/5.726791, section II.B, with what has become usual: ReLU for the scaled
tanh, plain averages for the subsampling with two learnt numbers, all maps of the second convolution connected to all of
the first, and a linear last layer for the radial basis functions. 61,706 parameters for 28 x 28 images of ten classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fedtower.recsys.models import Declared, ExampleSchema, ExampleTower, Schema, as_images, convolution, layers, linear


@dataclass(frozen=True)
class LeNet5:
    """Everything is shared. Images of 28 x 28 are padded to the paper's 32 x 32."""

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        schema, (channels, height, width) = as_images(schema, "lenet5", smallest=12)
        return Declared(shared=Network(channels, height, width, schema.num_classes, generator))


class Network(ExampleTower):
    """6 maps and 16 maps of 5 x 5, each averaged over 2 x 2; 120, 84, and the classes."""

    def __init__(self, channels: int, height: int, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = convolution(channels, 6, 5, generator, padding=2)
        self.second = convolution(6, 16, 5, generator)
        size = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        self.hidden = layers((size, 120, 84), generator)
        self.out = linear(84, num_classes, generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        images = inputs["dense"]
        maps = images if images.dim() == 4 else images[:, None]
        for convolve in (self.first, self.second):
            maps = avg_pool2d(torch.relu(convolve(maps)), 2)
        logits: Tensor = self.out(self.hidden(maps.flatten(1)))
        return logits
