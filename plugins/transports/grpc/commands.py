"""``fedtower certs`` and ``fedtower enrol``: who may take part in a federation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedtower.core.errors import RecipeError, StorageError
from fedtower.core.folders import make_folder
from fedtower.plugins.transports.grpc.certificates import (
    hosts_of,
    issue_client,
    issue_server,
    make_authority,
    read_authority,
)
from fedtower.plugins.transports.grpc.credentials import Credentials, Device


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME", help="A name or address that devices call; may be repeated."
)
@click.option(
    "--client", "clients", multiple=True, metavar="NAME", help="Also a certificate for this device; may be repeated."
)
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, 3_650), help="How long they are valid.")
@click.option("--renew", is_flag=True, help="New certificates in the place of those that are there.")
def certs(folder: Path, hosts: tuple[str, ...], clients: tuple[str, ...], days: int, renew: bool) -> None:
    """Make a development certificate authority in DIR, and the certificate of a server.

    With --client, also certificates by which devices are known (mutual TLS). The authority is made once; what is there
    is not overwritten. With --renew, the authority signs new certificates for a running server to pick up: for the same
    hosts, unless others are given, or with --client for these devices alone.

    \b
    Examples:
      fedtower certs keys --host federation.example --host 192.0.2.7
      fedtower certs keys --client shop-1 --client shop-2
      fedtower certs keys --renew
    """
    server = folder / "server.pem"
    if not hosts and not clients and not renew:
        raise RecipeError("fedtower certs needs a --host (a name or address that devices call), a --client, or --renew")
    if hosts and server.exists() and not renew:
        raise StorageError(
            f"{server} is there already; --renew makes a new one in its place, and --client adds devices"
        )
    if renew and not (folder / "authority.pem").exists():
        raise StorageError(f"there is nothing to renew in {folder}: no authority was made there")
    make_folder(folder)
    is_new = not (folder / "authority.pem").exists()
    authority = make_authority(folder) if is_new else read_authority(folder)
    if hosts or (renew and not clients):
        issue_server(authority, folder, hosts or hosts_of(server), days, renew=renew)
        _said_of_server(folder, server, days, renewed=renew)
    for name in clients:
        issue_client(authority, folder, name, days, renew=renew)
        click.echo(f"{folder / 'clients' / name}.pem, .key: for the device {name}")
    if clients:
        click.echo(
            f"next: let the server ask for them, with {folder / 'authority.pem'} as their authority; register each:"
        )
        click.echo(f"  fedtower enrol certificate {folder / 'credentials.sqlite'} {clients[0]}")


def _said_of_server(folder: Path, server: Path, days: int, *, renewed: bool) -> None:
    click.echo(f"{server}, .key: for {', '.join(hosts_of(server))}; {days} days")
    if renewed:
        click.echo("a running server uses them from the next connection on; devices need nothing new")
        return
    click.echo(f"to renew: fedtower certs {folder} --renew")
    click.echo("authority.key stays here: whoever has it can be this server")
    click.echo(f"each device gets {folder / 'authority.pem'}, and what `fedtower keygen {folder}` makes")
    click.echo(f"next: fedtower keygen {folder}, then fedtower enrol codes {folder / 'credentials.sqlite'},")
    click.echo(f"      and fedtower serve RECIPE --keys {folder}")


@click.group()
def enrol() -> None:
    """Say which devices may take part: codes to enrol with, a list, and revocation.

    CREDENTIALS is the file that the server reads, credentials.sqlite in the folder of its keys; it may run meanwhile.

    \b
    Examples:
      fedtower enrol codes keys/credentials.sqlite -n 20
      fedtower enrol list keys/credentials.sqlite
    """


_FILE = click.argument("path", metavar="CREDENTIALS", type=click.Path(path_type=Path, dir_okay=False))


@enrol.command(short_help="print new enrolment codes")
@_FILE
@click.option("-n", "--count", default=1, show_default=True, type=click.IntRange(min=1), help="How many codes.")
@click.option(
    "--uses", default=1, show_default=True, type=click.IntRange(min=1), help="How many devices a code is for."
)
@click.option(
    "--first-client",
    type=click.IntRange(min=0),
    help="The client that the device of the first code becomes, and so on.",
)
def codes(path: Path, count: int, uses: int, first_client: int | None) -> None:
    """Print new enrolment codes, one a line; a device that is given one exchanges it for a token of its own.

    Nothing of a code is kept but its hash: it cannot be printed again.

    \b
    Examples:
      fedtower enrol codes keys/credentials.sqlite -n 20 --first-client 0
      fedtower enrol codes keys/credentials.sqlite --uses 500
    """
    for code in _open(path, new=True).make_codes(count, uses=uses, first_client=first_client):
        click.echo(code)


@enrol.command(short_help="make a code worthless")
@_FILE
@click.argument("code")
def withdraw(path: Path, code: str) -> None:
    """Make a CODE worthless that was not used up; its part before the dot is enough.

    \b
    Example:
      fedtower enrol withdraw keys/credentials.sqlite 1f0c7a2e9b3d5a64
    """
    _open(path).withdraw(code)
    click.echo("withdrawn; devices that have used it stay enrolled")


@enrol.command(short_help="register a device by its certificate")
@_FILE
@click.argument("name")
@click.option("--client", type=click.IntRange(min=0), help="The client that the device is; default: the next one.")
def certificate(path: Path, name: str, client: int | None) -> None:
    """Register the device whose certificate has the common name NAME (mutual TLS).

    \b
    Example:
      fedtower enrol certificate keys/credentials.sqlite shop-1 --client 0
    """
    device = _open(path, new=True).register(name, client)
    click.echo(f"device {device.id} is client {device.client}")


@enrol.command("list", short_help="list the devices that are enrolled")
@_FILE
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
def show(path: Path, as_json: bool) -> None:
    """List the devices that are enrolled, and those that were revoked.

    \b
    Example:
      fedtower enrol list keys/credentials.sqlite
    """
    credentials = _open(path)
    devices = credentials.devices()
    if as_json:
        click.echo(json.dumps([asdict(device) for device in devices]))
        return
    table = Table(title=f"devices of {path}", title_justify="left")
    for column in ("client", "device", "name", "by", "state"):
        table.add_column(column, justify="right" if column == "client" else "left")
    for device in devices:
        table.add_row(str(device.client), device.id, device.name, _by(device), device.state)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{len(devices)} enrolled; the codes given out are good for {credentials.codes_left()} more")


@enrol.command(short_help="take a device out")
@_FILE
@click.argument("device")
def revoke(path: Path, device: str) -> None:
    """Take a DEVICE out, by its id: it is refused from its next call on.

    Another code for the same client lets it, or another device, come back in its place.

    \b
    Example:
      fedtower enrol revoke keys/credentials.sqlite 3b1f0c7a2e9b3d5a
    """
    found = _open(path).revoke(device)
    click.echo(f"device {found.id} (client {found.client}) is revoked")


def _by(device: Device) -> str:
    return "a token" if device.certificate is None else "a certificate"


def _open(path: Path, *, new: bool = False) -> Credentials:
    if not new and not path.exists():
        raise StorageError(f"there are no credentials {path}; `fedtower enrol codes {path}` makes the file")
    return Credentials(path)
