"""Jagged arrays: client ``c`` owns the entries ``offsets[c]:offsets[c + 1]``; and Encoded, bytes that are kept so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import ShapeMismatch

IntArray = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """One parameter of C clients (or their rows of one table) as bytes of a named codec; the transform that made them
    gives back the parameter.

    Shape:
        ``offsets`` (C+1,), ``payload`` (N,) uint8; decoded, the parameter is (C, *shape), and one row is ``shape``.
    """

    codec: str
    shape: tuple[int, ...]
    offsets: IntArray
    payload: Bytes

    def __post_init__(self) -> None:
        if self.payload.dtype != np.uint8 or self.payload.ndim != 1:
            raise ShapeMismatch(
                f"the payload of codec {self.codec!r} must be (N,) of uint8, but it is {self.payload.shape} of "
                f"{self.payload.dtype}"
            )
        refuse_offsets(self.offsets, len(self.payload), f"bytes of codec {self.codec!r}")

    @classmethod
    def of(cls, codec: str, shape: tuple[int, ...], parts: list[bytes]) -> Encoded:
        """The bytes of each client, one after the other."""
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return cls(codec, shape, offsets, np.frombuffer(b"".join(parts), dtype=np.uint8))

    @property
    def sizes(self) -> IntArray:
        """Bytes of each client as they are sent, (C,): its payload, and 32 bits for how long that is."""
        return np.diff(self.offsets) + 4

    def part(self, client: int) -> Bytes:
        """The bytes of the client at position ``client``."""
        return self.payload[self.offsets[client] : self.offsets[client + 1]]

    def pick(self, positions: IntArray) -> Encoded:
        """The clients at ``positions``, in that order."""
        offsets, entries = pick(self.offsets, positions)
        return Encoded(self.codec, self.shape, offsets, self.payload[entries])


def pick(offsets: IntArray, positions: IntArray) -> tuple[IntArray, IntArray]:
    """Offsets (n+1,) of the clients at ``positions`` (n,) on their own, and where their entries lie, (R,).

    >>> offsets, entries = pick(np.array([0, 2, 2, 5]), np.array([2, 0]))
    >>> offsets.tolist(), entries.tolist()
    ([0, 3, 5], [2, 3, 4, 0, 1])
    """
    lengths = np.diff(offsets)[positions]
    chosen = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.arange(chosen[-1], dtype=np.int64) + np.repeat(offsets[:-1][positions] - chosen[:-1], lengths)
    return chosen, entries


def stack_offsets(parts: list[IntArray]) -> IntArray:
    """The offsets of blocks that are laid one after the other."""
    lengths: NDArray[Any] = np.concatenate([np.diff(offsets) for offsets in parts])
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def refuse_offsets(offsets: IntArray, size: int, what: str) -> None:
    """Raise ShapeMismatch unless the offsets rise from 0 to ``size``."""
    ends = offsets[[0, -1]].tolist() if len(offsets) else []
    if ends != [0, size] or np.any(offsets[1:] < offsets[:-1]):
        raise ShapeMismatch(
            f"the offsets of {size} {what} must rise from 0 to {size}, but they are {offsets[:5].tolist()}... and end "
            f"at {ends[-1:]}"
        )
