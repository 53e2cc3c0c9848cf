"""The door of ``pfedrec``, a score function of each client's own over shared item vectors."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the model without importing torch."""
    registry.model(
        "pfedrec",
        "fedtower.plugins.models.pfedrec.model:PFedRec",
        summary="a score function of each client's own over shared item vectors",
        capabilities={"placements": ["cloud", "device"]},
    )
