"""The intake's process: ``python -m fedtower.plugins.transports.grpc.serve CONFIG.json``.

It serves the public port until it is told to stop (SIGTERM). Then it *drains*: it gives out no more tasks, says so to
balancers, and ends when the uploads that are on their way are acknowledged, or after ten seconds. After the last round
it stays until all devices that are there have been told that it is over, for five seconds at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import FedtowerError
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part, build
from fedtower.plugins.transports.grpc.bell import Bell
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.health import Health
from fedtower.plugins.transports.grpc.intake import Intake, Limits
from fedtower.plugins.transports.grpc.meters import Meters
from fedtower.plugins.transports.grpc.public import SocketRows, public_server
from fedtower.plugins.transports.grpc.seats import Seat
from fedtower.plugins.transports.grpc.tls import ServerTls, listen
from fedtower.plugins.transports.grpc.transport import Grpc, rows_address
from fedtower.plugins.transports.grpc.web import Pages, Web
from fedtower.recsys.process_log import ProcessLog
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.status import Watched
from fedtower.recsys.tether import end_with_starter

DRAIN_SECONDS = 10.0
LINGER_SECONDS = 5.0  # after the last round, for devices that are there and have not been told
# The journal's threads have little to do in Python between two system calls, and after each of them they would wait for
# the interpreter as long as Python's own 5 ms while the loop is busy.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class Address:
    """Where the public port is, and how a device knows that it is this server; and where the status page is, if it has
    one.
    """

    host: str
    port: int
    insecure: bool = False
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    status_host: str = "127.0.0.1"
    status_port: int | None = None

    def bind(self, server: grpc.aio.Server) -> int:
        """Add the port to a server; the port that it is.

        Raises:
            TrustError: plaintext that would leave this machine, or a certificate that cannot be used.
        """
        tls = None
        if self.certificate is not None and self.key is not None:
            tls = ServerTls(Path(self.certificate), Path(self.key), Path(self.authority) if self.authority else None)
        return listen(server, f"{self.host}:{self.port}", tls, insecure=self.insecure)


async def serve(config: dict[str, Any], registry: Registry) -> None:
    """Serve until SIGTERM or SIGINT."""
    folder = Path(config["folder"])
    seat = Seat.take(folder)
    log = ProcessLog(folder, seat.name)
    log.catch_others()
    settings: Grpc = build(Grpc, config["transport"], path="transport")
    part = Part(config["journal"]["name"], config["journal"]["settings"])
    journal = registry.make("journal", part, path="journal").open(folder / "journal", config["federation"])
    credentials = Credentials(Path(config["credentials"]))
    channel = grpc.aio.insecure_channel(rows_address(folder))
    intake = Intake(
        folder=folder,
        federation=config["federation"],
        journal=journal,
        rows=SocketRows(channel),
        meters=Meters(),
        registry=registry,
        limits=Limits(
            upload_bytes=settings.upload_mb << 20,
            presence_seconds=settings.presence_seconds,
            silence_seconds=settings.lease_seconds,
        ),
        log=lambda word, values: log.write(word, **values),
    )
    intake.meters.go_on(seat.counted())
    health = Health(intake, seat, lambda word, level, values: log.write(word, level=level, **values))
    address = build(Address, config["address"], path="address")
    web = _web(address, intake, health, folder, registry)
    server = public_server(intake, credentials, settings.rates)
    port = address.bind(server)
    await server.start()
    bell = Bell.hang(folder / "bells", f"intake-{os.getpid()}")
    looking = [asyncio.create_task(health.watch()), asyncio.create_task(intake.watch(bell))]
    page = "" if web is None else web.address
    _write_ready(folder, port, page)
    log.write("started", port=port, page=page, insecure=address.insecure)
    await _told_to_stop()
    log.write("draining", uploads=intake.receiving.uploads)
    seconds = float(config.get("drain_seconds", DRAIN_SECONDS))
    until = time.monotonic() + seconds
    is_whole = await intake.drain(seconds)
    left = max(until - time.monotonic(), 0.0)
    told = {"all_told": await intake.tell_all(min(LINGER_SECONDS, left))} if intake.finished() else {}
    await server.stop(max(until - time.monotonic(), 0.5))  # no new calls; those that run may end
    for task in looking:
        task.cancel()
    await asyncio.wait(looking)
    bell.close()
    log.write("stopped", all_uploads_came=is_whole, **told)
    if web is not None:
        web.close()
    await channel.close()
    journal.close()
    credentials.close()
    health.keep()
    seat.leave()
    log.close()


def _web(address: Address, intake: Intake, health: Health, folder: Path, registry: Registry) -> Web | None:
    """The live page, if there is to be one."""
    if address.status_port is None:
        return None
    watched = Watched(RunFolder(folder), registry, intake.journal)
    pages = Pages(address.status_host, watched.status, health.answer, intake.meters.registry)
    return Web(address.status_host, address.status_port, pages)


async def _told_to_stop() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for word in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(word, stop.set)
    end_with_starter()
    await stop.wait()


def _write_ready(folder: Path, port: int, page: str) -> None:
    """Say which port it is, and where the page is, for those that started this."""
    path = folder / "intake.json"
    unfinished = path.with_suffix(".unfinished")
    with storage_errors(folder):
        unfinished.write_text(json.dumps({"port": port, "page": page}), encoding="utf-8")
        unfinished.replace(path)


def main(path: str) -> int:
    """Serve by the settings in a file; the exit code."""
    sys.setswitchinterval(SWITCH_SECONDS)
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    # Every connection is a file, and most systems begin a process with 1,024: half-open ones would keep devices out.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(serve(config, discover(folder=Path(config["folder"]))))
    except FedtowerError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
