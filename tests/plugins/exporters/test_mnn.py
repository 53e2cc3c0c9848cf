"""The exporter ``mnn``: what it promises, and what happens when the converter fails."""

import sys
from pathlib import Path

import pytest

from fedtower.plugins.exporters.mnn.exporter import MnnExporter
from fedtower.recsys.engine import EngineCrashed
from fedtower.recsys.graphs import ExportError
from fedtower.recsys.testing.exporter import ExporterPromises, traced


class TestMnn(ExporterPromises):
    make = MnnExporter


def test_without_an_onnx_file_it_says_what_comes_first(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="name the exporter 'onnx' before 'mnn'"):
        MnnExporter().write(traced("histories"), tmp_path)


def test_a_file_that_is_no_graph_is_refused_or_kills_only_the_converter(tmp_path: Path) -> None:
    (tmp_path / "train.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises((ExportError, EngineCrashed), match="converter"):
        MnnExporter().write(traced("histories"), tmp_path)


def converter_that(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a converter module of our own in the child's way."""
    place = tmp_path / "stand_in"
    place.mkdir()
    (place / "_tools.py").write_text(f"def mnnconvert(words):\n    {code}\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.onnx").write_bytes(b"graph")


def test_a_converter_that_dies_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter_that("import os; os.kill(os.getpid(), 11)", tmp_path, monkeypatch)
    with pytest.raises(EngineCrashed, match="converter died by signal 11"):
        MnnExporter().write(traced("histories"), tmp_path)


def test_a_converter_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter_that("import time; time.sleep(600)", tmp_path, monkeypatch)
    with pytest.raises(EngineCrashed, match=r"did not end within 1.5 seconds"):
        MnnExporter(timeout_seconds=1.5).write(traced("histories"), tmp_path)
