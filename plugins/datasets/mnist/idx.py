"""IDX: the format of the MNIST files. A magic number, the sizes as big-endian words, then the bytes.

LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.layout import open_bytes

_UNSIGNED_BYTES = 0x08
_PIECE = 1 << 20


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of bytes of an IDX file, plain or ``.gz``.

    Raises:
        DataError: the magic number is another, or the file is shorter or longer than its sizes say.
    """
    with open_bytes(path) as file:
        head = file.read(4 + 4 * dimensions)
        if len(head) < 4 + 4 * dimensions:
            raise DataError(f"{path} has {len(head)} bytes; expected at least the {4 + 4 * dimensions} of its head")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", head)
        expected = _UNSIGNED_BYTES << 8 | dimensions
        if magic != expected:
            raise DataError(
                f"{path}, byte 1: expected the magic number {expected} ({expected:#06x}: bytes in {dimensions} "
                f"dimensions), got {magic} ({magic:#06x}); is it another of the four files?"
            )
        size = int(np.prod(shape, dtype=object))
        # Piece by piece: a head that lies must not make us reserve what it says, nor a bomb make us unpack it all.
        body = bytearray()
        while len(body) <= size and (piece := file.read(_PIECE)):
            body += piece
    if len(body) != size:
        there = f"{len(body):,}" if len(body) < size else "more"
        raise DataError(
            f"{path}: expected {size:,} bytes after the head, as its sizes {' x '.join(map(str, shape))} say, got "
            f"{there}; fetch the file again"
        )
    return np.frombuffer(bytes(body), dtype=np.uint8).reshape(shape)
