"""``fedtower device``: one device of a federation; ``fedtower swarm``: many of them in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import click

from fedtower.core.cli import pass_registry
from fedtower.core.errors import DataError, FedtowerError
from fedtower.core.hooks import Hooks
from fedtower.core.registry import Registry
from fedtower.core.settings import build
from fedtower.plugins.transports.grpc.caller import BackOff
from fedtower.plugins.transports.grpc.device import Device, Place, Said
from fedtower.plugins.transports.grpc.engines import Engines
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
    click.option("--runtime", default="mnn", show_default=True, help="Whose engine runs the graphs."),
    click.option("--signer", default="ed25519", show_default=True, help="What plans are signed with."),
    click.option("--cache-mb", default=256, show_default=True, type=click.IntRange(min=1), help="Of what is fetched."),
    click.option("--patience", default=300.0, show_default=True, help="Seconds without an answer before it gives up."),
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
      fedtower device --server HOST:7433 --data client-000003.safetensors --code CODE
      fedtower device --server HOST:7433 --data client-000003.safetensors
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
@click.option(
    "--codes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of enrolment codes, one a line: that of client 0 first.",
)
@_shared
@pass_registry
def swarm(
    registry: Registry,
    /,
    data: Path,
    count: int | None,
    lines: int,
    codes: Path | None,
    tasks: int | None,
    as_json: bool,
    **shared: Any,
) -> None:
    """Run many devices in this process, each with its shard, until the federation is over: for trials, and for load.

    They share lines to the server and an engine; each has its own data, token, cache and calls.

    \b
    Example:
      fedtower swarm --server 127.0.0.1:7433 --data shards -n 20 --codes codes
    """
    shards = sorted(data.glob("client-*.safetensors"))[:count]
    if not shards or len(shards) < (count or 1):
        raise DataError(
            f"{data} holds {len(shards)} shards, and {count or 1} are needed; `fedtower data shard` writes them"
        )
    given = codes.read_text(encoding="utf-8").split() if codes else []
    made = _maker(registry, **shared)
    say = _as_json if as_json else _in_words

    def said_by(path: Path) -> Said:
        return lambda word, values: say(word, {"client": int(path.stem.rpartition("-")[2]), **values})

    devices = [
        made(path, path.with_suffix(".device"), given[place] if place < len(given) else None, said_by(path))
        for place, path in enumerate(shards)
    ]
    failed: list[FedtowerError] = []
    with ExitStack() as opened:
        channels = [opened.enter_context(devices[0].place.channel()) for _ in range(min(lines, len(devices)))]
        threads = opened.enter_context(ThreadPoolExecutor(len(devices)))
        pairs = zip(devices, cycle(channels), strict=False)
        for running in [threads.submit(one.run, channel, most_tasks=tasks) for one, channel in pairs]:
            try:
                running.result()
            except FedtowerError as error:
                failed.append(error)
    if failed:
        click.echo(f"{len(failed)} of {len(devices)} devices failed", err=True)
        raise failed[0]


def _maker(
    registry: Registry,
    *,
    server: str,
    keys: Path,
    runtime: str,
    signer: str,
    cache_mb: int,
    patience: float,
    insecure: bool,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Callable[[Path, Path, str | None, Said], Device]:
    """Makes devices that differ in what they hold."""
    module, _, name = str(registry.get("signer", signer).capabilities["verifier"]).partition(":")
    verifier = build(getattr(import_module(module), name), {"pinned": [str(keys / "signing.pub")]}, path="--keys")
    place = Place(server, None if insecure else keys / "authority.pem", certificate, key, insecure)
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
            back_off=BackOff(give_up_seconds=patience),
            said=said,
        )

    return make


def _as_json(word: str, values: dict[str, Any]) -> None:
    click.echo(json.dumps({"event": word, **values}))


def _in_words(word: str, values: dict[str, Any]) -> None:
    click.echo(f"{word}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
