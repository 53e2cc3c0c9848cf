"""The door of the suite ``mnist``, which is in ``suite.toml`` beside this file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the suite."""
    registry.suite(
        "mnist",
        "fedtower.plugins.suites.mnist:suite.toml",
        summary="rounds to a given accuracy on handwritten digits, beside the figures of the FedAvg paper",
    )
