"""Traced graphs as ONNX files, made only of operations that the device engines were verified to run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from fedtower.plugins.exporters.onnx.operations import rewritten, unverified
from fedtower.recsys.graphs import ExportError, Traced


@dataclass(frozen=True)
class OnnxExporter:
    """Writes ``NAME.onnx``."""

    def write(self, graph: Traced, folder: Path) -> Path:
        """The file. Raises ExportError, naming what ONNX does not have, or every operation that is not on the verified
        list.
        """
        model = rewritten(self._converted(graph))
        wrong = unverified(model)
        if wrong:
            raise ExportError(
                f"the {graph.name} graph needs what no device engine was verified to compute: {'; '.join(wrong)}. "
                f"Write the tower or the loss with other operations, or decompose this one in "
                f"fedtower.recsys.decompositions and add it to the list with a test"
            )
        onnx.checker.check_model(model, full_check=True)
        path = folder / f"{graph.name}.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    def _converted(self, graph: Traced) -> onnx.ModelProto:
        try:
            with _quiet():
                program: Any = self._exported(graph)
        except torch.onnx.OnnxExporterError as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.startswith("<class")]
            raise ExportError(
                f"torch cannot write the {graph.name} graph in ONNX: {' '.join(reasons)[:300] or error}; write the "
                f"tower or the loss with other operations, or decompose this one in fedtower.recsys.decompositions"
            ) from error
        model: onnx.ModelProto = program.model_proto
        return model

    def _exported(self, graph: Traced) -> Any:
        return torch.onnx.export(
            graph.module.eval(),
            tuple(value.clone() for value in graph.examples),
            dynamo=True,
            # Its optimiser deletes an addition of 1e-8, and Adam divides by zero.
            optimize=False,
            input_names=[port.port for port in graph.inputs],
            output_names=[port.port for port in graph.outputs],
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns of its own insides, and logs what is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
