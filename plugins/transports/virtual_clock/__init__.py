"""The door of the transport ``virtual_clock``: a simulation in which visits take as long as on devices."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the transport."""
    registry.transport(
        "virtual_clock",
        "fedtower.plugins.transports.virtual_clock.transport:VirtualClock",
        summary="a simulation in virtual time: slow devices, drop-outs, day and night",
        capabilities={"asynchronous": True},
    )
