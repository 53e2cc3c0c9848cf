"""The door of the suite ``movielens``, which is in ``suite.toml`` beside this file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the suite."""
    registry.suite(
        "movielens",
        "fedtower.plugins.suites.movielens:suite.toml",
        summary="two towers on MovieLens, federated beside central",
    )
