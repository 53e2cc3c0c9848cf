"""Settings to try the signer with."""

from __future__ import annotations

from pathlib import Path

from fedtower.plugins.signers.ed25519.signer import make_key


def example(folder: Path) -> dict[str, str]:
    """A new key in ``folder``."""
    return {"key": str(make_key(folder / "signing.pem", folder / "signing.pub").key)}
