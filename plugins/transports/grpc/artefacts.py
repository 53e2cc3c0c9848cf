"""Artefacts: bytes named by their SHA-256; a parameter is one, so that what did not change is not fetched again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fedtower.core.plan import FloatArray
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import named, to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb

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


def to_message(artefact: Artefact) -> pb.Artefact:
    """An artefact as others name it."""
    return pb.Artefact(name=artefact.name, digest=artefact.digest, size=artefact.size)


def to_artefact(message: pb.Artefact) -> Artefact:
    """The artefact that a message names. Raises Refused where its digest or name is none."""
    if len(message.digest) != _DIGEST_BYTES:
        raise Refused(
            Reason.CORRUPT, f"the artefact {message.name!r} has a digest of {len(message.digest)} bytes, not 32"
        )
    return Artefact(named(message.name, "an artefact", _WHOSE), message.digest, message.size)
