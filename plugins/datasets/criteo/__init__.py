"""Criteo display advertising: was the advertisement clicked? From the official tab-separated file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "criteo",
        "fedtower.plugins.datasets.criteo.dataset:Criteo",
        summary="clicks on advertisements: 13 numbers, 26 categories, in the official tab-separated layout",
        capabilities={"example": "fedtower.plugins.datasets.criteo.example:write"},
    )
