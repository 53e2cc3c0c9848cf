"""The device's half: signatures checked against public keys that were pinned.

Bernstein et al., "High-speed high-security signatures", 2012; as in RFC 8032, https://www.rfc-editor.org/rfc/rfc8032.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedtower.core.errors import TrustError
from fedtower.core.signing import SignatureError

_KEY_BYTES = 32


@dataclass(frozen=True)
class Ed25519Verifier:
    """Accepts what one of the pinned keys has signed.

    Each is a public key as a PEM file, or its 32 bytes in base64. Two are pinned while a server changes from one to the
    other.

    Raises:
        TrustError: none is pinned, or one is no Ed25519 public key.
    """

    pinned: tuple[str, ...] = field(metadata={"help": "public keys: PEM files, or base64 of their 32 bytes"})

    def __post_init__(self) -> None:
        if not self._keys:
            raise TrustError("no key is pinned, so nothing can be verified: give the server's public key")

    @cached_property
    def _keys(self) -> Mapping[str, Ed25519PublicKey]:
        keys = [read_public_key(each) for each in self.pinned]
        return {name_key(key): key for key in keys}

    def verify(self, data: bytes, signature: bytes, key_id: str) -> None:
        """Return if ``signature`` is over ``data``, by the pinned key of that id; else raise SignatureError."""
        key = self._keys.get(key_id)
        if key is None:
            pinned = ", ".join(f"{each[:16]}..." for each in self._keys)
            raise SignatureError(
                f"{len(data):,} bytes came signed by the key {key_id[:16]!r}..., and pinned are {pinned}; has the "
                "server another key, or is it another server?"
            )
        try:
            key.verify(signature, data)
        except InvalidSignature as error:
            raise SignatureError(
                f"{len(data):,} bytes came with a signature that the key {key_id[:16]}... did not make over them: they "
                "were altered on their way, or are not the server's"
            ) from error


def name_key(key: Ed25519PublicKey) -> str:
    """The id of a key: the SHA-256 of its 32 bytes, in hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def read_public_key(pinned: str) -> Ed25519PublicKey:
    """A public key from base64 of its bytes, or else from the PEM file of that name."""
    try:
        raw = base64.b64decode(pinned, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) == _KEY_BYTES:
        return Ed25519PublicKey.from_public_bytes(raw)
    try:
        key = load_pem_public_key(Path(pinned).read_bytes())
    except FileNotFoundError as error:
        raise TrustError(
            f"there is no public key {pinned!r}, as a file or as 44 letters of base64; `fedtower keygen` makes it on "
            f"the server, beside the private one, and each device is given a copy"
        ) from error
    except (OSError, ValueError) as error:
        raise TrustError(
            f"{pinned!r} is neither an Ed25519 public key in base64 (44 letters) nor a PEM file of one: {error}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"{pinned} holds a public key of another kind ({type(key).__name__}); Ed25519 it must be")
    return key
