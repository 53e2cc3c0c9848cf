"""Lifting: a large message is parsed with its arrays left where they are.

Protobuf copies the bytes of a field when it parses, and again when they are asked for. So the data of every tensor are
taken out of the serialised message first; what is parsed is the small rest, in which each of them is a number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtower.plugins.transports.grpc.bounds import CALL_BYTES, SMALL, Count, Layout, M, layout, parse, varint
from fedtower.protos.v1 import federation_pb2 as pb

Payload = bytes | memoryview

_TENSOR = layout(pb.Tensor.DESCRIPTOR)
_DATA = pb.Tensor.DESCRIPTOR.fields_by_name["data"].number
_PLACE = struct.Struct("<I")
_BYTES = 2


@dataclass(frozen=True)
class Data:
    """Where the data of a message's tensors are: in the message, or, ``lifted``, in the bytes that it was parsed of."""

    lifted: Sequence[Payload] | None = None

    def of(self, tensor: pb.Tensor) -> Payload:
        """The data of a tensor of the message."""
        if self.lifted is None:
            return tensor.data
        return self.lifted[_PLACE.unpack(tensor.data)[0]] if tensor.data else b""


def parse_lifted(
    kind: type[M], data: Payload, *, most_bytes: int = CALL_BYTES, whose: str = "a device"
) -> tuple[M, Data]:
    """The message that ``data`` is, and where the data of its tensors are: of a large one they are not copied.

    Raises:
        Refused: as :func:`fedtower.plugins.transports.grpc.bounds.parse` does.
    """
    if not SMALL < len(data) <= most_bytes:
        return parse(kind, data, most_bytes=most_bytes, whose=whose), Data()
    lifting = _Lifting(data, whose)
    rest = lifting.rest(0, len(data), layout(kind.DESCRIPTOR))
    return parse(kind, bytes(rest), most_bytes=most_bytes, whose=whose), Data(lifting.lifted)


@dataclass
class _Lifting:
    """A walk along a serialised message, which leaves out what it lifts."""

    data: Payload
    whose: str
    lifted: list[Payload] = field(default_factory=list)
    count: Count = field(default_factory=Count)

    def rest(self, at: int, end: int, within: Layout) -> bytearray:
        """The message from ``at`` to ``end``, a small number in the place of each lifted field."""
        data, whose, rest = memoryview(self.data), self.whose, bytearray()
        while at < end:
            start = at
            key, at = varint(data, at, end, whose)
            after_key = at
            at, length = self.count.skip(key, data, at, end, within, whose)
            if key & 7 != _BYTES:
                rest += data[start:at]
                continue
            number, begins = key >> 3, at - length
            if number in within.inside:
                part: Payload | bytearray = self.rest(begins, at, within.inside[number])
            elif within is _TENSOR and number == _DATA:
                part = _PLACE.pack(len(self.lifted))
                self.lifted.append(data[begins:at])
            else:
                rest += data[start:at]
                continue
            rest += data[start:after_key]
            rest += _as_varint(len(part))
            rest += part
        return rest


def _as_varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
