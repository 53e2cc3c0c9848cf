"""The door of ``lenet5``, a convolutional network."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "lenet5",
        "fedtower.plugins.models.lenet5.model:LeNet5",
        summary="classes of small images: LeNet-5",
        capabilities={"placements": ["shared"]},
    )
