"""What a device submits survives the wire to the bit, and what is no submission is refused with a reason."""

import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtower.core import checking
from fedtower.core.jagged import Encoded
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.transports.grpc import bounds
from fedtower.plugins.transports.grpc.codec import (
    Belongs,
    Submission,
    decode_submission,
    encode_submission,
)
from fedtower.plugins.transports.grpc.refusals import Reason, Refused, refusal_of_check
from fedtower.plugins.transports.grpc.tensors import DTYPES, to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.evaluation import MetricSum
from tests.plugins.transports.grpc.damage import damaged

MIB = 1 << 20
BELONGS = Belongs("shops", b"m" * 32, 3, b"l" * 16)

# Every dtype that travels, with any bits in it: a NaN's too.
travelling = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3))
)
names = st.text(min_size=1, max_size=20)
encoded = st.builds(
    Encoded.of,
    names,
    st.lists(st.integers(0, 9), max_size=8).map(tuple),
    st.binary(max_size=20).map(lambda data: [data]),
)
float32 = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=4))


@st.composite
def submissions(draw: st.DrawFn) -> Submission:
    parameters = draw(st.lists(names, max_size=5, unique=True))
    cut = draw(st.integers(0, len(parameters)))
    tables = {}
    for table in draw(st.lists(names, max_size=2, unique=True)):
        ids = draw(arrays.arrays(np.int64, st.integers(0, 4), elements=st.integers(0, 2**62)))
        deltas = draw(arrays.arrays(np.float32, (len(ids), draw(st.integers(0, 3)))))
        tables[table] = Rows(np.array([0, len(ids)], dtype=np.int64), ids, deltas)
    return Submission(
        replace(BELONGS, federation=draw(st.text(max_size=20)), round=draw(st.integers(0, 2**63 - 1))),
        Updates(
            weights=np.array([draw(st.floats())]),
            dense={name: draw(float32)[None] for name in parameters[:cut]},
            rows=tables,
            metrics={name: np.array([draw(st.floats())]) for name in draw(st.lists(names, max_size=3, unique=True))},
            encoded={name: draw(encoded) for name in parameters[cut:]},
        ),
        num_examples=draw(st.integers(0, 2**63 - 1)),
    )


def submission(tensors: int = 3, size: int = 100) -> Submission:
    ids = np.array([3, 1, 7], dtype=np.int64)
    return Submission(
        BELONGS,
        Updates(
            weights=np.ones(1),
            dense={f"p{i}": np.arange(size, dtype=np.float32)[None] for i in range(tensors)},
            rows={"items": Rows(np.array([0, 3], dtype=np.int64), ids, np.ones((3, 4), dtype=np.float32))},
            metrics={"loss": np.array([0.5])},
            encoded={"q": Encoded.of("int8", (3,), [b"abc"])},
        ),
        num_examples=20,
    )


def decode(data: bytes) -> Submission:
    return decode_submission(data, 7, most_bytes=4 * MIB)


def refusal(message: pb.Update) -> Refused:
    with pytest.raises(Refused) as caught:
        decode(message.SerializeToString())
    return caught.value


def message(**fields: object) -> pb.Update:
    made = pb.Update.FromString(encode_submission(submission()))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@given(travelling)
def test_an_array_comes_back_bit_by_bit(array: np.ndarray) -> None:
    back = to_array(pb.Tensor.FromString(to_tensor(array, "a").SerializeToString()))
    assert (back.shape, back.dtype, back.tobytes()) == (array.shape, array.dtype, array.tobytes())


def test_an_array_in_another_order_or_of_other_bytes_travels_as_what_it_means() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert_same_bits(to_array(to_tensor(array)), array.astype("<f4"))


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["2026"], dtype="M8[D]"), np.array(["text"])])
def test_what_is_no_number_does_not_travel(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="does not travel"):
        to_tensor(array)


@given(submissions())
def test_a_submission_comes_back_bit_by_bit(sent: Submission) -> None:
    data = encode_submission(sent)
    back = decode(data)
    assert encode_submission(back) == data
    assert back.belongs == sent.belongs
    assert (back.num_examples, back.sums) == (sent.num_examples, sent.sums)
    assert_same_bits(back.updates.encoded, sent.updates.encoded)
    assert back.updates.weights.tobytes() == sent.updates.weights.tobytes()
    assert {name: delta.tobytes() for name, delta in back.updates.dense.items()} == {
        name: delta.tobytes() for name, delta in sent.updates.dense.items()
    }
    assert back.updates.shapes == sent.updates.shapes
    for table, rows in sent.updates.rows.items():
        assert_same_bits(back.updates.rows[table].row_ids, rows.row_ids)
        assert back.updates.rows[table].row_deltas.tobytes() == rows.row_deltas.tobytes()


def test_the_client_and_the_round_are_the_leases() -> None:
    back = decode(encode_submission(submission())).updates
    assert_same_bits((back.clients, back.rounds), (np.array([7]), np.array([3])))


def test_an_evaluation_comes_back() -> None:
    sent = Submission(
        replace(BELONGS, task="evaluate"), Updates(weights=np.zeros(1)), 5, sums={"hr@10": MetricSum(3.0, 5)}
    )
    assert decode(encode_submission(sent)).sums == {"hr@10": MetricSum(3.0, 5)}


def test_two_clients_do_not_fit_into_one_submission() -> None:
    with pytest.raises(ValueError, match="one client, not of 2"):
        encode_submission(replace(submission(), updates=Updates(weights=np.ones(2))))


def test_ids_travel_in_32_bits_where_they_fit() -> None:
    sent = message()
    assert sent.rows[0].ids.dtype == pb.DTYPE_UINT32
    large = Rows(np.array([0, 1], dtype=np.int64), np.array([1 << 40]), np.ones((1, 4), dtype=np.float32))
    data = encode_submission(replace(submission(), updates=Updates(weights=np.ones(1), rows={"items": large})))
    assert_same_bits(decode(data).updates.rows["items"].row_ids, np.array([1 << 40]))


def broken() -> dict[str, tuple[pb.Update, Reason]]:
    """Messages with one thing wrong, and what they are refused for."""
    cases = {
        "protocol": (message(protocol=2), Reason.OTHER_PROTOCOL),
        "task": (message(task=9), Reason.CORRUPT),
        "sums of a training": (message(), Reason.WRONG_NAMES),
        "deltas of an evaluation": (message(task=pb.TASK_EVALUATE), Reason.WRONG_NAMES),
        "round": (message(round=2**63), Reason.TOO_LARGE),
        "examples": (message(num_examples=2**64 - 1), Reason.TOO_LARGE),
    }
    cases["sums of a training"][0].sums.add(name="hr", sum=1.0, count=1)
    for name, reason in (
        ("dtype", Reason.WRONG_DTYPE),
        ("float64", Reason.WRONG_DTYPE),
        ("shape", Reason.WRONG_SHAPE),
        ("axes", Reason.TOO_LARGE),
        ("endless", Reason.TOO_LARGE),
        ("nameless", Reason.WRONG_NAMES),
        ("long name", Reason.WRONG_NAMES),
        ("twice", Reason.WRONG_NAMES),
        ("dense and encoded", Reason.WRONG_NAMES),
        ("table twice", Reason.WRONG_NAMES),
        ("metric twice", Reason.WRONG_NAMES),
        ("float ids", Reason.WRONG_DTYPE),
        ("negative ids", Reason.ROW_NOT_LEASED),
        ("more ids", Reason.WRONG_SHAPE),
        ("flat rows", Reason.WRONG_SHAPE),
        ("4,097 tensors", Reason.TOO_LARGE),
        ("257 tables", Reason.TOO_LARGE),
        ("257 metrics", Reason.TOO_LARGE),
        ("endless encoded", Reason.TOO_LARGE),
        ("nameless codec", Reason.WRONG_NAMES),
    ):
        cases[name] = (_break(message(), name), reason)
    return cases


def _break(made: pb.Update, how: str) -> pb.Update:
    first, rows = made.dense[0], made.rows[0]
    ids = {"float ids": np.ones(3, dtype=np.float32), "negative ids": np.array([1, 2, -1]), "more ids": np.arange(4)}
    if how == "dtype":
        first.dtype = 13  # type: ignore[assignment]
    elif how == "float64":
        first.CopyFrom(to_tensor(np.zeros(100), first.name))
    elif how == "shape":
        first.shape[0] = 99
    elif how == "axes":
        first.shape.extend([1] * 8)
    elif how == "endless":
        first.CopyFrom(pb.Tensor(name=first.name, dtype=pb.DTYPE_FLOAT32, shape=[0, 2**60]))
    elif how in ("nameless", "long name"):
        first.name = "" if how == "nameless" else "x" * 257
    elif how == "twice":
        made.dense[1].name = first.name
    elif how == "dense and encoded":
        made.encoded[0].name = first.name
    elif how == "table twice":
        made.rows.add().CopyFrom(rows)
    elif how == "metric twice":
        made.task = pb.TASK_EVALUATE
        made.sums.add(name="loss")
    elif how in ids:
        rows.ids.CopyFrom(to_tensor(ids[how]))
    elif how == "flat rows":
        rows.deltas.CopyFrom(to_tensor(np.ones(3, dtype=np.float32)))
    elif how == "endless encoded":
        made.encoded[0].shape.extend([2**40, 2])
    elif how == "nameless codec":
        made.encoded[0].codec = ""
    elif how == "4,097 tensors":
        made.dense.extend([first] * 4_094)
    elif how == "257 tables":
        made.rows.extend([rows] * 256)
    else:
        made.metrics.update({str(i): 0.0 for i in range(256)})
    return made


@pytest.mark.parametrize("what", broken())
def test_what_is_wrong_is_refused_with_its_reason(what: str) -> None:
    made, reason = broken()[what]
    error = refusal(made)
    assert error.reason == reason, error
    assert str(error).startswith("client 7 ")


def test_booleans_are_0_or_1() -> None:
    with pytest.raises(Refused, match="bytes other than 0 and 1"):
        to_array(pb.Tensor(dtype=pb.DTYPE_BOOL, shape=[1], data=b"\2"))


def test_every_reason_of_the_wire_has_its_name_here() -> None:
    assert {f"REFUSAL_REASON_{reason.name}": int(reason) for reason in Reason} == dict(pb.RefusalReason.items())


@pytest.mark.parametrize("reason", checking.Reason)
def test_what_a_round_refuses_a_device_is_told(reason: checking.Reason) -> None:
    told = refusal_of_check(reason, client=7)
    assert told.reason is not Reason.UNSPECIFIED
    assert str(told) == f"client 7: {checking.WORDS[reason]}"
    if reason.name in Reason.__members__:
        assert told.reason.name == reason.name


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_comes_back(reason: Reason) -> None:
    sent = Refused(reason, "the lease ran out", retry_after_seconds=2.5)
    back = Refused.from_message(pb.Refusal.FromString(sent.to_message().SerializeToString()))
    assert (back.reason, str(back), back.retry_after_seconds) == (reason, "the lease ran out", 2.5)


def test_a_reason_of_a_later_version_is_unspecified() -> None:
    assert Refused.from_message(pb.Refusal(reason=99, message="why")).reason is Reason.UNSPECIFIED  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [100, 20_000], ids=["parsed at once", "counted first"])
def test_a_damaged_message_gives_a_refusal_or_a_submission_and_nothing_else(size: int) -> None:
    whole = encode_submission(submission(size=size))
    said: Counter[str] = Counter()
    for seed in range(1_000):
        try:
            decode(damaged(seed, whole))
            said["taken"] += 1
        except Refused as error:
            said[error.reason.name] += 1
    assert "UNSPECIFIED" not in said
    # Turned bits inside of the numbers are found by the digest of the upload, not here.
    assert said.total() == 1_000
    assert len(said) > 4
    assert said["taken"] < 900


@pytest.mark.soak
def test_100_000_damaged_messages_leave_nothing_behind() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    whole = [encode_submission(submission(size=size)) for size in (100, 6_000)]
    said: Counter[str] = Counter()
    for seed in range(101_000):
        if seed == 1_000:  # what the first ones import and grow is not what each leaves
            before = resident()
        try:
            decode(damaged(seed, whole[seed % 2]))
            said["taken"] += 1
        except Refused as error:
            said[error.reason.name] += 1
    assert resident() - before < 10 * MIB
    assert said["taken"] < 60_000
    assert len(said) >= 7


def test_every_beginning_of_a_message_gives_a_refusal_or_a_submission() -> None:
    whole = encode_submission(submission(size=10))
    said: Counter[str] = Counter()
    for length in range(len(whole)):
        try:
            decode(whole[:length])
            said["taken"] += 1
        except Refused as error:
            said[error.reason.name] += 1
    # A message cut between two of its fields is a message: that it was cut short, its size and its digest tell.
    assert said["CORRUPT"] > 0.9 * len(whole) > 300
    assert said["taken"] < 20


def test_a_large_message_that_ends_too_early_is_truncated() -> None:
    whole = encode_submission(submission(size=30_000))
    with pytest.raises(Refused) as caught:
        decode(whole[: len(whole) // 2])
    assert caught.value.reason is Reason.TRUNCATED


def test_a_message_above_the_limit_is_not_even_looked_at() -> None:
    with pytest.raises(Refused, match=r"5,000,000 bytes as one message Update; the limit is 4,194,304") as caught:
        decode(b"\xff" * 5_000_000)
    assert caught.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "part",
    [b"\x4a\x00", b"\x52\x04\x12\x00\x1a\x00", b"\x62\x00", b"\x4a\x0a\x1a\x08" + bytes(8), b"\xf8\x07\x00"],
    ids=["tensors", "rows of tables", "metrics", "numbers in a row", "unknown fields"],
)
def test_a_message_of_empty_parts_is_refused_before_it_is_parsed(part: bytes) -> None:
    program = f"""
import resource
from fedtower.plugins.transports.grpc.codec import decode_submission
from fedtower.plugins.transports.grpc.refusals import Refused
data = {part!r} * ({4 * MIB} // {len(part)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_submission(data, 7, most_bytes=len(data))
except Refused as error:
    print(error.reason.name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reason, kibibytes = child.stdout.split()
    assert reason == "TOO_LARGE"
    assert int(kibibytes) < 10 << 10  # parsed, the first of them take 138 MB


def test_counting_agrees_with_what_was_made() -> None:
    made = message()
    table = bounds.layout(pb.Update.DESCRIPTOR)

    def fields(each: object) -> int:
        total = 0
        for field, value in each.ListFields():  # type: ignore[attr-defined]
            if field.name == "metrics":
                total += 3 * len(value)
            elif field.is_packed:
                total += 1 + sum(1 for _ in value)
            elif field.message_type is not None:
                total += sum(1 + fields(one) for one in (value if field.is_repeated else [value]))
            else:
                total += 1
        return total

    assert bounds.count_fields(made.SerializeToString(), table) == fields(made)


def test_groups_are_refused() -> None:
    data = b"\x0b\x0c" + b"\x4a\x00" * 40_000
    with pytest.raises(Refused, match="wire type 3"):
        bounds.count_fields(data, bounds.layout(pb.Update.DESCRIPTOR))


def test_a_number_of_eleven_bytes_is_refused() -> None:
    with pytest.raises(Refused, match="more than ten bytes"):
        bounds.count_fields(b"\xff" * 12, bounds.layout(pb.Update.DESCRIPTOR))
