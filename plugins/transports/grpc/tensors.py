"""Tensors: arrays as messages and back, bounded and never pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb

Array = NDArray[Any]

DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_INT8: np.dtype("i1"),
    pb.DTYPE_INT16: np.dtype("<i2"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_UINT8: np.dtype("u1"),
    pb.DTYPE_UINT16: np.dtype("<u2"),
    pb.DTYPE_UINT32: np.dtype("<u4"),
    pb.DTYPE_UINT64: np.dtype("<u8"),
    pb.DTYPE_BOOL: np.dtype("?"),
}
_NUMBERS = {dtype: pb.DType.ValueType(number) for number, dtype in DTYPES.items()}

MOST_AXES = 8
MOST_NAME = 256
# Of an array that holds nothing, too: (0, 2^60) has no bytes, and numpy cannot make it.
_MOST_ENTRIES = 1 << 40


def to_tensor(array: Array, name: str = "") -> pb.Tensor:
    """An array as a message.

    Raises:
        TypeError: an array of a dtype that does not travel (objects, dates, text).
    """
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _NUMBERS:
        raise TypeError(f"an array of {array.dtype} does not travel; what does: {', '.join(map(str, _NUMBERS))}")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return pb.Tensor(name=name, dtype=_NUMBERS[dtype], shape=array.shape, data=data)


def to_array(tensor: pb.Tensor, whose: str = "a device", data: bytes | memoryview | None = None) -> Array:
    """The array of a message, read-only: it looks at the message's own bytes, or at ``data`` in their place.

    Raises:
        Refused: ``WRONG_DTYPE``, ``TOO_LARGE`` (axes or entries), or ``WRONG_SHAPE`` where the bytes are not as many as
            the shape says.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise Refused(
            Reason.WRONG_DTYPE, f"{whose} sent {tensor.name!r} with the dtype {tensor.dtype}, which there is not"
        )
    data, shape = tensor.data if data is None else data, shaped(tensor.shape, tensor.name, whose)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise Refused(
            Reason.WRONG_SHAPE,
            f"{whose} sent {tensor.name!r} of shape {shape} and {dtype} with {len(data):,} bytes of data, where "
            f"{math.prod(shape) * dtype.itemsize:,} were due",
        )
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise Refused(Reason.CORRUPT, f"{whose} sent {tensor.name!r}, booleans, with bytes other than 0 and 1")
    return array


def shaped(shape: Sequence[int], name: str, whose: str) -> tuple[int, ...]:
    """``shape``, unless it has more axes or entries than an array may have (``TOO_LARGE``)."""
    if len(shape) > MOST_AXES or math.prod(max(axis, 1) for axis in shape) > _MOST_ENTRIES:
        raise Refused(
            Reason.TOO_LARGE, f"{whose} sent {name!r} with {len(shape)} axes of {list(shape[:MOST_AXES])} entries"
        )
    return tuple(shape)


def named(name: str, what: str, whose: str) -> str:
    """``name``, unless it is empty or longer than a name may be (``WRONG_NAMES``)."""
    if not name or len(name) > MOST_NAME:
        raise Refused(
            Reason.WRONG_NAMES, f"{whose} sent {what} whose name has {len(name)} letters: 1 to {MOST_NAME} may be"
        )
    return name
