"""onnxruntime in its own process, on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fedtower.recsys.visits import VisitHost

Array = NDArray[Any]


def host() -> VisitHost:
    """What answers in the engine's process."""
    return VisitHost(OnnxProgram)


class OnnxProgram:
    """A graph as a session of onnxruntime."""

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # From bytes, so that a graph cannot name other files to be read.
        self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs = list(inputs), list(outputs)

    def put(self, value: Array) -> Any:
        """As it is."""
        return np.ascontiguousarray(value).reshape(value.shape)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one run."""
        out: Sequence[Any] = self._session.run(self._outputs, dict(zip(self._inputs, values, strict=True)))
        return out

    def get(self, value: Any) -> Array:
        """As it is."""
        return np.asarray(value)
