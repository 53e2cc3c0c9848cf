"""``fedtower serve``: a recipe over devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from fedtower.core.cli import pass_registry
from fedtower.core.errors import CheckpointError, TrustError
from fedtower.core.registry import Registry
from fedtower.recsys.display import fitted
from fedtower.recsys.opening import opened
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.serving import Door, serve, with_ports
from fedtower.recsys.tether import hold

HOST, PORT, KEYS = "127.0.0.1", 7433, Path("keys")


@click.command(name="serve")
@click.argument("recipe", metavar="NAME-OR-FILE-OR-RUN")
@click.option("-o", "--option", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where run folders are made.",
)
@click.option("--host", default=HOST, show_default=True, help="The address that devices call.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    default=KEYS,
    show_default=True,
    help="The folder that `fedtower certs` made: certificates, the signing key, and who may take part.",
)
@click.option(
    "--intakes",
    default=1,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Processes that share the public port; any journal will do on one machine.",
)
@click.option("--mutual", is_flag=True, help="Devices must show certificates of the folder's authority.")
@click.option("--insecure", is_flag=True, help="Plaintext; on a loopback address only.")
@click.option(
    "--status-port",
    "--metrics-port",
    "status_port",
    default=0,
    type=click.IntRange(0, 65535),
    help="Of the live page, /health, /metrics and /status.json; default: any that is free.",
)
@click.option(
    "--status-host", default=HOST, show_default=True, help="Its address; whoever reaches it may read it, in plaintext."
)
@click.option("--no-status", is_flag=True, help="No live page, health or metrics.")
@click.option("-v", "--verbose", is_flag=True, help="A row for every round.")
@pass_registry
def serve_command(
    registry: Registry,
    recipe: str,
    overrides: tuple[str, ...],
    runs: Path,
    host: str,
    port: int,
    keys: Path,
    intakes: int,
    mutual: bool,
    insecure: bool,
    status_port: int,
    status_host: str,
    no_status: bool,
    verbose: bool,
) -> None:
    """Train a recipe over devices that call; or go on with a RUN that was served before.

    \b
    Examples:
      fedtower certs keys --host 127.0.0.1
      fedtower serve dssm-ml-100k -o cohort.size=10
      fedtower serve runs/dssm-ml-100k-1
    """
    serve_recipe(
        registry,
        recipe,
        overrides,
        runs,
        host=host,
        port=port,
        keys=keys,
        intakes=intakes,
        mutual=mutual,
        insecure=insecure,
        status_port=None if no_status else status_port,
        status_host=status_host,
        verbose=verbose,
    )


def serve_recipe(
    registry: Registry,
    name: str,
    overrides: Sequence[str],
    runs: Path,
    *,
    host: str = HOST,
    port: int = PORT,
    keys: Path = KEYS,
    intakes: int = 1,
    mutual: bool = False,
    insecure: bool = False,
    status_port: int | None = 0,
    status_host: str = HOST,
    verbose: bool = False,
) -> None:
    """Serve a recipe, or go on with a run that was served before, until its last round."""
    door = _door(host, port, keys, mutual=mutual, insecure=insecure)
    door = with_ports(replace(door, status_host=status_host, status_port=status_port))
    console = Console(highlight=False)
    with hold() as tether:
        folder, loaded = opened(name, overrides, runs, keys, registry, tether)
        if folder.is_finished():
            console.print(f"{folder.path} is finished: there is nothing more for devices to do", soft_wrap=True)
            console.print(f"next: fedtower report {folder.path}", soft_wrap=True)
            return
        console.print(f"run: {folder.path}\ndevices call {host}:{door.port}", soft_wrap=True)
        if door.status_port is not None:
            console.print(f"live page: {door.page}", soft_wrap=True)
        with folder.serving():
            serve(
                folder,
                loaded,
                registry,
                door,
                intakes=intakes,
                tether=tether,
                verbose=verbose,
                said=lambda text: console.print(fitted(console, f"note: {text}"), soft_wrap=True),
            )
    console.print(f"next: fedtower report {folder.path}", soft_wrap=True)


def refuse_going_back(folder: RunFolder, start: int | None) -> None:
    """Raise CheckpointError for a round from which a run that was served cannot go on."""
    newest = folder.latest_round() if folder.has_checkpoint() else 0
    if start not in (None, newest):
        raise CheckpointError(
            f"{folder.path} was served to devices and goes on from round {newest}, its newest checkpoint, alone: the "
            f"updates of the rounds before it are let go of, and devices have kept what they made of them. Leave "
            f"--from out; to train on other ways, or when that checkpoint is damaged, begin another run with `fedtower "
            f"serve {folder.path / 'recipe.toml'}`"
        )


def _door(host: str, port: int, keys: Path, *, mutual: bool, insecure: bool) -> Door:
    if insecure:
        return Door(host, port, insecure=True)
    certificate, key, authority = (keys / name for name in ("server.pem", "server.key", "authority.pem"))
    if not certificate.is_file():
        raise TrustError(
            f"there is no certificate {certificate}: `fedtower certs {keys} --host {host}` makes one for trials; on "
            f"this machine alone, --insecure does without"
        )
    return Door(host, port, False, str(certificate), str(key), str(authority) if mutual else None)
