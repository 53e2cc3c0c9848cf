"""``fedtower keygen``: the key that a server signs with."""

from __future__ import annotations

from pathlib import Path

import click

from fedtower.core.folders import make_folder
from fedtower.plugins.signers.ed25519.signer import make_key


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def keygen(folder: Path) -> None:
    """Make the key that a server signs plans with: FOLDER/signing.pem, and signing.pub, which devices pin.

    The private half stays on the server; only its owner may read the file. Devices are given the public half once, by
    a way that is trusted: whatever it did not sign they do not read.

    \b
    Example:
      fedtower keygen keys
    """
    make_folder(folder)
    signer = make_key(folder / "signing.pem", folder / "signing.pub")
    click.echo(f"{signer.key}: the private key; it stays here")
    click.echo(f"{folder / 'signing.pub'}: the public key; devices get it, as a file or as these letters:")
    click.echo(signer.public_key)
