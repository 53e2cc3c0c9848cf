"""The door of ``dlrm``, a model of clicks."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "dlrm",
        "fedtower.plugins.models.dlrm.model:DLRM",
        summary="clicks: dot products between embeddings of categories, and two networks on the device",
        capabilities={"placements": ["cloud", "shared"]},
    )
