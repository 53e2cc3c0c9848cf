"""The door of the runtime ``mnn``."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the runtime without importing torch or MNN."""
    registry.runtime(
        "mnn",
        "fedtower.plugins.runtimes.mnn.runtime:MnnRuntime",
        summary="the exported train step in MNN, as a device runs it",
        capabilities={"runs": "mnn", "engine": "fedtower.plugins.runtimes.mnn.engine:host"},
    )
