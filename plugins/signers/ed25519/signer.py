"""The server's half: signs with a private key that lies in a file of its own."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedtower.core.errors import StorageError, TrustError
from fedtower.core.secret_files import read_secret, write_secret
from fedtower.plugins.signers.ed25519.verifier import Ed25519Verifier, name_key


@dataclass(frozen=True)
class Ed25519Signer:
    """Signs with the private key in a PEM file (PKCS 8), as :func:`make_key` writes it.

    Raises:
        TrustError: when it first signs: there is no such key, it is of another kind, or others may read it.
    """

    key: Path = field(metadata={"help": "the private key, a PEM file; `fedtower keygen` makes one"})

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        data = read_secret(self.key)
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise TrustError(f"{self.key} holds no private key that can be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(f"{self.key} holds a key of another kind ({type(key).__name__}); Ed25519 it must be")
        return key

    @property
    def key_id(self) -> str:
        """SHA-256 of the public key, in hex."""
        return name_key(self._private.public_key())

    @property
    def public_key(self) -> str:
        """What a device pins: the public key in base64."""
        return base64.b64encode(self._private.public_key().public_bytes_raw()).decode()

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._private.sign(data)

    def verifier(self) -> Ed25519Verifier:
        """What a device has that pinned this key."""
        return Ed25519Verifier((self.public_key,))


def make_key(private: Path, public: Path) -> Ed25519Signer:
    """A new key: its private half in a file that only its owner may read, its public half in one for everybody.

    Raises:
        StorageError: one of the files is there already.
    """
    if public.exists():
        raise StorageError(f"{public} is there already, and a key is not overwritten; remove it, or name another")
    key = Ed25519PrivateKey.generate()
    write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return Ed25519Signer(private)
