"""The door of ``wide_deep``, a model of clicks."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "wide_deep",
        "fedtower.plugins.models.wide_deep.model:WideDeep",
        summary="clicks: a weight for every category in the cloud, and a network on the device",
        capabilities={"placements": ["cloud", "shared"]},
    )
