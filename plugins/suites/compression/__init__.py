"""The door of the suite ``compression``, which is in ``suite.toml`` beside this file."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the suite."""
    registry.suite(
        "compression",
        "fedtower.plugins.suites.compression:suite.toml",
        summary="what is learnt against the bytes that go up, for each way to send fewer",
    )
