"""The door of ``cnn``, a convolutional network."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "cnn",
        "fedtower.plugins.models.cnn.model:CNN",
        summary="classes of small images: the network of the FedAvg paper",
        capabilities={"placements": ["shared"]},
    )
