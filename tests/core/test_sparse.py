"""Sparse messages: the shortest coding, whole numbers in few bits, and rows as ids and messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.packing import pack, packed_bytes, unpack
from fedtower.core.sparse import (
    BITMAP,
    GAPS,
    PLAIN,
    decode,
    decode_places,
    encode,
    encode_places,
    largest,
    largest_rows,
    num_kept,
)
from fedtower.core.updates import Rows


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 40), st.integers(0, 5), st.integers(0, 99))
def test_what_is_packed_is_unpacked(bits: int, count: int, clients: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (clients, count)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (clients, packed_bytes(count, bits))
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 99))
def test_places_come_back_in_the_shortest_coding(size: int, share: float, seed: int) -> None:
    places = np.flatnonzero(np.random.default_rng(seed).random(size) < share)
    data = encode_places(places, size)
    assert len(data) <= 5 + min(-(-size // 8), 4 * len(places))
    back, rest = decode_places(np.frombuffer(data + b"values", dtype=np.uint8), size)
    np.testing.assert_array_equal(back, places)
    assert rest.tobytes() == b"values"


@pytest.mark.parametrize(
    ("places", "size", "coding", "length"),
    [
        ([*range(300), 999], 1000, BITMAP, 125),
        ([999_999], 1_000_000, GAPS, 1 + 3),
        ([7, 1_000_000 - 1], 1_000_000, GAPS, 1 + 5),
        (range(0, 1000, 2), 1000, GAPS, 1 + 63),
        ([20_000_000], 1 << 25, PLAIN, 4),
    ],
)
def test_a_coding_is_chosen_by_its_length(places: list[int], size: int, coding: int, length: int) -> None:
    data = encode_places(np.array(places, dtype=np.int64), size)
    assert (data[0], len(data) - 5) == (coding, length)


numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, np.inf, -np.inf, np.nan, 1e-40]) | st.floats(width=32)


@settings(deadline=None, max_examples=200)
@given(st.lists(numbers, min_size=1, max_size=300), st.integers(1, 8), st.floats(0, 1), st.sampled_from(["f4", "f8"]))
def test_the_largest_are_those_of_a_sort_without_signs(drawn: list[float], times: int, share: float, kind: str) -> None:
    line = np.tile(np.array(drawn, dtype=kind), times)
    count = round(share * len(line))
    lengths = np.where(np.isnan(line), np.inf, np.abs(line).astype("f8"))
    order = np.lexsort((np.arange(len(line)), -lengths, ~np.isnan(line)))
    want = np.zeros(len(line), dtype=bool)
    want[order[:count]] = True
    np.testing.assert_array_equal(largest(np.stack([line, line[::-1]]), count)[0], want)


@pytest.mark.parametrize("shape", ["noise", "rising", "at every sixteenth", "but at every sixteenth", "equal"])
@pytest.mark.parametrize("count", [1, 40, 400, 20_000])
def test_the_largest_of_a_long_line_are_as_many_and_no_other_is_larger(shape: str, count: int) -> None:
    places = np.arange(40_000)
    line = {
        "noise": np.random.default_rng(1).standard_normal(40_000),
        "rising": places + 1.0,
        "at every sixteenth": np.where(places % 16 == 0, places + 1.0, 1e-3),
        "but at every sixteenth": np.where(places % 16 == 0, 1e-3, places + 1.0),
        "equal": np.ones(40_000),
    }[shape].astype(np.float32)
    mask = largest(line[None], count)[0]
    assert np.count_nonzero(mask) == count
    assert np.abs(line[mask]).min() >= np.abs(line[~mask]).max()


def test_two_of_four_entries_by_hand() -> None:
    values = np.array([[1.0, -5.0, 3.0, 0.5]], dtype=np.float32)
    mask = largest(values, 2)
    assert mask.tolist() == [[False, True, True, False]]
    part = encode("k", (2, 2), values, mask)
    assert part.part(0).tobytes() == bytes([BITMAP, 2, 0, 0, 0, 0b0110]) + np.array([-5, 3], dtype="<f4").tobytes()
    assert decode(part).tolist() == [[[0.0, -5.0], [3.0, 0.0]]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes([BITMAP, 9, 0, 0, 0, 0b11]),  # two are there
        bytes([PLAIN, 1, 0, 0, 0, 4, 0, 0, 0]) + b"1234",  # the fifth of four
        bytes([PLAIN, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]) + b"12341234",  # twice
        bytes([GAPS, 255, 255, 255, 255, 1]),  # so many gaps are not there
        bytes([GAPS, 1, 0, 0, 0, 64, *[255] * 8]) + b"1234",  # too wide
        bytes([7, 0, 0, 0, 0]),
        bytes([PLAIN, 1, 0, 0, 0, 1, 0, 0, 0]) + b"12345",  # a byte more
    ],
)
def test_bytes_of_strangers_are_refused(data: bytes) -> None:
    with pytest.raises(UpdateError):
        decode(Encoded.of("k", (4,), [data]))


def test_the_longest_rows_of_each_client_are_kept_in_order() -> None:
    deltas = np.array([[1.0], [-9.0], [2.0], [3.0], [0.5]], dtype=np.float32)
    kept = largest_rows(Rows(np.array([0, 4, 5]), np.array([2, 4, 6, 8, 1]), deltas), 0.5)
    assert kept.offsets.tolist() == [0, 2, 3]
    assert kept.row_ids.tolist() == [4, 8, 1]
    assert kept.row_deltas.ravel().tolist() == [-9.0, 3.0, 0.5]


@pytest.mark.parametrize(("size", "share", "kept"), [(1000, 0.001, 1), (1001, 0.001, 2), (3, 1.0, 3), (0, 0.5, 0)])
def test_a_share_is_rounded_up(size: int, share: float, kept: int) -> None:
    assert num_kept(size, share) == kept
