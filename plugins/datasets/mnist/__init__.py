"""MNIST: handwritten digits, from the four official files."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "mnist",
        "fedtower.plugins.datasets.mnist.dataset:MNIST",
        summary="handwritten digits, from the four official files",
        capabilities={"example": "fedtower.plugins.datasets.mnist.example:write"},
    )
