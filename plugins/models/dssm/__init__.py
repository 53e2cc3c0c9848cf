"""The door of ``dssm``, a two-tower model."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "dssm",
        "fedtower.plugins.models.dssm.model:DSSM",
        summary="two towers: items in the cloud, the user's history on the device",
        capabilities={"placements": ["cloud", "shared", "device"]},
    )
