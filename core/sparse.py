"""Sparse: the few entries that a sparsifier sends, as places and values; and rows of tables, as ids and messages.

A message is: the coding (1 byte), how many (32 bits), the places, the values (32 bits each). Places are a *bitmap* of
all places, or 32 bits each (*plain*), or the *gaps* between them in as many bits as the widest needs (1 byte says how
many). Each client sends the shortest of the three for each parameter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Bytes, Encoded
from fedtower.core.packing import decoded
from fedtower.core.updates import Rows, Updates

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Mask = NDArray[np.bool_]

BITMAP, PLAIN, GAPS = 0, 1, 2
_HEADER = struct.Struct("<BI")
_SAMPLED = 16  # one entry in so many tells how large the largest are


def encode(codec: str, shape: tuple[int, ...], values: FloatArray, mask: Mask) -> Encoded:
    """Of ``values`` (C, n) those where ``mask`` (C, n) is true, for a delta of ``shape``."""
    parts = []
    for line, chosen in zip(values, mask, strict=True):
        places = np.flatnonzero(chosen)
        parts.append(encode_places(places, values.shape[1]) + line[places].astype("<f4").tobytes())
    return Encoded.of(codec, shape, parts)


def decode(part: Encoded) -> FloatArray:
    """The deltas, (C, *shape), zero where nothing was sent.

    Raises:
        UpdateError: bytes that :func:`encode` does not make.
    """
    size = prod(part.shape)
    dense = np.zeros((len(part.offsets) - 1, size), dtype=np.float32)
    for client, line in enumerate(dense):
        places, rest = decode_places(part.part(client), size)
        if len(rest) != 4 * len(places):
            raise UpdateError(f"{len(places):,} values need {4 * len(places):,} bytes, but {len(rest):,} came")
        line[places] = np.frombuffer(rest.tobytes(), dtype="<f4")
    return dense.reshape(-1, *part.shape)


def parted(part: Encoded) -> tuple[list[bytes], list[IntArray], list[Bytes]]:
    """Of each client's message the bytes that say its places, the places, and the bytes that follow them.

    Raises:
        UpdateError: bytes that do not begin as those of :func:`encode` do.
    """
    heads, places, rests = [], [], []
    for client in range(len(part.offsets) - 1):
        data = part.part(client)
        found, rest = decode_places(data, prod(part.shape))
        heads.append(data[: len(data) - len(rest)].tobytes())
        places.append(found)
        rests.append(rest)
    return heads, places, rests


def encode_places(places: IntArray, size: int | None = None) -> bytes:
    """Rising places as bytes; those of rows of a table, whose ``size`` a device does not know, are always gaps."""
    gaps = places.copy()
    gaps[1:] -= places[:-1] + 1
    width = max(int(gaps.max(initial=0)).bit_length(), 1)
    lengths = {GAPS: 1 + -(-len(places) * width // 8)}
    if size is not None:
        lengths |= {BITMAP: -(-size // 8), PLAIN: 4 * len(places)}
    coding = min(lengths, key=lambda each: lengths[each])
    return _HEADER.pack(coding, len(places)) + _ENCODERS[coding](places, size or 0, gaps, width)


def decode_places(data: Bytes, size: int | None = None) -> tuple[IntArray, Bytes]:
    """The places, rising and below ``size`` where that is known, and the bytes after them.

    Raises:
        UpdateError: bytes that :func:`encode_places` does not make.
    """
    if len(data) < _HEADER.size:
        raise UpdateError(f"a sparse delta begins with {_HEADER.size} bytes, but {len(data)} came")
    coding, count = _HEADER.unpack(data[: _HEADER.size].tobytes())
    data = data[_HEADER.size :]
    if coding == BITMAP and size is not None:
        places, used = _from_bitmap(data, size)
    elif coding == PLAIN and size is not None:
        used = 4 * count
        places = np.frombuffer(_first(data, used).tobytes(), dtype="<u4").astype(np.int64)
    elif coding == GAPS:
        places, used = _from_gaps(data, count)
    else:
        raise UpdateError(f"there is no coding {coding} of the places of a sparse delta")
    rising = not len(places) or (places[0] >= 0 and bool(np.all(places[1:] > places[:-1])))
    if len(places) != count or not rising or (size is not None and len(places) and places[-1] >= size):
        raise UpdateError(f"a sparse delta says {count:,} places, and they are not {count:,} rising places of {size}")
    return places, data[used:]


def _bitmap(places: IntArray, size: int, gaps: IntArray, width: int) -> bytes:
    mask = np.zeros(size, dtype=bool)
    mask[places] = True
    return np.packbits(mask, bitorder="little").tobytes()


def _plain(places: IntArray, size: int, gaps: IntArray, width: int) -> bytes:
    return places.astype("<u4").tobytes()


def _gaps(places: IntArray, size: int, gaps: IntArray, width: int) -> bytes:
    bits = (gaps[:, None] >> np.arange(width)) & 1
    return bytes([width]) + np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


_ENCODERS: dict[int, Callable[[IntArray, int, IntArray, int], bytes]] = {BITMAP: _bitmap, PLAIN: _plain, GAPS: _gaps}


def _from_bitmap(data: Bytes, size: int) -> tuple[IntArray, int]:
    used = -(-size // 8)
    return np.flatnonzero(np.unpackbits(_first(data, used), count=size, bitorder="little")), used


def _from_gaps(data: Bytes, count: int) -> tuple[IntArray, int]:
    width = int(_first(data, 1)[0])
    if not 1 <= width <= 63:
        raise UpdateError(f"gaps between places have 1 to 63 bits, not {width}")
    used = 1 + -(-count * width // 8)
    # Looked at before room is made: a few bytes could else ask for the room of 2^32 places.
    bits = np.unpackbits(_first(data, used)[1:], count=count * width, bitorder="little").reshape(count, width)
    gaps = bits.astype(np.int64) @ (np.int64(1) << np.arange(width, dtype=np.int64))
    return np.cumsum(gaps + 1) - 1, used


def _first(data: Bytes, count: int) -> Bytes:
    if len(data) < count:
        raise UpdateError(f"the places of a sparse delta need {count:,} bytes, but {len(data):,} came")
    return data[:count]


def encode_rows(codec: str, rows: Rows, messages: Bytes) -> Encoded:
    """Each client's row ids, rising, as the gaps between them, and then what each row is, ``messages`` (R, length)."""
    order = np.lexsort((rows.row_ids, rows.owners))  # as they mostly are
    ids, messages, ends = rows.row_ids[order], messages[order], rows.offsets.tolist()
    parts = [encode_places(ids[a:b]) + messages[a:b].tobytes() for a, b in pairwise(ends)]
    return Encoded.of(codec, rows.row_deltas.shape[1:], parts)


def decode_rows(part: Encoded, length: int) -> tuple[IntArray, IntArray, Bytes]:
    """Offsets (C+1,), ids (R,) and what each row is, (R, length).

    Raises:
        UpdateError: bytes that :func:`encode_rows` does not make.
    """
    ids, lines = [np.zeros(0, dtype=np.int64)], [np.zeros((0, length), dtype=np.uint8)]
    for client in range(len(part.offsets) - 1):
        places, rest = decode_places(part.part(client))
        if len(part.shape) != 1 or len(rest) != len(places) * length:
            raise UpdateError(
                f"{len(places):,} rows of shape {part.shape} need {len(places) * length:,} bytes in the codec "
                f"{part.codec!r}, but {len(rest):,} came"
            )
        ids.append(places)
        lines.append(rest.reshape(len(places), length))
    offsets = np.cumsum([len(places) for places in ids]).astype(np.int64)
    return offsets, np.concatenate(ids), np.concatenate(lines)


def largest(values: NDArray[np.floating[Any]], count: int) -> Mask:
    """Where the ``count`` largest of each line of (C, n) are, without their signs: what is not a number is larger than
    all others, and of equal ones the first are taken.
    """
    mask = np.zeros(values.shape, dtype=bool)
    if 0 < count < values.shape[1]:
        for line, chosen in zip(values, mask, strict=True):  # one at a time stays in the cache
            chosen[_places_of_largest(line, count)] = True
    elif count:
        mask[:] = True
    return mask


def _places_of_largest(line: NDArray[np.floating[Any]], count: int) -> IntArray:
    """The ``count`` places, fewer than there are."""
    bits = np.abs(line).view(f"i{line.itemsize}")  # in the order of the numbers, and NaN after infinity
    among = _not_too_small(bits, count)
    found = bits[among]
    edge = np.partition(found, -count)[-count]
    above = among[found > edge]
    return np.concatenate([above, among[found == edge][: count - len(above)]])


def _not_too_small(bits: NDArray[Any], count: int) -> IntArray:
    """Places, rising, among which the ``count`` largest are: where a sample says so, few more than those. To divide a
    whole line at an entry costs more than all else that a sparsifier does.
    """
    sample = bits[::_SAMPLED]
    rank = 3 * count // (2 * _SAMPLED) + 8
    if rank < len(sample):
        places = np.flatnonzero(bits >= np.partition(sample, -rank)[-rank])
        if len(places) >= count:
            return places
    return np.arange(len(bits), dtype=np.int64)


def largest_rows(rows: Rows, fraction: float) -> Rows:
    """Of each client's rows that share with the longest deltas (L2), rounded up, in the order in which they stand."""
    if fraction >= 1.0:
        return rows
    owners, counts = rows.owners, np.diff(rows.offsets)
    lengths = np.square(rows.row_deltas, dtype=np.float64).sum(axis=1)
    lengths[np.isnan(lengths)] = np.inf  # it is sent, for the server to refuse
    order = np.lexsort((-lengths, owners))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(rows.offsets[:-1], counts)
    kept = rank < np.ceil(fraction * counts).astype(np.int64)[owners]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners[kept], minlength=len(counts)))]).astype(np.int64)
    return Rows(offsets, rows.row_ids[kept], rows.row_deltas[kept])


def num_kept(size: int, fraction: float) -> int:
    """How many of ``size`` entries a fraction is: rounded up, and so at least one.

    >>> num_kept(10, 0.001), num_kept(5000, 0.001)
    (1, 5)
    """
    return min(size, int(np.ceil(size * fraction - 1e-9)) or min(size, 1))


def decode_dense(block: Updates, codec: str) -> Updates:
    """The block with what :func:`encode` made for this codec decoded."""
    return decoded(block, codec, decode)
