"""The door of ``vectorized``, the fast runtime of simulations."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the runtime without importing torch."""
    registry.runtime(
        "vectorized",
        "fedtower.plugins.runtimes.vectorized.runtime:Vectorized",
        summary="many clients at once, in lanes of one compiled step",
    )
