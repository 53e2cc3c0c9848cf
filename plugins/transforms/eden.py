"""A random rotation before quantising: what is rotated is nearly normal, and a normal's best few values fit it.

Vargaftik et al., 2022, https://arxiv.org/abs/2108.08842 (EDEN) with its unbiased scale; with one bit it is DRIVE
(Vargaftik et al., 2021, https://arxiv.org/abs/2105.08339). The rotation is a Hadamard transform of random signs, as in
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Bytes, Encoded
from fedtower.core.packing import as_bytes, as_floats, decoded, encoded, messages, pack, packed_bytes, unpack
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.transform import visit_keys
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

LARGEST = 4096
"""Entries that are rotated together at most. A larger parameter is cut into equal pieces, not padded to a power of two
above it, and a scale of 32 bits is a hundredth of a bit an entry."""

# The centroids of a standard normal with the least mean squared error, above zero: Max, 1960, table I.
CENTROIDS: Mapping[int, tuple[float, ...]] = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


@dataclass(frozen=True)
class Eden:
    r"""Each parameter :math:`x` as :math:`S\,R^{-1} Q(R x)`: rotated by :math:`R`, every entry put to the nearest of
    :math:`2^b` values :math:`Q`, and scaled by :math:`S = \lVert x \rVert^2 / \langle R x, Q(R x) \rangle`, with which
    the component along :math:`x` is exact, and the mean over all rotations :math:`x`. Over those that a Hadamard
    transform can make it is that nearly: a few entries far above all others come out some per cent smaller.

    Each client draws a rotation of its own for each parameter and sends its seed (32 bits). Rows of tables stay as they
    are: they are too short for a rotation to make them normal.
    """

    bits: Literal[1, 2, 4] = field(default=1, metadata={"help": "of each number, after the rotation"})

    @property
    def codec(self) -> str:
        """What the bytes are called."""
        return f"eden{self.bits}"

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        rounds, clients = visit_keys(updates)
        sent = {}
        for name, delta in updates.dense.items():
            seeds = draws.integers(2**31, f"rotation/{name}", rounds, clients)
            sent[name] = encoded(self.codec, delta.shape[1:], self._messages(delta.reshape(len(delta), -1), seeds))
        return replace(updates, dense={}, encoded={**updates.encoded, **sent}), state

    def decode(self, block: Updates) -> Updates:
        return decoded(block, self.codec, self._delta_of)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total

    def _messages(self, flat: FloatArray, seeds: IntArray) -> Bytes:
        """The seed, the scales and the codes of each line of (C, n)."""
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite has no scale, and is refused
            rotated = _hadamard(_signed(_pieces(flat), seeds))
            lengths = np.sqrt(np.square(rotated).sum(axis=2, keepdims=True))
        usable = np.isfinite(lengths) & (lengths > 0)
        stretch = np.sqrt(rotated.shape[2])
        normal = np.where(usable, rotated, 0.0) / np.where(usable, lengths, 1.0) * stretch
        codes = np.searchsorted(self._edges, normal).astype(np.uint8)
        # Every value has the sign of its entry, so the inner product is zero for nobody who is not zero.
        products = np.where(usable, (normal * self._values[codes]).sum(axis=2, keepdims=True), 1.0)
        scales = np.where(usable, lengths * stretch / products, np.where(lengths == 0, 0.0, np.nan))[:, :, 0]
        lines = pack(codes.reshape(len(flat), -1), self.bits)
        return np.concatenate([_seed_bytes(seeds), as_bytes(scales.astype(np.float32)), lines], axis=1)

    def _delta_of(self, part: Encoded) -> FloatArray:
        size = prod(part.shape)
        pieces, width = _cut(size)
        heads = 4 + 4 * pieces
        data = messages(part, heads + packed_bytes(pieces * width, self.bits))
        seeds = np.ascontiguousarray(data[:, :4]).view("<u4").astype(np.int64)
        codes = unpack(data[:, heads:], self.bits, pieces * width).reshape(-1, pieces, width)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale that is not finite is for the server to refuse
            turned = _hadamard(self._values[codes] * as_floats(data[:, 4:heads]).astype(np.float64)[:, :, None])
            back = _signed(turned, seeds).reshape(len(data), -1)[:, :size]
            return np.asarray(back, dtype=np.float32).reshape(-1, *part.shape)

    @property
    def _values(self) -> NDArray[np.float64]:
        """The 2^bits values, rising."""
        above = np.array(CENTROIDS[self.bits])
        return np.concatenate([-above[::-1], above])

    @property
    def _edges(self) -> NDArray[np.float64]:
        """Halfway between neighbouring values."""
        return (self._values[1:] + self._values[:-1]) / 2


def _cut(size: int) -> tuple[int, int]:
    """Into how many pieces of what power of two a parameter is cut.

    >>> _cut(84), _cut(48000)
    ((1, 128), (12, 4096))
    """
    pieces = max(-(-size // LARGEST), 1)
    return pieces, 1 << (max(-(-size // pieces), 1) - 1).bit_length()


def _pieces(flat: FloatArray) -> NDArray[np.float64]:
    """(C, n) padded and cut, (C, pieces, width)."""
    pieces, width = _cut(flat.shape[1])
    padded = np.pad(flat.astype(np.float64), ((0, 0), (0, pieces * width - flat.shape[1])))
    return padded.reshape(len(flat), pieces, width)


def _signed(values: NDArray[np.float64], seeds: IntArray) -> NDArray[np.float64]:
    """Each entry times the sign that its client's seed gives its place; twice is once undone."""
    count, pieces, width = values.shape
    words = Draws(0).bits("eden", seeds.reshape(-1, 1), np.arange(-(-pieces * width // 64), dtype=np.int64))
    bits = np.unpackbits(np.ascontiguousarray(words, dtype="<i8").view(np.uint8), axis=1, count=pieces * width)
    return np.where(bits.reshape(count, pieces, width) == 1, -values, values)


def _hadamard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last axis, a power of two, turned by an orthonormal matrix that is its own inverse; n log n."""
    width = values.shape[-1]
    turned, half = values, 1
    while half < width:
        pairs = turned.reshape(*values.shape[:-1], width // (2 * half), 2, half)
        turned = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        half *= 2
    return np.asarray(turned.reshape(values.shape) / np.sqrt(width))


def _seed_bytes(seeds: IntArray) -> Bytes:
    return seeds.astype("<u4").reshape(-1, 1).view(np.uint8).reshape(len(seeds), 4)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "eden",
        "fedtower.plugins.transforms.eden:Eden",
        summary="a random rotation, and then 1, 2 or 4 bits a number",
        capabilities={"encodes": True, "unbiased": True},
    )
