"""Updates: jagged rows and stacked blocks, by hand and by round trip."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.errors import ShapeMismatch
from fedtower.core.jagged import Encoded
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Rows, Updates, stack

law = settings(deadline=None, max_examples=50)


def rows(lengths: list[int], dim: int = 2) -> Rows:
    """Clients that send so many rows each: client c the ids 10 c, 10 c + 1, ..."""
    ids = [10 * client + place for client, length in enumerate(lengths) for place in range(length)]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    deltas = np.repeat(np.array(ids, dtype=np.float32)[:, None], dim, axis=1)
    return Rows(offsets, np.array(ids, dtype=np.int64), deltas.reshape(len(ids), dim))


def test_owners_are_the_clients_of_each_entry() -> None:
    assert rows([2, 0, 3]).owners.tolist() == [0, 0, 2, 2, 2]


def test_a_slice_of_rows_starts_anew() -> None:
    part = rows([2, 0, 3]).slice(1, 3)
    assert part.offsets.tolist() == [0, 0, 3]
    assert part.row_ids.tolist() == [20, 21, 22]
    assert part.row_deltas[:, 0].tolist() == [20, 21, 22]


def test_the_weights_of_a_total_are_sliced_with_its_rows() -> None:
    ids = np.array([4, 7], dtype=np.int64)
    total = Rows(np.array([0, 2]), ids, np.zeros((2, 1), np.float32), row_weights=np.array([3.0, 1.0]))
    weights = total.slice(0, 1).row_weights
    assert weights is not None
    assert weights.tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    "offsets", [[], [0], [0, 1, 2], [1, 3], [0, 2, 1, 3], [0, 4, 3]], ids=lambda offsets: f"{offsets}"
)
def test_offsets_that_do_not_divide_the_rows_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ShapeMismatch, match="must rise from 0 to 3"):
        Rows(np.array(offsets, dtype=np.int64), np.arange(3), np.zeros((3, 2), np.float32))


def test_a_delta_or_a_weight_too_few_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="for 3 ids there are 2 deltas"):
        Rows(np.array([0, 3]), np.arange(3), np.zeros((2, 2), np.float32))
    with pytest.raises(ShapeMismatch, match="3 deltas and 1 weights"):
        Rows(np.array([0, 3]), np.arange(3), np.zeros((3, 2), np.float32), row_weights=np.ones(1))


def test_every_leading_axis_counts_the_clients() -> None:
    weights, two = np.ones(2), np.zeros(2)
    for name, values in {
        "bias": {"dense": {"bias": np.zeros((3, 4), np.float32)}},
        "scale": {"dense": {"scale": np.float32(1.0)}},
        "clients": {"clients": np.arange(3)},
        "rounds": {"rounds": np.arange(1)},
        "metrics.loss": {"metrics": {"loss": np.zeros(5)}},
    }.items():
        with pytest.raises(ShapeMismatch, match=f"a block of 2 clients needs '{name}' with 2 entries"):
            Updates(weights, **values)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match="needs 3 offsets for table 'item', but it has 4"):
        Updates(weights, rows={"item": rows([1, 1, 1])})
    assert len(Updates(weights, metrics={"loss": two})) == 2


def test_bytes_are_counted_as_documented() -> None:
    block = Updates(
        weights=np.ones(3),  # 3 x 8
        dense={"bias": np.zeros((3, 5), np.float32)},  # 3 x 5 x 4
        rows={"item": rows([2, 0, 3], dim=2)},  # 5 ids x 4, 5 deltas x 2 x 4, 3 lengths x 4
        metrics={"loss": np.zeros(3)},  # free
    )
    assert block.nbytes == 24 + 60 + 20 + 40 + 12


@given(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=5))
@law
def test_the_width_of_blocks_changes_no_byte(clients: int, cuts: list[int]) -> None:
    whole = examples.updates(clients)
    edges = sorted([0, *(min(cut, clients) for cut in cuts), clients])
    assert sum(whole.slice(*edge).nbytes for edge in pairwise(edges)) == whole.nbytes


@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=5))
@law
def test_what_is_cut_can_be_stacked_again(clients: int, cuts: list[int]) -> None:
    whole = examples.updates(clients)
    edges = sorted([0, *(min(cut, clients) for cut in cuts), clients])
    assert_same_bits(stack(whole.slice(*edge) for edge in pairwise(edges)), whole)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
@law
def test_what_is_stacked_can_be_cut_again(widths: list[int]) -> None:
    parts = [examples.updates(width, seed=seed) for seed, width in enumerate(widths)]
    whole, edges = stack(parts), np.concatenate([[0], np.cumsum(widths)]).tolist()
    for part, (start, stop) in zip(parts, pairwise(edges), strict=True):
        assert_same_bits(whole.slice(start, stop), part)


def test_nothing_stacked_is_an_empty_block() -> None:
    assert len(stack([])) == 0


def test_a_stack_has_what_every_block_has() -> None:
    known = Updates(np.ones(1), clients=np.array([4]), rounds=np.array([1]), metrics={"loss": np.ones(1)})
    nameless = Updates(np.ones(2), rounds=np.array([1, 1]), metrics={"loss": np.zeros(2), "clipped": np.ones(2)})
    both = stack([known, nameless])
    assert both.clients is None
    assert both.rounds is not None
    assert both.rounds.tolist() == [1, 1, 1]
    assert {name: values.tolist() for name, values in both.metrics.items()} == {"loss": [1, 0, 0]}
    assert set(stack([nameless, known]).metrics) == {"loss"}


def test_clients_that_send_other_parameters_are_refused_by_name() -> None:
    one = Updates(np.ones(1), dense={"bias": np.zeros((1, 3), np.float32)}, clients=np.array([4]))
    for other in (
        Updates(np.ones(1), dense={"bias": np.zeros((1, 1), np.float32)}, clients=np.array([7])),
        Updates(np.ones(1), dense={"scale": np.zeros((1, 3), np.float32)}, clients=np.array([7])),
        Updates(np.ones(1), dense=one.dense, rows={"item": rows([1])}, clients=np.array([7])),
    ):
        with pytest.raises(ShapeMismatch, match=r"the clients \[7\] sent .* where others of the cohort sent"):
            stack([one, other])
    with pytest.raises(ShapeMismatch, match=r"'bias' with shape \(1,\) where others of the cohort sent 'bias'.*\(3,\)"):
        stack([one, Updates(np.ones(1), dense={"bias": np.zeros((1, 1), np.float32)}, clients=np.array([7]))])


def test_clients_are_named_up_to_eight() -> None:
    ids = np.arange(10, 20)
    block = Updates(np.ones(10), clients=ids)
    assert block.who(ids == 15) == "the clients [15]"
    assert block.who() == "the clients [10, 11, 12, 13, 14, 15, 16, 17] and 2 more"
    assert Updates(np.ones(2)).who() == "2 clients without an id"


def encoded(*parts: bytes) -> Updates:
    """Clients that send one parameter as these bytes."""
    clients = np.arange(len(parts), dtype=np.int64)
    return Updates(np.ones(len(parts)), clients=clients, encoded={"w": Encoded.of("packed", (3,), list(parts))})


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=6), st.data())
@law
def test_encoded_bytes_stay_with_their_client(parts: list[bytes], data: st.DataObject) -> None:
    whole = encoded(*parts)
    order = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=8))
    cut = data.draw(st.integers(0, len(parts)))
    picked = whole.pick(np.array(order, dtype=np.int64)).encoded["w"]
    assert [picked.part(place).tobytes() for place in range(len(order))] == [parts[client] for client in order]
    assert_same_bits(stack([whole.slice(0, cut), whole.slice(cut, len(parts))]), whole)
    assert whole.sizes.tolist() == [8 + 4 + len(part) for part in parts]


@given(st.lists(st.integers(0, 8), max_size=12))
@law
def test_picked_clients_are_the_ones_cut_out_and_stacked(order: list[int]) -> None:
    whole = examples.updates(9)
    picked = whole.pick(np.array(order, dtype=np.int64))
    if order:
        assert_same_bits(picked, stack([whole.slice(client, client + 1) for client in order]))
    assert len(picked) == len(order)
    assert picked.sizes.tolist() == [int(whole.sizes[client]) for client in order]


def test_a_parameter_is_there_once() -> None:
    with pytest.raises(ShapeMismatch, match="'w' is there both dense and encoded"):
        replace(encoded(b"a"), dense={"w": np.zeros((1, 3), np.float32)})


def test_encoded_bytes_have_an_offset_a_client() -> None:
    with pytest.raises(ShapeMismatch, match="needs 3 offsets for the encoded 'w', but it has 2"):
        Updates(np.ones(2), encoded=encoded(b"a").encoded)
    with pytest.raises(ShapeMismatch, match="bytes of codec 'packed' must rise from 0 to 1"):
        Encoded("packed", (), np.array([0, 2]), np.zeros(1, dtype=np.uint8))
    with pytest.raises(ShapeMismatch, match="uint8, but it is"):
        Encoded("packed", (), np.array([0, 1]), np.zeros(1))  # type: ignore[arg-type]


def test_blocks_of_other_codecs_are_not_stacked() -> None:
    other = Updates(np.ones(1), encoded={"w": Encoded.of("signs", (3,), [b"a"])})
    with pytest.raises(ShapeMismatch, match="'w in signs'"):
        stack([encoded(b"a"), other])
