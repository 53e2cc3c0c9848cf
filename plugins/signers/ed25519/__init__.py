"""The door of the signer ``ed25519``, and of the command that makes its key."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the signer without importing cryptography."""
    registry.signer(
        "ed25519",
        "fedtower.plugins.signers.ed25519.signer:Ed25519Signer",
        summary="Ed25519 (RFC 8032): 64 bytes a signature, 32 bytes a key",
        capabilities={
            "verifier": "fedtower.plugins.signers.ed25519.verifier:Ed25519Verifier",
            "example": "fedtower.plugins.signers.ed25519.example:example",
        },
    )
    registry.command(
        "keygen",
        "fedtower.plugins.signers.ed25519.command:keygen",
        summary="make the key that a server signs plans with, and devices pin",
    )
