"""The intake's process: ``python -m fedtower.plugins.transports.grpc.serve CONFIG.json``.

It serves the public port until it is told to stop (SIGTERM), and stops when all that it has begun is done.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from prometheus_client import start_http_server

from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part, build
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.intake import Intake, Limits
from fedtower.plugins.transports.grpc.meters import Meters
from fedtower.plugins.transports.grpc.public import SocketRows, public_server
from fedtower.plugins.transports.grpc.rates import RateSettings
from fedtower.plugins.transports.grpc.tls import ServerTls, listen
from fedtower.plugins.transports.grpc.transport import Grpc, rows_address

_log = logging.getLogger("fedtower.intake")
DRAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Address:
    """Where the public port is, and how a device knows that it is this server."""

    host: str
    port: int
    insecure: bool = False
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    metrics_port: int | None = None

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
        limits=Limits(upload_bytes=settings.upload_mb << 20, presence_seconds=settings.presence_seconds),
        log=lambda word, values: _log.info(json.dumps({"event": word, **values})),
    )
    server = public_server(intake, credentials, build(RateSettings, config.get("rates", {}), path="rates"))
    address = build(Address, config["address"], path="address")
    port = address.bind(server)
    await server.start()
    scraped = None
    if address.metrics_port is not None:  # to this machine alone: whoever scrapes from elsewhere has a proxy for it
        scraped, _ = start_http_server(address.metrics_port, "127.0.0.1", intake.meters.registry)
    _write_ready(folder, port)
    stop = asyncio.Event()
    for word in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(word, stop.set)
    await stop.wait()
    await server.stop(DRAIN_SECONDS)  # no new calls; those that run may end
    if scraped is not None:
        scraped.shutdown()
    await channel.close()
    journal.close()
    credentials.close()


def _write_ready(folder: Path, port: int) -> None:
    """Say which port it is, for those that started this."""
    path = folder / "intake.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"port": port}), encoding="utf-8")
    unfinished.replace(path)


def main(path: str) -> None:
    """Serve by the settings in a file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    asyncio.run(serve(config, discover(folder=Path(config["folder"]))))


if __name__ == "__main__":
    main(sys.argv[1])
