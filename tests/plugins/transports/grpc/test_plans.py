"""A plan survives the wire, names everything by digest, and what is no plan is refused with a reason."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtower.core.plan import LocalSettings
from fedtower.core.settings import Part
from fedtower.core.signing import SignatureError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.signers.ed25519.signer import Ed25519Signer, make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact, decode_parameter, encode_parameter
from fedtower.plugins.transports.grpc.plans import (
    Messages,
    PublishedPlan,
    RowSource,
    decode_plan,
    encode_plan,
    open_plan,
    sign_plan,
)
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb

W = np.arange(6, dtype=np.float32).reshape(2, 3)

names = st.text(min_size=1, max_size=20)
numbers = st.integers(0, 2**63 - 1)
artefacts = st.builds(Artefact, names, st.binary(min_size=32, max_size=32), numbers)
lists = st.lists(artefacts, max_size=4, unique_by=lambda each: each.name).map(tuple)
settings = st.dictionaries(
    names, st.booleans() | st.integers() | names | st.floats(allow_nan=False, allow_infinity=False)
)
locals_ = st.builds(
    LocalSettings,
    steps=st.integers(1, 9),
    lr=st.floats(0, 10),
    optimizer=st.sampled_from(["sgd", "momentum", "adam", "adagrad"]),
    frozen=st.lists(names, max_size=2).map(tuple),
    negatives_from=st.sampled_from(["untouched", "untrained"]),
    row_lr=st.none() | st.floats(0, 1),
)
plans = st.builds(
    PublishedPlan,
    federation=st.text(max_size=20),
    round=numbers,
    seed=st.integers(-(2**63), 2**63 - 1),
    bundle=artefacts,
    files=lists,
    parameters=lists,
    local=locals_,
    train_rows=st.booleans(),
    rows=st.lists(st.builds(RowSource, names, numbers, numbers), max_size=2).map(tuple),
    transforms=st.lists(st.builds(Part, names, settings), max_size=2).map(tuple),
    norm_bound=st.floats(0, 1e6),
    evaluation=settings,
    messages=st.none()
    | st.builds(
        Messages, download=st.builds(Part, names, settings), round=numbers, differences=st.booleans(), artefacts=lists
    ),
)


def plan() -> PublishedPlan:
    manifest, data = Artefact.of("manifest.json", b"{}"), encode_parameter("w", W)
    parameters = (Artefact.of("w", data), Artefact.of("b", encode_parameter("b", W[0])))
    return PublishedPlan("shops", 3, 20260, manifest, (), parameters, LocalSettings(steps=1))


def message() -> pb.Plan:
    return pb.Plan.FromString(encode_plan(plan()))


@given(plans)
def test_a_plan_comes_back(sent: PublishedPlan) -> None:
    data = encode_plan(sent)
    back = decode_plan(data)
    assert back == sent
    assert encode_plan(back) == data


def test_a_visits_plan_has_the_parameters_in_the_published_order() -> None:
    made = plan().plan({"b": W[0], "w": W})
    assert (made.round, list(made.parameters), made.train_rows) == (3, ["w", "b"], True)
    with pytest.raises(Refused, match=r"\['b'\] differ"):
        plan().plan({"w": W})


def test_the_model_is_named_by_bundle_and_parameters_and_by_nothing_else() -> None:
    one = plan()
    assert replace(one, round=9, parameters=one.parameters[::-1], local=LocalSettings(epochs=2)).model == one.model
    assert replace(one, parameters=one.parameters[:1]).model != one.model
    assert replace(one, bundle=Artefact.of("manifest.json", b"[]")).model != one.model
    renamed = (replace(one.parameters[0], name="v"), one.parameters[1])
    assert replace(one, parameters=renamed).model != one.model


def test_a_parameter_comes_back_bit_by_bit() -> None:
    data = encode_parameter("w", W)
    assert_same_bits(decode_parameter(Artefact.of("w", data), data), W)


@pytest.mark.parametrize(
    ("name", "value", "damage", "reason"),
    [
        ("w", W, lambda data: data[:-1], Reason.TRUNCATED),
        ("w", W, lambda data: data + b"\0", Reason.CORRUPT),
        ("w", W, lambda data: data[:-1] + b"\1", Reason.CORRUPT),
        ("v", W, lambda data: data, Reason.WRONG_NAMES),
        ("w", W.astype(np.float64), lambda data: data, Reason.WRONG_DTYPE),
        ("w", W * np.float32("nan"), lambda data: data, Reason.NOT_FINITE),
    ],
)
def test_a_parameter_that_is_not_the_plans_is_refused(name, value, damage, reason) -> None:
    data = encode_parameter("w", value)
    with pytest.raises(Refused) as caught:
        decode_parameter(Artefact.of(name, data), damage(data))
    assert caught.value.reason is reason


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Ed25519Signer:
    folder = tmp_path_factory.mktemp("keys")
    return make_key(folder / "signing.pem", folder / "signing.pub")


def test_a_signed_plan_is_opened_by_who_pinned_the_key(signer: Ed25519Signer) -> None:
    data, signed = sign_plan(plan(), signer)
    signed = pb.SignedArtefact.FromString(signed.SerializeToString())
    assert open_plan(signed, data, signer.verifier()) == plan()
    assert hashlib.sha256(data).digest() == signed.artefact.digest


def test_nothing_is_parsed_that_the_key_did_not_sign(
    signer: Ed25519Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtower.plugins.transports.grpc.plans.parse", lambda *_, **__: pytest.fail("it was parsed"))
    other = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    data, signed = sign_plan(plan(), signer)
    with pytest.raises(SignatureError):
        open_plan(signed, data, other.verifier())
    with pytest.raises(Refused, match="has not the digest"):
        open_plan(signed, data[:-1] + b"x", signer.verifier())
    altered = Artefact.of("plan", data + b" ")
    signed.artefact.digest, signed.artefact.size = altered.digest, altered.size
    with pytest.raises(SignatureError):
        open_plan(signed, data + b" ", signer.verifier())


def test_a_signature_of_the_same_bytes_for_another_purpose_is_none_of_a_plan(signer: Ed25519Signer) -> None:
    data, signed = sign_plan(plan(), signer)
    signed.signature = signer.sign(data)
    with pytest.raises(SignatureError):
        open_plan(signed, data, signer.verifier())


BROKEN: dict[str, tuple[Callable[[Any], None], Reason]] = {
    "protocol": (lambda it: setattr(it, "protocol", 2), Reason.OTHER_PROTOCOL),
    "model": (lambda it: setattr(it, "model", b"m" * 32), Reason.CORRUPT),
    "digest": (lambda it: setattr(it.bundle, "digest", b"short"), Reason.CORRUPT),
    "nameless": (lambda it: setattr(it.bundle, "name", ""), Reason.WRONG_NAMES),
    "twice": (lambda it: it.parameters.append(it.parameters[0]), Reason.WRONG_NAMES),
    "json": (lambda it: setattr(it, "local_json", "{"), Reason.CORRUPT),
    "nan": (lambda it: setattr(it, "local_json", '{"lr": NaN}'), Reason.CORRUPT),
    "deep": (lambda it: setattr(it, "evaluation_json", "[" * 60_000), Reason.CORRUPT),
    "list": (lambda it: setattr(it, "evaluation_json", "[]"), Reason.CORRUPT),
    "settings": (lambda it: setattr(it, "local_json", '{"stepz": 1}'), Reason.CORRUPT),
    "long": (lambda it: setattr(it, "local_json", " " * 70_000), Reason.TOO_LARGE),
    "bound": (lambda it: setattr(it, "norm_bound", float("nan")), Reason.NOT_FINITE),
    "negative bound": (lambda it: setattr(it, "norm_bound", -1.0), Reason.NOT_FINITE),
    "messages": (lambda it: it.publication.messages.extend([it.bundle] * 65), Reason.TOO_LARGE),
    "download": (lambda it: it.publication.messages.append(it.bundle), Reason.WRONG_NAMES),
    "files": (lambda it: it.files.extend([it.bundle] * 257), Reason.TOO_LARGE),
    "parameters": (lambda it: it.parameters.extend([it.bundle] * 4_096), Reason.TOO_LARGE),
    "rows": (lambda it: it.rows.extend([pb.RowSource()] * 257), Reason.TOO_LARGE),
    "transforms": (lambda it: it.transforms.extend([pb.Part()] * 65), Reason.TOO_LARGE),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_plan_is_refused_with_its_reason(what: str) -> None:
    spoil, reason = BROKEN[what]
    made = message()
    spoil(made)
    with pytest.raises(Refused) as caught:
        decode_plan(made.SerializeToString())
    assert caught.value.reason is reason, caught.value


@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_damaged_plan_gives_a_refusal_or_a_plan_and_nothing_else(noise: bytes, at: int) -> None:
    data = encode_plan(plan())
    try:
        decode_plan(data[:at] + noise + data[at + len(noise) :])
    except Refused as error:
        assert error.reason in Reason  # noqa: PT017
