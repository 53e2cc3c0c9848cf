"""The door of the runtime ``onnx``."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the runtime without importing torch or onnxruntime."""
    registry.runtime(
        "onnx",
        "fedtower.plugins.runtimes.onnx.runtime:OnnxRuntime",
        summary="the exported train step in onnxruntime, as a device runs it",
        capabilities={"runs": "onnx", "engine": "fedtower.plugins.runtimes.onnx.engine:host"},
    )
