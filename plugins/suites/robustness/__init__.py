"""The door of the suite ``robustness``, which is in ``suite.toml`` beside this file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the suite."""
    registry.suite(
        "robustness",
        "fedtower.plugins.suites.robustness:suite.toml",
        summary="what attackers do to the model of honest users, under each aggregator",
    )
