"""Signer and Verifier: the seams by which a device knows that what it is sent comes from its server."""

from __future__ import annotations

from typing import Protocol

from fedtower.core.errors import TrustError


class SignatureError(TrustError):
    """Something is signed by nobody who is trusted here, or was altered after it was signed."""


class Verifier(Protocol):
    """Holds the public keys that are trusted."""

    def verify(self, data: bytes, signature: bytes, key_id: str) -> None:
        """Return if the key ``key_id`` is trusted and has signed just ``data``.

        Raises:
            SignatureError: it is not, or it has not; nothing of ``data`` may be looked at.
        """
        ...


class Signer(Protocol):
    """Holds a private key."""

    @property
    def key_id(self) -> str:
        """Which key this is: short, printable, and the same for the public half."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, without ``data``."""
        ...

    def verifier(self) -> Verifier:
        """The other half: what a device holds that trusts this key and no other."""
        ...
