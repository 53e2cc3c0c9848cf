"""ONNX graphs as MNN files, by MNN's converter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from fedtower.core.errors import MissingDependency
from fedtower.recsys.engine import EngineCrashed, own_path
from fedtower.recsys.graphs import ExportError, Traced


@dataclass(frozen=True)
class MnnExporter:
    """Writes ``NAME.mnn`` from the ``NAME.onnx`` that lies in the same folder."""

    timeout_seconds: float = field(default=300.0, metadata={"help": "after so long the converter is ended"})

    def write(self, graph: Traced, folder: Path) -> Path:
        """The file.

        Raises:
            ExportError: there is no ONNX file to convert, or the converter refused it.
            EngineCrashed: the converter died.
        """
        if find_spec("_tools") is None:
            raise MissingDependency(
                "the exporter 'mnn' needs MNN's converter, which is not installed: pip install 'fedtower[device]'"
            )
        source, target = folder / f"{graph.name}.onnx", folder / f"{graph.name}.mnn"
        if not source.is_file():
            raise ExportError(f"there is no {source} to convert: name the exporter 'onnx' before 'mnn'")
        command = [sys.executable, "-m", "fedtower.plugins.exporters.mnn.converter"]
        environment = {**os.environ, "PYTHONPATH": own_path()}
        with tempfile.TemporaryDirectory(prefix="fedtower-mnn-") as elsewhere:  # it leaves files where it stands
            try:
                done = subprocess.run(
                    [*command, str(source.resolve()), str(target.resolve())],
                    cwd=elsewhere,
                    env=environment,
                    capture_output=True,
                    timeout=self.timeout_seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise EngineCrashed(
                    f"MNN's converter did not end within {self.timeout_seconds:g} seconds on {source}; it was ended"
                ) from error
        said = (done.stdout + done.stderr)[-400:].decode("utf-8", "replace").strip().replace("\n", " | ")
        if done.returncode < 0:
            raise EngineCrashed(f"MNN's converter died by signal {-done.returncode} on {source}; it said: {said}")
        if done.returncode or not target.is_file():
            raise ExportError(f"MNN's converter refused {source}: {said}")
        return target
