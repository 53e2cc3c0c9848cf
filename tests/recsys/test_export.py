"""What is exported is what torch computes, in full or not at all, and holds nothing of the cloud's."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.functional import avg_pool2d, max_pool2d

from fedtower.core.draws import Draws
from fedtower.core.errors import StorageError
from fedtower.core.hooks import Hooks, hookimpl, new_manager
from fedtower.core.plan import Plan, RowSettings
from fedtower.core.registry import discover
from fedtower.core.settings import Part
from fedtower.core.store import ClientStore
from fedtower.plugins.exporters.onnx.exporter import OnnxExporter
from fedtower.plugins.runtimes.onnx.device import open_scorer
from fedtower.recsys import export
from fedtower.recsys import run as api
from fedtower.recsys.bundle import Bundle, Port, read_tensors
from fedtower.recsys.bundle_of_run import export_run, write_request
from fedtower.recsys.export import TOLERANCE, Subject, cached_bundle, export_model
from fedtower.recsys.graphs import ExportError, Traced, Visit, trace_forward, trace_step
from fedtower.recsys.learned import Learned
from fedtower.recsys.models import Declared, ExampleTower, linear
from fedtower.recsys.reranking import read_request, rerank
from fedtower.recsys.step import make_loss, make_step
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.testing.examples import SCHEMA, cases
from fedtower.recsys.testing.exporter import exported

OPTIMIZERS = ["sgd", "momentum", "adagrad", "adam"]
REGISTRY = discover()


def visit(name: str) -> Visit:
    case = cases()[name]
    return Visit.of(case.model, case.work(), case.model.cloud.width)


def subject(name: str) -> Subject:
    case = cases()[name]
    return Subject(name, case.model, case.plan().local, visit(name))


def learned(declared: Declared) -> Learned:
    return Learned(declared, declared.parameters(), ClientStore(1), None)


@pytest.mark.parametrize("name", ["histories", "clicks", "images"])
def test_both_formats_of_both_graphs_were_computed_and_are_close_to_torch(name: str) -> None:
    bundle = exported(name)
    assert set(bundle.manifest.checks) == {
        f"{graph}.{kind}" for graph in ("train", "forward") for kind in ("onnx", "mnn")
    }
    assert max(bundle.manifest.checks.values()) <= TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["histories", "clicks", "images"])
def test_the_traced_step_is_the_step(name: str, optimizer: Any) -> None:
    case = cases()[name]
    local = case.plan(optimizer=optimizer, proximal=0.1).local
    graph, state = trace_step(case.model, local, visit(name))
    values = dict(zip(graph.inputs, graph.examples, strict=True))
    held: dict[str, dict[str, Any]] = {}
    for port, value in values.items():
        held.setdefault(port.role, {})[port.name] = value.long() if port.dtype == "int32" else value
    step = make_step(case.model.shared, local)
    after, moved, slopes, loss = step(
        held["parameter"], held.get("state", {}), held.get("slot", {}), held["input"], held["lr"]["lr"]
    )
    want = {"parameter": after, "state": moved, "gradient": slopes, "loss": {"loss": loss}}
    for port, got in zip(graph.outputs, graph.run([value.numpy() for value in graph.examples]), strict=True):
        np.testing.assert_allclose(got, want[port.role][port.name].numpy(), rtol=1e-4, atol=1e-5, err_msg=port.name)
    parameters = {**case.model.parameters(), **case.model.device_parameters()}
    begun = {each.name: each.fill(parameters) for each in state}
    start = step.init({key: torch.from_numpy(value) for key, value in parameters.items()})
    assert set(begun) == set(start)
    for key, value in start.items():
        np.testing.assert_array_equal(begun[key], value.numpy())


def test_what_a_step_leaves_as_it_was_is_no_output() -> None:
    case = cases()["histories"]
    graph, _ = trace_step(case.model, case.plan(frozen=("history.weight",)).local, visit("histories"))
    assert ("parameter", "history.weight") not in {(port.role, port.name) for port in graph.outputs}
    assert ("parameter", "history.weight") in {(port.role, port.name) for port in graph.inputs}


class Sliding(ExampleTower):
    """A convolution with stride and padding, and a pool of a kind."""

    def __init__(self, pool: Any, **options: Any) -> None:
        super().__init__()
        self.maps = torch.nn.Conv2d(2, 3, 3, **options)
        self.pool = pool
        self.out = linear(3, 4, torch.Generator().manual_seed(1))

    def logits(self, slots: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.pool(torch.tanh(self.maps(inputs["dense"]))).mean(dim=(2, 3)))
        return logits


class Indexing(ExampleTower):
    """Slices with strides, selections, an index with repetitions, and torch's own cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)))
        self.out = linear(4, 4, torch.Generator().manual_seed(1))

    def logits(self, slots: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dense = inputs["dense"].flatten(1)
        rows = self.table[torch.tensor([0, 3, 3, -1])]
        seen = torch.cat([dense[:, 1:9:3], dense[:, -1:], dense[:, 4][:, None]], dim=1)[:, :4]
        parts = self.table[1:, :1].sum() + self.table[::2, 2].sum() * self.table[-1].prod()
        bent = functional.gelu(dense[:, :4] * parts, approximate="tanh")
        logits: torch.Tensor = self.out(torch.relu(seen) * rows[:, 0] + rows.sum(dim=1) + bent)
        return logits

    def losses(self, slots: Any, inputs: Any, loss: str) -> torch.Tensor:
        return functional.cross_entropy(self.logits(slots, inputs), inputs["label"].long(), reduction="none")


class Normalising(ExampleTower):
    """Layer norms over one axis and over two, with and without scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = torch.nn.LayerNorm((9, 9), eps=1e-3), linear(18, 4, torch.Generator().manual_seed(1))
        self.scale = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 4))

    def logits(self, slots: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.both(inputs["dense"]).sum(dim=2).flatten(1))
        return logits + functional.layer_norm(logits, (4,)) + functional.layer_norm(logits, (4,), self.scale)


@pytest.mark.parametrize(
    "tower",
    [
        Sliding(lambda maps: avg_pool2d(maps, 2)),
        Sliding(lambda maps: avg_pool2d(maps, 3, stride=2), padding=1),
        Sliding(lambda maps: max_pool2d(maps, 2), stride=2, padding=2),
        Sliding(lambda maps: max_pool2d(maps, 3, stride=1), dilation=2),
        Indexing(),
        Normalising(),
    ],
    ids=["averages", "overlapping averages", "greatest", "overlapping greatest", "indexing", "norms"],
)
def test_what_torch_leaves_whole_is_taken_apart_without_a_difference(tower: ExampleTower) -> None:
    case = cases()["images"]
    shape = (4, 2, 9, 9)
    seen = Visit(
        (),
        (
            Port("x0", "input", "dense", shape),
            Port("x1", "input", "label", (4,), "float32", 0, 3),
            Port("x2", "input", "weight", (4,)),
        ),
        None,
    )
    graph, _ = trace_step(Declared(tower), case.plan().local, seen)
    values = {port.name: value for port, value in zip(graph.inputs, graph.examples, strict=True)}
    leaves = {name: values[name].clone().requires_grad_() for name, _ in tower.named_parameters()}
    loss = make_loss(tower, case.loss)(leaves, {}, {name: values[name] for name in ("dense", "label", "weight")})
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    got = dict(zip((port.name for port in graph.outputs), graph.run([v.numpy() for v in graph.examples]), strict=True))
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        want = (leaf - values["lr"] * slope).detach().numpy()
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


def step_of(tower: ExampleTower) -> Traced:
    ports = (Port("x0", "input", "dense", (4, 2, 9, 9)), Port("x1", "input", "label", (4,), "float32", 0, 3))
    seen = Visit((), (*ports, Port("x2", "input", "weight", (4,))), None)
    return trace_step(Declared(tower), cases()["images"].plan().local, seen)[0]


def test_layer_norms_are_made_of_verified_operations(tmp_path: Path) -> None:
    assert OnnxExporter().write(step_of(Normalising()), tmp_path).is_file()


def test_what_onnx_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch cannot write the train graph in ONNX: .*prod.*decompose this one"):
        OnnxExporter().write(step_of(Indexing()), tmp_path)


def test_no_bundle_and_no_plan_holds_anything_of_the_cloud() -> None:
    model = REGISTRY.make("model", Part("dssm", {"dim": 8, "item_hidden": 6, "windows": [3]}))
    case = cases()["histories"]
    declared = model.declare(SCHEMA, torch.Generator().manual_seed(7))
    tables = CloudTables(
        declared,
        lambda ids: np.zeros((len(ids), SCHEMA.num_item_features), dtype=np.float32),
        RowSettings(),
        torch.Generator().manual_seed(8),
    )
    seen = Visit.of(declared, case.work(), declared.cloud.width)
    out = Path(exported("histories").path).parent / "cloudless"
    bundle = export_model(
        Subject("dssm", declared, case.plan().local, seen), learned(declared), out, REGISTRY, formats=["onnx"]
    )
    held = read_tensors(bundle.read("weights.safetensors"), "here")
    assert set(held) == set(declared.parameters())
    plan = Plan(1, declared.parameters(), case.plan().local)
    assert set(plan.parameters) == set(held)

    everything = b"".join((bundle.path / name).read_bytes() for name in bundle.manifest.files)
    assert next(iter(held.values())).tobytes() in everything  # the search finds what is there
    cloud = [value.detach().numpy() for value in declared.cloud.parameters()]
    cloud += [value for value in tables.snapshot().values() if value.dtype == np.float32 and value.ndim == 2]
    assert len(cloud) >= 5
    for value in cloud:
        rows = value.reshape(len(value), -1)
        assert not any(row.tobytes() in everything for row in rows if np.unique(row).size > 2)


@dataclass(frozen=True)
class Wrong:
    """An exporter whose graph is right, and of another learning rate."""

    inner: Any

    def write(self, graph: Traced, folder: Path) -> Path:
        place = [port.role for port in graph.inputs].index("parameter")
        node = [node for node in graph.module.graph.nodes if node.op == "placeholder"][place]
        module = copy.deepcopy(graph.module)
        twin = next(other for other in module.graph.nodes if other.name == node.name)
        with module.graph.inserting_after(twin):
            moved = module.graph.call_function(torch.ops.aten.mul.Tensor, (twin, 1.001))
        twin.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        module.recompile()
        path: Path = self.inner.write(replace(graph, module=module), folder)
        return path


def test_a_graph_that_gives_other_numbers_is_not_released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = discover()
    make = registry.make
    monkeypatch.setattr(
        registry,
        "make",
        lambda kind, part, **more: Wrong(make(kind, part)) if kind == "exporter" else make(kind, part, **more),
    )
    with pytest.raises(ExportError, match="gives other numbers than torch"):
        export_model(
            subject("clicks"), learned(subject("clicks").declared), tmp_path / "out", registry, formats=["onnx"]
        )
    assert not list(tmp_path.iterdir())


def test_an_export_into_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is there already"):
        export_model(subject("clicks"), learned(subject("clicks").declared), tmp_path, REGISTRY)


def test_the_hook_stands_around_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Watch:
        @hookimpl(wrapper=True)
        def export(self, folder: Path) -> Generator[None, Any, Any]:
            told.append(("before", folder.exists()))
            bundle = yield
            told.append(("after", isinstance(bundle, Bundle)))
            return bundle

    monkeypatch.setattr(export, "write_graphs", lambda *_: {})
    hooks = Hooks(new_manager())
    hooks.add(Watch(), "watch")
    export_model(subject("clicks"), learned(subject("clicks").declared), tmp_path / "out", REGISTRY, hooks=hooks)
    assert told == [("before", False), ("after", True)]


def test_a_simulation_exports_once_and_again_when_the_cache_was_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    write = export.write_graphs

    def counted(*given: Any) -> dict[str, float]:
        calls.append(1)
        return write(*given)

    monkeypatch.setattr(export, "write_graphs", counted)
    case = cases()["clicks"]
    given = (case.model, case.plan().local, visit("clicks"), "onnx")
    first = cached_bundle(*given, REGISTRY)
    again = cached_bundle(case.model, case.plan(lr=0.7, steps=None, epochs=2).local, *given[2:], REGISTRY)
    assert (len(calls), again.path) == (1, first.path)
    (first.path / "train.onnx").write_bytes(b"")
    cached_bundle(*given, REGISTRY)
    other = cached_bundle(case.model, case.plan(optimizer="momentum").local, *given[2:], REGISTRY)
    assert len(calls) == 3
    assert other.path != first.path
    assert not first.manifest.weights


def test_the_forward_graph_scores_as_the_tower_does() -> None:
    case = cases()["histories"]
    graph = trace_forward(case.model, visit("histories"))
    draws = Draws(3)
    tower = case.model.shared
    history = draws.normal("history", np.arange(7)[:, None], np.arange(8)[None, :]).astype(np.float32)
    candidates = draws.normal("candidates", np.arange(300)[:, None], np.arange(8)[None, :]).astype(np.float32)
    user = draws.normal("user", np.arange(3)).astype(np.float32)
    with torch.no_grad():
        vector = tower.represent(torch.from_numpy(history), torch.tensor([7]), torch.from_numpy(user))  # type: ignore[operator]
        want = tower.score(vector, torch.from_numpy(candidates))[0].numpy()  # type: ignore[operator]
    got = open_scorer(exported("histories").path).score(history, user, candidates)
    assert len(graph.outputs) == 1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_run_is_exported_and_its_bundle_ranks_as_the_run_does(run_root: Path) -> None:
    small = {"rounds": 2, "data.users": 60, "model.dim": 8, "model.user_vector": True, "local.negatives": 20}
    done = api.run("dssm-synthetic", small)
    bundle = export_run(done.folder, run_root / "bundle", REGISTRY, formats=["onnx"])
    user = "3"
    write_request(done.folder, user, 40, run_root / "request", REGISTRY)
    ranked = rerank(open_scorer(bundle.path), read_request(run_root / "request"), 10)
    want = done.recommend(user, 10)
    assert [item for item, _ in ranked] == [each.item for each in want]
    np.testing.assert_allclose([score for _, score in ranked], [each.score for each in want], rtol=1e-4)
    assert bundle.manifest.on_device == ("user_vector",)
    assert len(bundle.manifest.recipe) == 64
