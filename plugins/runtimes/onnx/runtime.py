"""The runtime ``onnx`` in a simulation: exports the train step of the model it is given, and trains from the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtower.core.plan import LocalSettings
from fedtower.plugins.runtimes.onnx.device import format_of
from fedtower.recsys.exported import ExportedRuntime
from fedtower.recsys.models import Declared


@dataclass(frozen=True)
class OnnxRuntime:
    """Exports on first use, to a cache that is keyed by what was traced."""

    timeout_seconds: float = field(
        default=600.0, metadata={"help": "after so long without an answer the engine is ended"}
    )

    def open(self, model: Declared, local: LocalSettings) -> ExportedRuntime:
        """The runtime for one model and one kind of visit."""
        return ExportedRuntime(model, local, format_of(self.timeout_seconds))
