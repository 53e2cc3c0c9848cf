"""MNN in its own process: a converted graph, run as it is, on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import MNN
import numpy as np
from numpy.typing import NDArray

from fedtower.recsys.visits import VisitHost

Array = NDArray[Any]


def host() -> VisitHost:
    """What answers in the engine's process."""
    return VisitHost(MnnProgram)


class MnnProgram:
    """A graph as MNN's module; outputs are fed back as they are, without leaving the engine."""

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        # Only a runtime manager keeps MNN to one thread.
        self._manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
        self._outputs = len(outputs)
        self._module = MNN.nn.load_module_from_file(
            str(path), list(inputs), list(outputs), runtime_manager=self._manager
        )
        if self._module is None:
            raise ValueError(f"MNN cannot read {path.name}")

    def put(self, value: Array) -> Any:
        """A constant of the engine."""
        kind = MNN.expr.int if value.dtype.kind in "iu" else MNN.expr.float
        held = MNN.expr.placeholder(list(value.shape), MNN.expr.NCHW, kind)
        if value.size:
            held.write(np.ascontiguousarray(value).reshape(value.shape))
        return held

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one run. MNN says that it could not by giving none."""
        out: Sequence[Any] = self._module.forward(list(values))
        if len(out) != self._outputs:
            raise ValueError(f"MNN gave {len(out)} outputs where {self._outputs} were expected")
        return out

    def get(self, value: Any) -> Array:
        """A copy: MNN's own memory is written over by the next run."""
        return np.array(value.read())
