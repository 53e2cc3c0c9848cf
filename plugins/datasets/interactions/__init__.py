"""Interactions: anybody's CSV or Parquet file of who touched what."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "interactions",
        "fedtower.plugins.datasets.interactions.dataset:InteractionsFile",
        summary="your own CSV or Parquet file: user, item, and what else it has",
        capabilities={"example": "fedtower.plugins.datasets.interactions.example:write"},
    )
