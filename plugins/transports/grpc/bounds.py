"""Bounded parsing: what a message holds is counted in its bytes before protobuf makes objects of it.

An empty sub-message is two bytes on the wire and some thirty times as much in memory. So a message that is not small is
walked first, field by field, along its descriptor: the walk makes nothing, and stops at the first field too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fedtower.plugins.transports.grpc.refusals import Reason, Refused

M = TypeVar("M", bound=Message)

CALL_BYTES = 288 << 10
"""A message of a call: 256 KiB of data and what stands around them."""

MOST_FIELDS = 65_536
"""Of a message and all that is in it: 4,096 tensors have some 40,000. Parsed, they take less than 10 MB."""

# A message this small cannot hold enough to matter (64 KiB of empty sub-messages: 2 MB), and most are.
SMALL = 64 << 10

# Wire types; there are groups (3 and 4), which nothing of ours uses.
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


def parse(kind: type[M], data: bytes | memoryview, *, most_bytes: int = CALL_BYTES, whose: str = "a device") -> M:
    """The message that ``data`` is.

    Raises:
        Refused: ``TOO_LARGE`` above ``most_bytes`` or MOST_FIELDS, ``TRUNCATED`` when the bytes end too early, or
            ``CORRUPT`` when they are no such message.
    """
    if len(data) > most_bytes:
        raise Refused(
            Reason.TOO_LARGE,
            f"{whose} sent {len(data):,} bytes as one message {kind.DESCRIPTOR.name}; the limit is {most_bytes:,}",
        )
    if len(data) > SMALL:
        count_fields(data, layout(kind.DESCRIPTOR), whose)
    try:
        return kind.FromString(data)  # type: ignore[arg-type]  # which takes views, whatever the stubs say
    except DecodeError as error:
        raise Refused(
            Reason.CORRUPT, f"{whose} sent {len(data):,} bytes that are no message {kind.DESCRIPTOR.name}: {error}"
        ) from error


@dataclass(frozen=True)
class Layout:
    """What of a message matters for counting: the messages inside of it, and the numbers that may stand in a row."""

    name: str
    inside: Mapping[int, Layout]
    rows: frozenset[int]


@cache
def layout(descriptor: Any) -> Layout:
    """The layout of a message, given its descriptor; no message of the wire holds itself."""
    fields: list[FieldDescriptor] = list(descriptor.fields)
    inside = {field.number: layout(field.message_type) for field in fields if field.message_type is not None}
    return Layout(descriptor.name, inside, frozenset(field.number for field in fields if field.is_packed))


def count_fields(data: bytes | memoryview, message: Layout, whose: str = "a device") -> int:
    """How many fields a serialised message has, those of the messages in it included; nothing is parsed.

    Raises:
        Refused: as :func:`parse` does.
    """
    count = Count()
    todo = [(0, len(data), message)]
    while todo:
        at, end, within = todo.pop()
        while at < end:
            key, at = varint(data, at, end, whose)
            at, length = count.skip(key, data, at, end, within, whose)
            if key & 7 == _BYTES and key >> 3 in within.inside:
                todo.append((at - length, at, within.inside[key >> 3]))
    return count.fields


@dataclass
class Count:
    """Counts the fields that a walk along a serialised message passes."""

    fields: int = 0

    def skip(
        self, key: int, data: bytes | memoryview, at: int, end: int, within: Layout, whose: str
    ) -> tuple[int, int]:
        """Where the field ends whose key ends ``at``; and how long it is, if it is of bytes.

        Raises:
            Refused: as :func:`parse` does.
        """
        number, wire, length = key >> 3, key & 7, 0
        self.fields += 1
        if wire == _BYTES:
            length, at = varint(data, at, end, whose)
            if number in within.rows:
                self.fields += length  # at most one number a byte
            at += length
        elif wire == _VARINT:
            _, at = varint(data, at, end, whose)
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise Refused(Reason.CORRUPT, f"{whose} sent a message {within.name} with a field of wire type {wire}")
        if at > end:
            raise Refused(
                Reason.TRUNCATED, f"{whose} sent a message {within.name} that ends inside of a field: was it cut?"
            )
        if self.fields > MOST_FIELDS:
            raise Refused(
                Reason.TOO_LARGE,
                f"{whose} sent a message of more than {MOST_FIELDS:,} fields, which no true one has",
            )
        return at, length


def varint(data: bytes | memoryview, at: int, end: int, whose: str) -> tuple[int, int]:
    """The number at a position, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    if at < end:
        raise Refused(Reason.CORRUPT, f"{whose} sent a number of more than ten bytes")
    raise Refused(Reason.TRUNCATED, f"{whose} sent a message that ends inside of a number; was it cut short?")
