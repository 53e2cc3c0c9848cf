"""Published plans: what a cohort is sent, as a signed artefact.

A plan names everything else by digest: the bundle's files, and one tensor a shared parameter, so that a device fetches
only what it does not hold. Its signature is checked before it is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtower.core.download import MOST_MESSAGES
from fedtower.core.errors import RecipeError
from fedtower.core.plan import FloatArray, LocalSettings, Plan
from fedtower.core.publication import Publication
from fedtower.core.settings import Part, build, plain, settings_of
from fedtower.core.signing import Signer, Verifier
from fedtower.plugins.transports.grpc.artefacts import Artefact, to_artefact, to_message
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.codec import MOST_TABLES, MOST_TENSORS, PROTOCOL, refuse_other_protocol
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import named
from fedtower.protos.v1 import federation_pb2 as pb

PLAN_BYTES = 4 << 20
"""The largest plan: 4,096 parameters with long names are 1.5 MB."""

MOST_FILES = 256
MOST_TRANSFORMS = 64
_MOST_JSON = 64 << 10
_WHOSE = "the server"


@dataclass(frozen=True)
class RowSource:
    """Rows that a device may fetch by id: how many there are, and how wide one is."""

    name: str
    num_rows: int
    width: int


@dataclass(frozen=True)
class Messages:
    """A shorter way to a plan's parameters: what ``download`` makes them of, newest last. It is as long, and good for
    whom, as :class:`~fedtower.core.publication.Publication` says.
    """

    download: Part
    round: int = 0
    differences: bool = False
    artefacts: tuple[Artefact, ...] = ()

    @property
    def publication(self) -> Publication:
        """The same without the bytes."""
        return Publication(self.round, tuple(each.size for each in self.artefacts), self.differences)


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
    run: str = ""
    messages: Messages | None = None

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        """All that the plan names."""
        messages = () if self.messages is None else self.messages.artefacts
        return (self.bundle, *self.files, *self.parameters, *messages)

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
        publication = None if self.messages is None else self.messages.publication
        return Plan(self.round, held, self.local, train_rows=self.train_rows, publication=publication)


def sign_plan(plan: PublishedPlan, signer: Signer) -> tuple[bytes, pb.SignedArtefact]:
    """The bytes of a plan, and what a lease says of them."""
    data = encode_plan(plan)
    artefact = to_message(Artefact.of(f"plan-{plan.round}", data))
    return data, pb.SignedArtefact(artefact=artefact, signature=signer.sign(_signed(data)), key_id=signer.key_id)


def open_plan(signed: pb.SignedArtefact, data: bytes, verifier: Verifier) -> PublishedPlan:
    """The plan that a lease named, of the bytes that were fetched; they are parsed once it is known whose they are.

    Raises:
        Refused: the bytes are not those that the lease named, or no plan.
        SignatureError: they are not signed by a key that ``verifier`` trusts.
    """
    to_artefact(signed.artefact).check(data)
    verifier.verify(_signed(data), signed.signature, signed.key_id)
    return decode_plan(data)


def _signed(data: bytes) -> bytes:
    """What a plan's signature is over: a signature of anything else, by the same key, is none of a plan."""
    return b"fedtower.v1 plan\0" + data


def encode_plan(plan: PublishedPlan) -> bytes:
    """The bytes of a plan; equal plans have equal bytes."""
    message = pb.Plan(
        federation=plan.federation,
        protocol=PROTOCOL,
        round=plan.round,
        seed=plan.seed,
        model=plan.model,
        bundle=to_message(plan.bundle),
        files=map(to_message, plan.files),
        parameters=map(to_message, plan.parameters),
        local_json=_to_json(settings_of(plan.local)),
        train_rows=plan.train_rows,
        rows=[pb.RowSource(name=each.name, num_rows=each.num_rows, width=each.width) for each in plan.rows],
        transforms=map(_to_part, plan.transforms),
        norm_bound=plan.norm_bound,
        evaluation_json=_to_json(plan.evaluation),
        run=plan.run,
        publication=None if plan.messages is None else _to_publication(plan.messages),
    )
    return message.SerializeToString(deterministic=True)


def decode_plan(data: bytes) -> PublishedPlan:
    """The plan that ``data`` is; :func:`open_plan` checks before this whose it is.

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
        ("messages", len(message.publication.messages), MOST_MESSAGES),
    ):
        if held > most:
            raise Refused(Reason.TOO_LARGE, f"{_WHOSE} sent a plan with {held:,} {what}; the limit is {most:,}")
    plan = PublishedPlan(
        federation=message.federation,
        round=message.round,
        seed=message.seed,
        bundle=to_artefact(message.bundle),
        files=_artefacts(message.files),
        parameters=_artefacts(message.parameters),
        local=_local(message.local_json),
        train_rows=message.train_rows,
        rows=tuple(RowSource(named(each.name, "rows", _WHOSE), each.num_rows, each.width) for each in message.rows),
        transforms=tuple(_part(each, "a transform") for each in message.transforms),
        norm_bound=message.norm_bound,
        evaluation=_from_json(message.evaluation_json),
        run=message.run,
        messages=_messages(message.publication) if message.HasField("publication") else None,
    )
    if message.model != plan.model:
        raise Refused(Reason.CORRUPT, f"{_WHOSE} sent a plan whose model is not the one that its artefacts make")
    if not 0 <= plan.norm_bound < np.inf:
        raise Refused(Reason.NOT_FINITE, f"{_WHOSE} sent a plan with the norm bound {plan.norm_bound}")
    return plan


def _to_part(part: Part) -> pb.Part:
    return pb.Part(name=part.name, settings_json=_to_json(part.settings))


def _part(message: pb.Part, what: str) -> Part:
    return Part(named(message.name, what, _WHOSE), _from_json(message.settings_json))


def _to_publication(messages: Messages) -> pb.Publication:
    return pb.Publication(
        download=_to_part(messages.download),
        round=messages.round,
        differences=messages.differences,
        messages=map(to_message, messages.artefacts),
    )


def _messages(message: pb.Publication) -> Messages:
    download = _part(message.download, "a download")
    return Messages(download, message.round, message.differences, _artefacts(message.messages))


def _artefacts(messages: Iterable[pb.Artefact]) -> tuple[Artefact, ...]:
    found = tuple(map(to_artefact, messages))
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
