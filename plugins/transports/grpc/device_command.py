"""``fedtower device``: one device of a federation; ``fedtower swarm``: many of them in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from fedtower.core.cli import pass_registry
from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.hooks import Hooks
from fedtower.core.registry import Registry
from fedtower.core.settings import build
from fedtower.plugins.transports.grpc.caller import BackOff
from fedtower.plugins.transports.grpc.device import Device, Place, Said
from fedtower.plugins.transports.grpc.engines import Engines
from fedtower.plugins.transports.grpc.swarm import Swarm, Tally, summary
from fedtower.plugins.transports.grpc.vanishing import Fate, Vanishing, VanishingDevice
from fedtower.recsys.device import format_of

_SHARED = (
    click.option("--server", required=True, metavar="HOST:PORT", help="Where the server is."),
    click.option(
        "--keys",
        type=click.Path(path_type=Path),
        default=Path("keys"),
        show_default=True,
        help="A folder with authority.pem, the server's, and signing.pub, which is pinned.",
    ),
    click.option("--runtime", default="mnn", show_default=True, help="The runtime whose engine runs the graphs."),
    click.option("--signer", default="ed25519", show_default=True, help="What plans are signed with."),
    click.option("--cache-mb", default=256, show_default=True, type=click.IntRange(min=1), help="Of what is fetched."),
    click.option("--patience", default=300.0, show_default=True, help="Seconds without an answer before it gives up."),
    click.option(
        "--longest-pause",
        default=30.0,
        show_default=True,
        type=click.FloatRange(min=0.2),
        help="Seconds between two tries to reach a server that does not answer, at most.",
    ),
    click.option("--tasks", type=click.IntRange(min=1), help="End after so many tasks; default: with the federation."),
    click.option("--insecure", is_flag=True, help="Plaintext; to a loopback address only."),
    click.option("--json", "as_json", is_flag=True, help="JSON lines, for programs."),
)


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that both commands have."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, dir_okay=False), help="What this device holds: a shard."
)
@click.option("--code", help="An enrolment code, for the first time; see `fedtower enrol codes`.")
@click.option("--folder", type=click.Path(path_type=Path), help="What the device keeps; default: DATA.device.")
@click.option("--certificate", type=click.Path(path_type=Path), help="The device's own certificate (mutual TLS).")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key.")
@_shared
@pass_registry
def device(
    registry: Registry,
    /,
    data: Path,
    code: str | None,
    folder: Path | None,
    certificate: Path | None,
    key: Path | None,
    tasks: int | None,
    as_json: bool,
    **shared: Any,
) -> None:
    """Take part in a federation with the data of one client, until it is over.

    It trains and evaluates in a process of its own, by the graphs that the server publishes and signs.

    \b
    Examples:
      fedtower device --server HOST:7433 --data mine.safetensors --code CODE
      fedtower device --server HOST:7433 --data mine.safetensors
    """
    made = _maker(registry, **shared, certificate=certificate, key=key)
    one = made(data, folder or data.with_suffix(".device"), code, _as_json if as_json else _in_words)
    with one.place.channel() as channel:
        done = one.run(channel, most_tasks=tasks)
    if not as_json:
        click.echo(f"{done} tasks done")


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="A folder of shards, one a device."
)
@click.option("-n", "count", type=click.IntRange(min=1), help="So many devices, from client 0 on; default: all.")
@click.option(
    "--lines",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Connections to the server, shared out among the devices; several intakes are met over several.",
)
@click.option("--first", default=0, show_default=True, type=click.IntRange(min=0), help="The first shard's place.")
@click.option(
    "--codes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of enrolment codes, one a line: that of client 0 first.",
)
@click.option(
    "--vanish",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0.0, 1.0),
    help="In this share of its visits a device is gone without a word, at a stage drawn by chance.",
)
@click.option(
    "--away",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.0, min_open=True),
    help="Seconds until it is back.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Of who vanishes when.")
@click.option("-v", "--verbose", is_flag=True, help="What each device does, too.")
@_shared
@pass_registry
def swarm(
    registry: Registry,
    /,
    data: Path,
    count: int | None,
    lines: int,
    first: int,
    codes: Path | None,
    vanish: float,
    away: float,
    seed: int,
    verbose: bool,
    tasks: int | None,
    as_json: bool,
    **shared: Any,
) -> None:
    """Run many devices in this process, each with its shard, until the federation is over: for trials, and for load.

    They share lines to the server and an engine; each has its own data, token, cache and calls. Every five seconds a
    line says how they fare. A process of Python keeps one core busy at most: start several with --first.

    \b
    Examples:
      fedtower swarm --server HOST:7433 --data shards -n 20 --codes codes
      fedtower swarm --server HOST:7433 --data shards -n 500 --vanish 0.3
    """
    shards = sorted(data.glob("client-*.safetensors"))[first:][:count]
    if not data.is_dir():
        raise DataError(f"there is no folder {data}; `fedtower data shard RECIPE {data}` makes one of shards")
    if not shards or len(shards) < (count or 1):
        raise DataError(
            f"{data} holds {len(shards)} shards, and {count or 1} are needed; `fedtower data shard` writes them"
        )
    given = codes.read_text(encoding="utf-8").split() if codes else []
    made, tally = _maker(registry, **shared), Tally(len(shards))
    say = _as_json if as_json else _in_words if verbose else _not_at_all
    running = Swarm([], tally, _progress_as_json if as_json else _progress)
    draws = Draws(seed).under("vanish")

    def device_of(place: int, path: Path) -> Device:
        client = int(path.stem.rpartition("-")[2])

        def said(word: str, values: dict[str, Any]) -> None:
            tally.told(client, word, values)
            say(word, {"client": client, **values})

        code = given[place] if place < len(given) else None
        one = replace(made(path, path.with_suffix(".device"), code, said), wait=running.wait)
        if not vanish:
            return one
        return VanishingDevice(**vars(one), fate=Fate(Vanishing(vanish, away, draws), client))

    running.devices = [device_of(place, path) for place, path in enumerate(shards, first)]
    with ExitStack() as opened:
        place = running.devices[0].place
        channels = [opened.enter_context(place.channel()) for _ in range(min(lines, len(shards)))]
        running.run(channels, most_tasks=tasks)
    running.say(tally)
    if tally.failed:
        click.echo(summary(tally.failed, len(shards)), err=True)
        raise tally.failed[0]


def _maker(
    registry: Registry,
    *,
    server: str,
    keys: Path,
    runtime: str,
    signer: str,
    cache_mb: int,
    patience: float,
    longest_pause: float,
    insecure: bool,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Callable[[Path, Path, str | None, Said], Device]:
    """Makes devices that differ in what they hold."""
    module, _, name = str(registry.get("signer", signer).capabilities["verifier"]).partition(":")
    verifier = build(getattr(import_module(module), name), {"pinned": [str(keys / "signing.pub")]}, path="--keys")
    authority = None if insecure else keys / "authority.pem"
    place = Place(server, authority, certificate, key, insecure, longest_pause)
    engines = Engines(format_of(registry.get("runtime", runtime)))

    def make(data: Path, folder: Path, code: str | None, said: Said) -> Device:
        return Device(
            place=place,
            data=data,
            folder=folder,
            verifier=verifier,
            registry=registry,
            hooks=Hooks(registry.manager),
            engines=engines,
            code=code,
            cache_bytes=cache_mb << 20,
            back_off=BackOff(most_seconds=longest_pause, give_up_seconds=patience),
            said=said,
        )

    return make


def _as_json(word: str, values: dict[str, Any]) -> None:
    click.echo(json.dumps({"event": word, **values}))


def _progress(tally: Tally) -> None:
    click.echo(tally.line())


def _progress_as_json(tally: Tally) -> None:
    _as_json("progress", tally.counts())


def _not_at_all(word: str, values: dict[str, Any]) -> None:
    pass


def _in_words(word: str, values: dict[str, Any]) -> None:
    click.echo(f"{word}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
