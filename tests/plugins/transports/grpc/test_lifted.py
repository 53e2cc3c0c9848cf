"""Lifting: what is parsed with its arrays left in place is what protobuf parses, and is refused where that is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.updates import Rows, Updates
from fedtower.plugins.transports.grpc.bounds import SMALL, parse
from fedtower.plugins.transports.grpc.codec import (
    Belongs,
    Submission,
    data_of_part,
    decode_submission,
    encode_submission,
)
from fedtower.plugins.transports.grpc.lifted import parse_lifted
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb

MOST = 1 << 24


def an_update(numbers: int, seed: int = 0) -> bytes:
    draws = np.random.default_rng(seed)
    updates = Updates(
        weights=np.array([2.0]),
        dense={name: draws.normal(size=(1, numbers)).astype(np.float32) for name in ("a", "b")},
        rows={"item": Rows(np.array([0, 3]), np.array([1, 5, 9]), draws.normal(size=(3, 4)).astype(np.float32))},
        metrics={"loss": np.array([0.5])},
    )
    return encode_submission(Submission(Belongs("f", bytes(32), 1, bytes(16)), updates, 3))


def test_a_large_update_is_read_where_it_lies() -> None:
    data = bytearray(an_update(SMALL))
    found = decode_submission(memoryview(data).toreadonly(), 7, most_bytes=MOST)
    copied = pb.Update.FromString(bytes(data))
    for tensor in copied.dense:
        np.testing.assert_array_equal(found.updates.dense[tensor.name][0], np.frombuffer(tensor.data, np.float32))
        assert not found.updates.dense[tensor.name].flags.writeable
    before = found.updates.dense["a"].copy()
    at = bytes(data).index(copied.dense[0].data)
    data[at : at + 4] = np.float32(123.0).tobytes()
    assert found.updates.dense["a"][0, 0] == 123.0  # it looks at these bytes, and at no copy of them
    np.testing.assert_array_equal(found.updates.dense["a"][0, 1:], before[0, 1:])
    np.testing.assert_array_equal(found.updates.rows["item"].row_ids, [1, 5, 9])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_bytes_are_the_same_message_both_ways_or_are_refused_by_both(seed: int) -> None:
    draws = np.random.default_rng(seed)
    data = bytearray(an_update(SMALL // 4, seed))
    for at in draws.integers(0, 200, size=draws.integers(0, 4)).tolist():
        data[at] = int(draws.integers(256))
    if draws.random() < 0.3:
        data = data[: int(draws.integers(SMALL + 1, len(data)))]
    whole, lifted = parsed(lambda: parse(pb.Update, bytes(data), most_bytes=MOST)), parsed(lambda: joined(bytes(data)))
    assert whole == lifted  # of what is broken in two places, each may name the one that it meets first


def joined(data: bytes) -> pb.Update:
    """The message with its arrays put back."""
    message, at = parse_lifted(pb.Update, data, most_bytes=MOST)
    for tensor in [*message.dense, *(t for rows in message.rows for t in (rows.ids, rows.deltas))]:
        tensor.data = bytes(at.of(tensor))
    return message


def parsed(make: Callable[[], pb.Update]) -> pb.Update | None:
    try:
        return make()
    except Refused:
        return None


def test_a_part_is_read_where_it_lies_and_a_second_header_is_refused() -> None:
    data = bytes(range(256)) * 40
    part = pb.SubmitPart(data=data).SerializeToString()
    assert data_of_part(part, "client 1") == data
    assert data_of_part(part + b"\x9a\x06\x01x", "client 1") == data  # with a field that a later version may have
    assert not len(data_of_part(pb.SubmitPart(data=b"").SerializeToString(), "client 1"))
    for bad, why in (
        (pb.SubmitPart(header=pb.SubmitHeader(size=1)).SerializeToString(), Reason.CORRUPT),
        (part[:-1], Reason.CORRUPT),
        (bytes([0x12]) + b"\xff" * 11, Reason.CORRUPT),
    ):
        with pytest.raises(Refused) as refused:
            data_of_part(bad, "client 1")
        assert refused.value.reason is why
