"""The door of the suite ``criteo``, which is in ``suite.toml`` beside this file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the suite."""
    registry.suite(
        "criteo",
        "fedtower.plugins.suites.criteo:suite.toml",
        summary="Wide & Deep and DLRM on Criteo's clicks, federated beside central",
    )
