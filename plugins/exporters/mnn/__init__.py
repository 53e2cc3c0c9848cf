"""The door of the exporter ``mnn``."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the exporter without importing torch or MNN."""
    registry.exporter(
        "mnn",
        "fedtower.plugins.exporters.mnn.exporter:MnnExporter",
        summary="ONNX graphs as MNN's own format, for phones",
        capabilities={"suffix": "mnn", "after": ["onnx"]},
    )
