"""Signer: the seam by which a server signs what devices run, and a device that pinned its key checks it."""

from __future__ import annotations

from typing import Protocol

from fedtower.core.errors import TrustError


class SignatureError(TrustError):
    """A signature is not that of a pinned key over these bytes: nothing may be read of them."""


class Verifier(Protocol):
    """What one holds who pinned public keys; it can sign nothing."""

    def verify(self, data: bytes, signature: bytes, key_id: str) -> None:
        """Return if ``signature`` is over ``data``, by the pinned key of that id.

        Raises:
            SignatureError: it is not, or no such key is pinned.
        """
        ...


class Signer(Protocol):
    """Signs with a key that only the server has."""

    @property
    def key_id(self) -> str:
        """The name of the key, which follows from its public half."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature over ``data``."""
        ...

    def verifier(self) -> Verifier:
        """The other half: what a device has that pinned this key."""
        ...
