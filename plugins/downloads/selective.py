"""Selective download: each round only those parameters go down that have moved most since they last did.

The theta_d of Selective SGD (Shokri and Shmatikov, 2015, https://doi.org/10.1145/2810103.2813687, section 5). There
each participant keeps old values of its own, and takes a share of the server's into them. Here all devices hold the
same: what has been published. To that each round publishes the values of the share that differs most from the server's;
the rest is not lost, it waits, as in the server's half of DoubleSqueeze (Tang et al., 2019,
https://arxiv.org/abs/1905.05957). A device that was away takes whatever was published meanwhile, and so more than a
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Bytes
from fedtower.core.registry import Registry
from fedtower.core.sparse import decode_places, encode_places, largest, num_kept

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Selective:
    """The values of the entries that differ most from what is held, over all parameters as one vector. An entry that is
    as it should be is never sent, so what is held comes to what the server has when that stands still.
    """

    share: float = field(
        default=0.1,
        metadata={"help": "theta_d: of all entries of the shared parameters, each round; rows come as they are"},
    )
    differences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"download.share must be above 0 and at most 1, not {self.share}")

    def encode(
        self, wanted: Mapping[str, FloatArray], held: Mapping[str, FloatArray], round: int, draws: Draws
    ) -> Mapping[str, Bytes]:
        names = sorted(wanted)  # a checkpoint may give them back in another order
        new, old = (np.concatenate([np.ravel(each[name]) for name in names]) for each in (wanted, held))
        chosen = largest((new - old)[None], num_kept(len(new), self.share))[0] & (new != old)
        ends = np.cumsum([wanted[name].size for name in names])[:-1]
        parts = zip(names, np.split(new, ends), np.split(chosen, ends), strict=True)
        return {name: _message(values, mask) for name, values, mask in parts}

    def decode(self, message: Bytes, shape: tuple[int, ...], held: FloatArray | None) -> FloatArray:
        if held is None:
            raise UpdateError("a selective download changes what a device holds, and nothing is held; fetch all of it")
        if held.shape != shape:
            raise UpdateError(f"a parameter of shape {shape} was to be changed, and {held.shape} is what is held")
        if not len(message):
            return held
        places, values = decode_places(message, prod(shape))
        if len(values) != 4 * len(places):
            raise UpdateError(f"{len(places):,} values need {4 * len(places):,} bytes, but {len(values):,} came")
        after = np.array(held, dtype=np.float32).reshape(-1)
        after[places] = np.frombuffer(values.tobytes(), dtype="<f4")
        return after.reshape(shape)


def _message(values: FloatArray, mask: NDArray[np.bool_]) -> Bytes:
    """Places and values of what is chosen; nothing at all, if nothing is."""
    places = np.flatnonzero(mask)
    data = encode_places(places, len(values)) + values[places].astype("<f4").tobytes() if len(places) else b""
    return np.frombuffer(data, dtype=np.uint8)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.download(
        "selective",
        "fedtower.plugins.downloads.selective:Selective",
        summary="each round the share of the parameters that has moved most since it last went down",
    )
