"""Shards: a folder of one file a client, as ``fedtower data shard`` writes it for devices."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "shards",
        "fedtower.plugins.datasets.shards.dataset:Shards",
        summary="a folder of one file a client, as a deployed federation's devices hold",
        capabilities={"example": "fedtower.plugins.datasets.shards.example:write"},
    )
