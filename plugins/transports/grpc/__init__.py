"""The door of the transport ``grpc``: a federation whose clients are elsewhere."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the commands of who may take part, without importing grpc or cryptography."""
    registry.transport(
        "grpc",
        "fedtower.plugins.transports.grpc.transport:Grpc",
        summary="devices call over gRPC: TLS, leases, resumable uploads",
        capabilities={"intake": "fedtower.plugins.transports.grpc.serve", "asynchronous": True},
    )
    registry.command(
        "device",
        "fedtower.plugins.transports.grpc.device_command:device",
        summary="take part in a federation with the data of one client",
    )
    registry.command(
        "swarm",
        "fedtower.plugins.transports.grpc.device_command:swarm",
        summary="run many devices in one process, to try a federation or to load it",
    )
    commands = "fedtower.plugins.transports.grpc.commands"
    registry.command("certs", f"{commands}:certs", summary="make a development certificate authority and certificates")
    registry.command("enrol", f"{commands}:enrol", summary="say which devices may take part: codes, a list, revocation")
