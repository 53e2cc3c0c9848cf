"""The door of the exporter ``onnx``."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the exporter without importing torch or onnx."""
    registry.exporter(
        "onnx",
        "fedtower.plugins.exporters.onnx.exporter:OnnxExporter",
        summary="traced graphs as ONNX, of verified operations only",
        capabilities={"suffix": "onnx"},
    )
