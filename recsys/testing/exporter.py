"""What every exporter promises: files that an engine computes as torch does, and that say nothing of this machine."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fedtower.core.registry import discover
from fedtower.core.settings import Part
from fedtower.core.store import ClientStore
from fedtower.core.testing.promises import Promises
from fedtower.recsys.bundle import Bundle, Graph, digest_of
from fedtower.recsys.device import DeviceGraph, Format, format_of
from fedtower.recsys.export import Subject, export_model
from fedtower.recsys.graphs import Traced, Visit, trace_step
from fedtower.recsys.learned import Learned
from fedtower.recsys.testing.examples import cases


class ExporterPromises(Promises):
    """``make`` gives an exporter; ``format`` is what runs its files, by default the installed runtime that says so."""

    format: ClassVar[Format | None] = None

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder in which the graph is there as ONNX, for exporters that go on from that."""
        (tmp_path / "train.onnx").write_bytes(onnx_of("histories"))
        return tmp_path

    def test_it_writes_one_file_with_the_name_of_the_graph(self, folder: Path) -> None:
        path = self.made().write(traced("histories"), folder)
        assert path.parent == folder
        assert path.stem == "train"
        assert path.stat().st_size > 0

    def test_the_file_names_nothing_of_this_machine(self, folder: Path) -> None:
        held = self.made().write(traced("histories"), folder).read_bytes()
        for place in (str(folder), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()):
            assert len(place) < 5 or place.encode() not in held

    def test_an_engine_computes_what_torch_computes(self, folder: Path) -> None:
        graph = traced("histories")
        path = self.made().write(graph, folder)
        opened = DeviceGraph(path, digest_of(path), Graph(graph.inputs, graph.outputs), self._format())
        values = [example.numpy() for example in graph.examples]
        got = opened.compute({(port.role, port.name): value for port, value in zip(graph.inputs, values, strict=True)})
        for port, want in zip(graph.outputs, graph.run(values), strict=True):
            np.testing.assert_allclose(got[port.role, port.name], want, rtol=1e-5, atol=1e-5, err_msg=port.name)

    def _format(self) -> Format:
        if self.format is not None:
            return self.format
        registry, mine = discover(folder=Path.cwd()), type(self.made())
        suffix = next(
            offer.capabilities["suffix"]
            for offer in registry.offers("exporter")
            if registry.load("exporter", offer.name) is mine
        )
        return next(
            format_of(offer) for offer in registry.offers("runtime") if offer.capabilities.get("runs") == suffix
        )


@cache
def traced(name: str, optimizer: str = "sgd") -> Traced:
    """The train step of one of the small models."""
    case = cases()[name]
    visit = Visit.of(case.model, case.work(), case.model.cloud.width)
    return trace_step(case.model, case.plan(optimizer=optimizer).local, visit)[0]


@cache
def onnx_of(name: str) -> bytes:
    """The same as ONNX."""
    with tempfile.TemporaryDirectory(prefix="fedtower-") as folder:
        written: Path = discover().make("exporter", Part("onnx")).write(traced(name), Path(folder))
        return written.read_bytes()


_FOLDER = tempfile.TemporaryDirectory(prefix="fedtower-bundles-")


def exported(name: str, optimizer: str = "sgd") -> Bundle:
    """The bundle of one of the small models; it is exported once, and is not to be written to."""
    return _exported(name, optimizer)


@cache
def _exported(name: str, optimizer: str) -> Bundle:
    case = cases()[name]
    local = case.plan(optimizer=optimizer).local
    visit = Visit.of(case.model, case.work(), case.model.cloud.width)
    learned = Learned(case.model, case.model.parameters(), ClientStore(1), None)
    subject = Subject(name, case.model, local, visit)
    out = Path(_FOLDER.name) / f"{name}-{optimizer}"
    return export_model(subject, learned, out, discover(), precisions=("float16", "int8"))
