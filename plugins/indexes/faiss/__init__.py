"""The door of the index ``faiss``."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the index without importing faiss."""
    registry.index(
        "faiss",
        "fedtower.plugins.indexes.faiss.index:Faiss",
        summary="a part of the items looked at: lists (IVF), quantised lists (SQ8), or a graph (HNSW)",
    )
