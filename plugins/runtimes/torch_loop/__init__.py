"""The door of ``torch_loop``, the plain runtime."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the runtime without importing torch."""
    registry.runtime(
        "torch_loop",
        "fedtower.plugins.runtimes.torch_loop.runtime:TorchLoop",
        summary="one client after another, in plain torch: slow, and easy to trust",
    )
