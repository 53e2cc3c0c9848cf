"""Quantised download: every shared parameter in 8 or 4 bits a number, and a scale for each 512 of them.

QSGD's rounding (:mod:`fedtower.core.buckets`) of the parameters themselves, as MCM has it without its memory
(Philippenko and Dieuleveut, 2021, https://arxiv.org/abs/2102.12528): clients begin with what the bits say, and the
server keeps its own. Rows of tables are fetched by id, and come as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.buckets import Buckets
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Bytes
from fedtower.core.registry import Registry

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Quantize:
    """Every round all parameters anew; a round draws how they are rounded, once for all devices.

    ``stochastic`` is right on average over rounds; ``nearest`` is off by half a step at most, and always to the same
    side while a parameter stands still.
    """

    bits: Literal[8, 4] = field(default=8, metadata={"help": "of each number of a parameter; rows come as they are"})
    rounding: Literal["stochastic", "nearest"] = field(
        default="stochastic", metadata={"help": "right on average over the rounds, or as near as can be"}
    )
    differences: ClassVar[bool] = False

    def encode(
        self, wanted: Mapping[str, FloatArray], held: Mapping[str, FloatArray], round: int, draws: Draws
    ) -> Mapping[str, Bytes]:
        return {name: self._message(name, value, round, draws) for name, value in wanted.items()}

    def decode(self, message: Bytes, shape: tuple[int, ...], held: FloatArray | None) -> FloatArray:
        size = prod(shape)
        if len(message) != self._buckets.length(size):
            raise UpdateError(
                f"a parameter of shape {shape} has {self._buckets.length(size):,} bytes in {self.bits} bits a number, "
                f"but {len(message):,} came; was it cut, or encoded with other settings?"
            )
        return self._buckets.decode(message[None], size).reshape(shape)

    @property
    def _buckets(self) -> Buckets:
        return Buckets(self.bits, nearest=self.rounding == "nearest")

    def _message(self, name: str, value: FloatArray, round: int, draws: Draws) -> Bytes:
        lots: NDArray[np.float64] | float = 0.5
        if self.rounding == "stochastic":
            lots = draws.uniform(f"rounding/{name}", round, np.arange(value.size, dtype=np.int64))[None]
        message: Bytes = self._buckets.encode(value.reshape(1, -1), lots)[0]
        return message


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.download(
        "quantize",
        "fedtower.plugins.downloads.quantize:Quantize",
        summary="every shared parameter in 8 or 4 bits a number",
    )
