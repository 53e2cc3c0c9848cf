"""Packing: small whole numbers as bits of bytes, blocks of equally long messages, and what a codec made found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Bytes, Encoded
from fedtower.core.transform import ROWS
from fedtower.core.updates import Rows, Updates

FloatArray = NDArray[np.float32]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits each take.

    >>> packed_bytes(5, 2)
    2
    """
    return -(-count * bits // 8)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Numbers below 2^bits as bytes, the first in the lowest bits; what is left of the last byte is zero.

    Shape:
        ``codes`` (C, n) uint8, ``bits`` 1, 2, 4 or 8 -> (C, ceil(n bits / 8)) uint8.

    >>> pack(np.array([[1, 2, 3]], dtype=np.uint8), 4).tolist()
    [[33, 3]]
    """
    a_byte = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % a_byte)))
    groups: Bytes = padded.reshape(len(codes), padded.shape[1] // a_byte, a_byte)
    shifts = np.arange(a_byte, dtype=np.uint8) * np.uint8(bits)
    return np.asarray(np.bitwise_or.reduce(groups << shifts, axis=2), dtype=np.uint8)


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The ``count`` numbers of each line that :func:`pack` packed, (C, count)."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), packed.shape[1] * (8 // bits))[:, :count]


def as_bytes(values: FloatArray) -> Bytes:
    """32-bit floats as little-endian bytes, (C, n) -> (C, 4n)."""
    flat = np.ascontiguousarray(values, dtype="<f4")
    return flat.view(np.uint8).reshape(len(flat), 4 * flat.shape[1])


def as_floats(data: Bytes) -> FloatArray:
    """What :func:`as_bytes` was given, (C, 4n) -> (C, n)."""
    return np.ascontiguousarray(data).view("<f4").astype(np.float32)


def encoded(codec: str, shape: tuple[int, ...], messages: Bytes) -> Encoded:
    """Messages of one length, (C, length), as an :class:`Encoded`."""
    count, length = messages.shape
    return Encoded(codec, shape, np.arange(count + 1, dtype=np.int64) * length, messages.reshape(-1))


def messages(part: Encoded, length: int) -> Bytes:
    """The messages of a codec whose messages are all ``length`` bytes long, (C, length).

    Raises:
        UpdateError: one of them is not.
    """
    sizes = np.diff(part.offsets)
    if np.any(sizes != length):
        raise UpdateError(
            f"a delta of shape {part.shape} has {length:,} bytes in the codec {part.codec!r}, but "
            f"{int(sizes[sizes != length][0]):,} came; was it cut, or encoded with other settings?"
        )
    return part.payload.reshape(len(sizes), length)


def decoded(
    block: Updates,
    codec: str,
    delta: Callable[[Encoded], FloatArray],
    rows: Callable[[Encoded], Rows] | None = None,
) -> Updates:
    """The block with what is of this codec decoded, by one function for deltas and one for rows; the rest stays.

    Raises:
        UpdateError: rows of a table that are there twice, or that this codec does not have.
    """
    ours = {name: part for name, part in block.encoded.items() if part.codec == codec}
    dense = {name: delta(part) for name, part in ours.items() if rows is None or not name.startswith(ROWS)}
    tables = {} if rows is None else {n.removeprefix(ROWS): rows(p) for n, p in ours.items() if n.startswith(ROWS)}
    for table in tables.keys() & block.rows.keys():
        raise UpdateError(
            f"{block.who()} sent rows of {table!r} both encoded and not, and only one of them can be meant"
        )
    others = {name: part for name, part in block.encoded.items() if name not in ours}
    return replace(block, dense={**block.dense, **dense}, rows={**block.rows, **tables}, encoded=others)
