"""Published plans: what a cohort is sent, as a signed artefact.

A plan names everything else by digest: the bundle's files, and one tensor a shared parameter, so that a device fetches
only what it does not hold. Whoever receives one checks its signature over :func:`plan_to_sign` before it is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtower.core.errors import RecipeError
from fedtower.core.plan import FloatArray, LocalSettings, Plan
from fedtower.core.settings import Part, build, plain, settings_of
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.codec import MOST_TABLES, MOST_TENSORS, PROTOCOL, refuse_other_protocol
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import named, to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb

PLAN_BYTES = 4 << 20
"""The largest plan: 4,096 parameters with long names are 1.5 MB."""

MOST_FILES = 256
MOST_TRANSFORMS = 64
_MOST_JSON = 64 << 10
_DIGEST_BYTES = 32
_WHOSE = "the server"


@dataclass(frozen=True)
class Artefact:
    """Bytes by their SHA-256."""

    name: str
    digest: bytes
    size: int

    @classmethod
    def of(cls, name: str, data: bytes) -> Artefact:
        """The artefact that ``data`` is."""
        return cls(name, hashlib.sha256(data).digest(), len(data))

    def check(self, data: bytes) -> bytes:
        """``data``, if it is this artefact; else Refused as ``TRUNCATED`` or ``CORRUPT``."""
        if len(data) != self.size:
            raise Refused(
                Reason.TRUNCATED if len(data) < self.size else Reason.CORRUPT,
                f"the artefact {self.name!r} has {self.size:,} bytes, and {len(data):,} came; fetch it again",
            )
        if hashlib.sha256(data).digest() != self.digest:
            raise Refused(
                Reason.CORRUPT,
                f"the artefact {self.name!r} has not the digest {self.digest.hex()[:16]}...; fetch it again",
            )
        return data


@dataclass(frozen=True)
class RowSource:
    """Rows that a device may fetch by id: how many there are, and how wide one is."""

    name: str
    num_rows: int
    width: int


@dataclass(frozen=True)
class PublishedPlan:
    """A plan as it is published: the visit's settings, and the digests of all that it needs.

    ``parameters`` has one artefact a shared parameter, made by :func:`encode_parameter`. ``norm_bound`` is 0 where
    there is none.
    """

    federation: str
    round: int
    seed: int
    bundle: Artefact
    files: tuple[Artefact, ...]
    parameters: tuple[Artefact, ...]
    local: LocalSettings
    train_rows: bool = True
    rows: tuple[RowSource, ...] = ()
    transforms: tuple[Part, ...] = ()
    norm_bound: float = 0.0
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> bytes:
        """The digest that names the bundle and the shared parameters all together, whatever their order."""
        named = sorted((each.name, each.digest) for each in self.parameters)
        return hashlib.sha256(self.bundle.digest + b"".join(digest + name.encode() for name, digest in named)).digest()

    def plan(self, parameters: Mapping[str, FloatArray]) -> Plan:
        """The plan of a visit, with the parameters that were fetched.

        Raises:
            Refused: ``WRONG_NAMES`` unless they are those that the plan names.
        """
        wanted = {each.name for each in self.parameters}
        if set(parameters) != wanted:
            differ = sorted(set(parameters) ^ wanted)
            raise Refused(
                Reason.WRONG_NAMES, f"round {self.round} has the parameters {sorted(wanted)}; {differ} differ"
            )
        held = {each.name: parameters[each.name] for each in self.parameters}
        return Plan(round=self.round, parameters=held, local=self.local, train_rows=self.train_rows)


def plan_to_sign(data: bytes) -> bytes:
    """What a plan's signature is over: a signature of anything else, by the same key, is none of a plan."""
    return b"fedtower.v1 plan\0" + data


def encode_parameter(name: str, value: FloatArray) -> bytes:
    """The bytes of a parameter's artefact."""
    return to_tensor(value, name).SerializeToString(deterministic=True)


def decode_parameter(artefact: Artefact, data: bytes) -> FloatArray:
    """A parameter of the bytes that were fetched, checked against what the plan says.

    Raises:
        Refused: bytes that are not the artefact, or not a parameter of finite float32 numbers of that name.
    """
    tensor = parse(pb.Tensor, artefact.check(data), most_bytes=artefact.size, whose=_WHOSE)
    array = to_array(tensor, _WHOSE)
    if tensor.name != artefact.name:
        raise Refused(Reason.WRONG_NAMES, f"the artefact of {artefact.name!r} holds {tensor.name!r}")
    if array.dtype != np.float32:
        raise Refused(Reason.WRONG_DTYPE, f"the parameter {artefact.name!r} came as {array.dtype}; float32 it must be")
    if not np.isfinite(array).all():
        raise Refused(Reason.NOT_FINITE, f"the parameter {artefact.name!r} came with NaN or infinity")
    return array


def encode_plan(plan: PublishedPlan) -> bytes:
    """The bytes of a plan; equal plans have equal bytes."""
    message = pb.Plan(
        federation=plan.federation,
        protocol=PROTOCOL,
        round=plan.round,
        seed=plan.seed,
        model=plan.model,
        bundle=_to_message(plan.bundle),
        files=map(_to_message, plan.files),
        parameters=map(_to_message, plan.parameters),
        local_json=_to_json(settings_of(plan.local)),
        train_rows=plan.train_rows,
        rows=[pb.RowSource(name=each.name, num_rows=each.num_rows, width=each.width) for each in plan.rows],
        transforms=[pb.Part(name=each.name, settings_json=_to_json(each.settings)) for each in plan.transforms],
        norm_bound=plan.norm_bound,
        evaluation_json=_to_json(plan.evaluation),
    )
    return message.SerializeToString(deterministic=True)


def decode_plan(data: bytes) -> PublishedPlan:
    """The plan that ``data`` is; its signature is checked before this.

    Raises:
        Refused: with the reason.
    """
    message = parse(pb.Plan, data, most_bytes=PLAN_BYTES, whose=_WHOSE)
    refuse_other_protocol(message.protocol, _WHOSE)
    for what, held, most in (
        ("files", len(message.files), MOST_FILES),
        ("parameters", len(message.parameters), MOST_TENSORS),
        ("sources of rows", len(message.rows), MOST_TABLES),
        ("transforms", len(message.transforms), MOST_TRANSFORMS),
    ):
        if held > most:
            raise Refused(Reason.TOO_LARGE, f"{_WHOSE} sent a plan with {held:,} {what}; the limit is {most:,}")
    plan = PublishedPlan(
        federation=message.federation,
        round=message.round,
        seed=message.seed,
        bundle=_artefact(message.bundle),
        files=_artefacts(message.files),
        parameters=_artefacts(message.parameters),
        local=_local(message.local_json),
        train_rows=message.train_rows,
        rows=tuple(RowSource(named(each.name, "rows", _WHOSE), each.num_rows, each.width) for each in message.rows),
        transforms=tuple(
            Part(named(each.name, "a transform", _WHOSE), _from_json(each.settings_json)) for each in message.transforms
        ),
        norm_bound=message.norm_bound,
        evaluation=_from_json(message.evaluation_json),
    )
    if message.model != plan.model:
        raise Refused(Reason.CORRUPT, f"{_WHOSE} sent a plan whose model is not the one that its artefacts make")
    if not 0 <= plan.norm_bound < np.inf:
        raise Refused(Reason.NOT_FINITE, f"{_WHOSE} sent a plan with the norm bound {plan.norm_bound}")
    return plan


def _to_message(artefact: Artefact) -> pb.Artefact:
    return pb.Artefact(name=artefact.name, digest=artefact.digest, size=artefact.size)


def _artefact(message: pb.Artefact) -> Artefact:
    if len(message.digest) != _DIGEST_BYTES:
        raise Refused(
            Reason.CORRUPT, f"the artefact {message.name!r} has a digest of {len(message.digest)} bytes, not 32"
        )
    return Artefact(named(message.name, "an artefact", _WHOSE), message.digest, message.size)


def _artefacts(messages: Iterable[pb.Artefact]) -> tuple[Artefact, ...]:
    found = tuple(map(_artefact, messages))
    _refuse_repeated(found)
    return found


def _refuse_repeated(artefacts: Sequence[Artefact]) -> None:
    if len({each.name for each in artefacts}) != len(artefacts):
        raise Refused(Reason.WRONG_NAMES, f"{_WHOSE} sent a plan that names one artefact twice")


def _local(text: str) -> LocalSettings:
    try:
        return build(LocalSettings, _from_json(text), path="the plan's local")
    except RecipeError as error:
        raise Refused(
            Reason.CORRUPT, f"{_WHOSE} sent settings of a visit that this fedtower does not know: {error}"
        ) from error


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(plain(values), sort_keys=True, allow_nan=False)


def _from_json(text: str) -> dict[str, Any]:
    if len(text) > _MOST_JSON:
        raise Refused(Reason.TOO_LARGE, f"{_WHOSE} sent settings of {len(text):,} letters; the limit is {_MOST_JSON:,}")
    try:
        values = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.CORRUPT, f"{_WHOSE} sent settings that are not JSON: {error}") from error
    if not isinstance(values, dict):
        raise Refused(Reason.CORRUPT, f"{_WHOSE} sent settings that are no JSON object")
    return values


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
