"""Codec: what one device submits, as the bytes of a message and back.

What is checked here is that the bytes are an update at all: bounded, whole, of this protocol, and arrays that are what
they say. Whether it fits its plan, and whether its numbers are numbers, is for whoever holds the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from fedtower.core.jagged import Encoded
from fedtower.core.updates import FloatArray, IntArray, Rows, Updates
from fedtower.plugins.transports.grpc.bounds import CALL_BYTES, parse, varint
from fedtower.plugins.transports.grpc.lifted import Data, parse_lifted
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import Array, named, shaped, to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.evaluation import MetricSum

PROTOCOL = 1
MOST_TENSORS = 4_096
MOST_TABLES = 256
MOST_METRICS = 256
_PART_DATA = bytes([pb.SubmitPart.DESCRIPTOR.fields_by_name["data"].number << 3 | 2])

Task = Literal["train", "evaluate"]

_TASKS: Mapping[pb.Task.ValueType, Task] = {pb.TASK_TRAIN: "train", pb.TASK_EVALUATE: "evaluate"}


@dataclass(frozen=True)
class Belongs:
    """What an update belongs to, as the device says it: compared with what its lease says before anything counts."""

    federation: str
    model: bytes
    round: int
    lease: bytes
    task: Task = "train"


@dataclass(frozen=True)
class Submission:
    """What one device sends back: its update (a block of one client), and what it belongs to.

    An ``evaluate`` task has ``sums`` by metric, and an update without deltas.
    """

    belongs: Belongs
    updates: Updates
    num_examples: int
    sums: Mapping[str, MetricSum] = field(default_factory=dict)


def encode_submission(submission: Submission) -> bytes:
    """The bytes of a submission; equal ones have equal bytes.

    Raises:
        ValueError: an update of more than one client, or of none.
    """
    updates, belongs = submission.updates, submission.belongs
    if len(updates) != 1:
        raise ValueError(f"a device sends the update of one client, not of {len(updates)}")
    message = pb.Update(
        federation=belongs.federation,
        protocol=PROTOCOL,
        model=belongs.model,
        round=belongs.round,
        lease=belongs.lease,
        task=next(number for number, task in _TASKS.items() if task == belongs.task),
        weight=float(updates.weights[0]),
        num_examples=submission.num_examples,
        dense=[to_tensor(delta[0], name) for name, delta in updates.dense.items()],
        rows=[
            pb.RowDeltas(table=table, ids=to_tensor(_narrow(rows.row_ids)), deltas=to_tensor(rows.row_deltas))
            for table, rows in updates.rows.items()
        ],
        encoded=[
            pb.Encoded(name=name, codec=each.codec, data=each.part(0).tobytes(), shape=each.shape)
            for name, each in updates.encoded.items()
        ],
        metrics={name: float(values[0]) for name, values in updates.metrics.items()},
        sums=[pb.MetricSum(name=name, sum=each.total, count=each.cases) for name, each in submission.sums.items()],
    )
    return message.SerializeToString(deterministic=True)


def data_of_part(part: bytes, whose: str) -> memoryview:
    """What a part of an upload brings, read-only and not copied.

    Raises:
        Refused: it is a header, or no part.
    """
    if part[:1] == _PART_DATA and len(part) <= CALL_BYTES:
        length, at = varint(part, 1, len(part), whose)
        if at + length == len(part):  # nothing else is in it
            return memoryview(part)[at:]
    message = parse(pb.SubmitPart, part, whose=whose)
    if message.WhichOneof("part") != "data":
        raise Refused(Reason.CORRUPT, f"an upload of {whose} has a second header")
    return memoryview(message.data)


def decode_submission(data: bytes | memoryview, client: int, *, most_bytes: int) -> Submission:
    """The submission that ``data`` is, of the client that the lease was given to: a message cannot claim to be another.

    Its arrays are read-only; those of a large one look at ``data`` itself.

    Raises:
        Refused: with the reason.
    """
    whose = f"client {client}"
    message, at = parse_lifted(pb.Update, data, most_bytes=most_bytes, whose=whose)
    refuse_other_protocol(message.protocol, whose)
    for what, held, most in (
        ("tensors", len(message.dense) + len(message.encoded), MOST_TENSORS),
        ("tables", len(message.rows), MOST_TABLES),
        ("metrics", len(message.metrics) + len(message.sums), MOST_METRICS),
    ):
        if held > most:
            raise Refused(Reason.TOO_LARGE, f"{whose} sent {held:,} {what}; the limit is {most:,}")
    _refuse_repeated([*(each.name for each in message.dense), *(each.name for each in message.encoded)], whose)
    _refuse_repeated([each.table for each in message.rows], whose)
    _refuse_repeated([*message.metrics, *(each.name for each in message.sums)], whose)
    return Submission(
        _belongs(message, whose),
        Updates(
            weights=np.array([message.weight]),
            dense={named(each.name, "a delta", whose): _delta(each, at, whose)[None] for each in message.dense},
            rows={named(each.table, "rows of a table", whose): _rows(each, at, whose) for each in message.rows},
            clients=np.array([client], dtype=np.int64),
            rounds=np.array([_whole(message.round, "round", whose)], dtype=np.int64),
            metrics={named(name, "a metric", whose): np.array([value]) for name, value in message.metrics.items()},
            encoded={named(each.name, "a delta", whose): _encoded(each, whose) for each in message.encoded},
        ),
        num_examples=_whole(message.num_examples, "number of examples", whose),
        sums={named(each.name, "a metric", whose): MetricSum(each.sum, each.count) for each in message.sums},
    )


def refuse_other_protocol(protocol: int, whose: str) -> None:
    """Raise Refused unless a peer speaks this version."""
    if protocol != PROTOCOL:
        raise Refused(
            Reason.OTHER_PROTOCOL,
            f"{whose} speaks version {protocol} of the protocol, and version {PROTOCOL} is spoken here; the older of "
            "the two needs another fedtower",
        )


def _belongs(message: pb.Update, whose: str) -> Belongs:
    task = _TASKS.get(message.task)
    if task is None:
        raise Refused(Reason.CORRUPT, f"{whose} sent an update of the task {message.task}, which there is not")
    deltas = len(message.dense) + len(message.rows) + len(message.encoded)
    if task == "evaluate" and deltas:
        raise Refused(
            Reason.WRONG_NAMES, f"{whose} sent {deltas} deltas with an evaluation, which has sums and no more"
        )
    if task == "train" and message.sums:
        raise Refused(Reason.WRONG_NAMES, f"{whose} sent {len(message.sums)} sums of an evaluation with a training")
    return Belongs(message.federation, message.model, _whole(message.round, "round", whose), message.lease, task)


def _delta(tensor: pb.Tensor, at: Data, whose: str) -> FloatArray:
    array = to_array(tensor, whose, at.of(tensor))
    if array.dtype != np.float32:
        raise Refused(Reason.WRONG_DTYPE, f"{whose} sent {tensor.name!r} as {array.dtype}; deltas are float32")
    return array


def _encoded(message: pb.Encoded, whose: str) -> Encoded:
    codec, shape = named(message.codec, "a codec", whose), shaped(message.shape, message.name, whose)
    return Encoded.of(codec, shape, [message.data])


def _rows(message: pb.RowDeltas, at: Data, whose: str) -> Rows:
    ids, deltas = to_array(message.ids, whose, at.of(message.ids)), _delta(message.deltas, at, whose)
    if ids.dtype not in (np.uint32, np.int64):
        raise Refused(
            Reason.WRONG_DTYPE, f"{whose} sent rows of {message.table!r} with ids of {ids.dtype}; int64 they are"
        )
    if ids.ndim != 1 or deltas.ndim != 2 or len(ids) != len(deltas):
        raise Refused(
            Reason.WRONG_SHAPE,
            f"{whose} sent rows of {message.table!r} with ids of shape {ids.shape} and deltas of shape {deltas.shape}; "
            "they are (n,) and (n, width)",
        )
    if len(ids) and ids.min() < 0:
        raise Refused(Reason.ROW_NOT_LEASED, f"{whose} sent the row {ids.min()} of {message.table!r}: ids begin at 0")
    return Rows(np.array([0, len(ids)], dtype=np.int64), ids.astype(np.int64), deltas)


def _narrow(ids: IntArray) -> Array:
    """Ids in 32 bits, if they fit: half of the bytes, and of rows 4 of some 100."""
    fits = not len(ids) or 0 <= ids.min() <= ids.max() <= np.iinfo(np.uint32).max
    return ids.astype(np.uint32) if fits else ids


def _whole(number: int, what: str, whose: str) -> int:
    if number > np.iinfo(np.int64).max:
        raise Refused(Reason.TOO_LARGE, f"{whose} sent the {what} {number}, which is above 2^63")
    return number


def _refuse_repeated(names: Iterable[str], whose: str) -> None:
    held = sorted(names)
    twice = sorted({one for one, other in pairwise(held) if one == other})
    if twice:
        raise Refused(Reason.WRONG_NAMES, f"{whose} sent {twice[0]!r} twice in one update")
