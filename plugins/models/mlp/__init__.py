"""The door of ``mlp``, a network of fully connected layers."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "mlp",
        "fedtower.plugins.models.mlp.model:MLP",
        summary="labels from numbers or small images: fully connected layers",
        capabilities={"placements": ["shared"]},
    )
