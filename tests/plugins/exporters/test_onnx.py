"""The exporter ``onnx``: what it promises, the verified operations, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fedtower.core.plan import LocalSettings
from fedtower.core.registry import discover
from fedtower.plugins.exporters.onnx.exporter import OnnxExporter
from fedtower.plugins.exporters.onnx.operations import VERIFIED, rewritten, unverified
from fedtower.recsys.bundle import Graph, Port, digest_of
from fedtower.recsys.device import DeviceGraph
from fedtower.recsys.export import engine_of
from fedtower.recsys.graphs import ExportError, Visit, trace_step
from fedtower.recsys.models import Declared, ExampleTower, linear
from fedtower.recsys.testing.exporter import ExporterPromises, onnx_of, traced

Array = NDArray[Any]
F, INT, B = TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL


class TestOnnx(ExporterPromises):
    make = OnnxExporter


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    assert OnnxExporter().write(traced("histories"), tmp_path).read_bytes() == onnx_of("histories")


@dataclass(frozen=True)
class Trial:
    """One use of an operation: its inputs, what is constant beside them, attributes, and what numpy makes of it."""

    op: str
    inputs: tuple[Array, ...]
    want: Array
    constants: tuple[Array, ...] = ()
    attributes: Mapping[str, Any] | None = None


def floats(*shape: int, seed: int = 0) -> Array:
    """Negative and positive numbers, both zeros, a tie, and numbers far from 1."""
    value = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    flat = value.reshape(-1)
    flat[:6] = [0.0, -0.0, -1.0, -1.0, 1e-8, -300.0]
    return value


def whole(*shape: int) -> Array:
    return np.random.default_rng(1).integers(-3, 4, size=shape).astype(np.int32)


X, Y, POSITIVE = floats(3, 4), floats(3, 4, seed=5)[::-1].copy(), np.abs(floats(3, 4)) + np.float32(0.01)
SMALL = np.clip(X, -4, 4)
N, M, Q = whole(3, 4), whole(3, 4)[::-1].copy(), floats(4, 5, seed=2)
LONG = np.int64
WANTED = np.greater(N, 0)


def axes(*values: int) -> tuple[Array, ...]:
    return (np.array(values, dtype=LONG),)


def slices(start: int, end: int, axis: int) -> tuple[Array, ...]:
    return tuple(np.array([each], dtype=LONG) for each in (start, end, axis, 1))


TRIALS = [
    Trial("Add", (X, Y), X + Y),
    Trial("Add", (N, M), N + M),
    Trial("Sub", (X, Y[:1]), X - Y[:1]),
    Trial("Sub", (N, M[:, :1].copy()), N - M[:, :1]),
    Trial("Mul", (X, Y), X * Y),
    Trial("Mul", (N, M), N * M),
    Trial("Div", (X, POSITIVE), X / POSITIVE),
    Trial("Neg", (X,), -X),
    Trial("Abs", (X,), np.abs(X)),
    Trial("Exp", (SMALL,), np.exp(SMALL)),
    Trial("Log", (POSITIVE,), np.log(POSITIVE)),
    Trial("Sqrt", (POSITIVE,), np.sqrt(POSITIVE)),
    Trial("Reciprocal", (POSITIVE,), 1 / POSITIVE),
    Trial("Relu", (X,), np.maximum(X, 0)),
    Trial("Sigmoid", (SMALL,), 1 / (1 + np.exp(-SMALL))),
    Trial("Tanh", (X,), np.tanh(X)),
    Trial("Sign", (X,), np.sign(X)),
    Trial("Clip", (X,), np.clip(X, -0.5, 0.25), (np.array(-0.5, dtype=np.float32), np.array(0.25, dtype=np.float32))),
    Trial("Max", (X, Y), np.maximum(X, Y)),
    Trial("Min", (X, Y), np.minimum(X, Y)),
    Trial("MatMul", (X, Q), X @ Q),
    Trial("MatMul", (floats(2, 3, 4), floats(2, 4, 3)), floats(2, 3, 4) @ floats(2, 4, 3)),
    Trial("Gemm", (X, Q, Q[0].copy()), X @ Q + Q[0], (), {"alpha": 1.0, "beta": 1.0}),
    Trial("Gemm", (X, Q.T.copy()), X @ Q, (), {"transB": 1}),
    Trial("ReduceSum", (X,), X.sum(axis=1), axes(1), {"keepdims": 0}),
    Trial("ReduceSum", (X,), X.sum(axis=0, keepdims=True), axes(0), {"keepdims": 1}),
    Trial("ReduceSum", (X,), X.sum(), axes(0, 1), {"keepdims": 0}),
    Trial("ReduceMax", (X,), X.max(axis=1, keepdims=True), axes(1), {"keepdims": 1}),
    Trial("ReduceMin", (X,), X.min(axis=0), axes(0), {"keepdims": 0}),
    Trial("Greater", (X, Y), X > Y),
    Trial("Greater", (N, M), N > M),
    Trial("Greater", (X, -X), X > -X),
    Trial("GreaterOrEqual", (X, Y), X >= Y),
    Trial("GreaterOrEqual", (N, M), N >= M),
    Trial("GreaterOrEqual", (X, X[::-1].copy()), X[::-1] <= X),
    Trial("LessOrEqual", (X, Y), X <= Y),
    Trial("LessOrEqual", (N, M), N <= M),
    Trial("Equal", (N, M), N == M),
    Trial("Where", (X, Y), np.where(WANTED, X, Y), (WANTED,)),
    Trial("Cast", (N,), N.astype(np.float32), (), {"to": F}),
    Trial("Cast", (X,), X.astype(np.int32), (), {"to": INT}),
    Trial("Reshape", (X,), X.reshape(2, 6), axes(2, 6)),
    Trial("Expand", (X[:, :1].copy(),), np.broadcast_to(X[:, :1], (3, 4)), axes(3, 4)),
    Trial("Unsqueeze", (X,), X[:, None], axes(1)),
    Trial("Squeeze", (X[:1].copy(),), X[0], axes(0)),
    Trial("Transpose", (floats(2, 3, 4),), floats(2, 3, 4).transpose(2, 0, 1), (), {"perm": [2, 0, 1]}),
    Trial("Concat", (X, Y), np.concatenate([X, Y], axis=1), (), {"axis": 1}),
    Trial("Slice", (X,), X[:, 1:3], slices(1, 3, 1)),
    Trial("Gather", (X,), X[:, [3, 0, 0, 2, 2]], (np.array([3, 0, 0, 2, 2], dtype=LONG),), {"axis": 1}),
]
LOGIC = {"And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not}


@pytest.fixture(scope="module", params=["onnx", "mnn"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """All the trials as one graph, computed once: its outputs by name."""
    folder = tmp_path_factory.mktemp(request.param)
    model, inputs, outputs = one_graph()
    (folder / "trials.onnx").write_bytes(model.SerializeToString())
    if request.param == "mnn":
        command = [sys.executable, "-m", "fedtower.plugins.exporters.mnn.converter"]
        files = [str(folder / "trials.onnx"), str(folder / "trials.mnn")]
        environment = {"PYTHONPATH": ":".join(sys.path)}
        subprocess.run([*command, *files], check=True, cwd=folder, env=environment, capture_output=True)
    path = folder / f"trials.{request.param}"
    ports = Graph(tuple(port for port, _ in inputs), tuple(outputs))
    graph = DeviceGraph(path, digest_of(path), ports, engine_of(request.param, discover()))
    got = graph.compute({(port.role, port.name): value for port, value in inputs})
    return {name: value for (_, name), value in got.items()}


def one_graph() -> tuple[onnx.ModelProto, list[tuple[Port, Array]], list[Port]]:
    """Each trial's inputs are the graph's, so that no converter computes anything beforehand."""
    nodes, inputs, outputs, held = [], [], [], []
    for place, trial in enumerate(all_trials()):
        names = []
        for at, value in enumerate(trial.inputs):
            name = f"in_{place}_{at}"
            inputs.append((port(name, value), value))
            names.append(name)
        constants = [f"held_{place}_{at}" for at in range(len(trial.constants))]
        held += [numpy_helper.from_array(value, name) for value, name in zip(trial.constants, constants, strict=True)]
        ordered = [*constants, *names] if trial.op == "Where" else [*names, *constants]
        if trial.op in LOGIC:  # engines are fed no bools: numbers are compared first
            compared = [f"{name}_is_positive" for name in names]
            zero = f"zero_{place}"
            held.append(numpy_helper.from_array(np.zeros((), dtype=np.int32), zero))
            nodes += [
                helper.make_node("Greater", [name, zero], [out]) for name, out in zip(names, compared, strict=True)
            ]
            ordered = compared
        raw = f"raw_{place}"
        nodes.append(helper.make_node(trial.op, ordered, [raw], **(trial.attributes or {})))
        kind = INT if trial.want.dtype.kind in "ib" else F
        nodes.append(helper.make_node("Cast", [raw], [f"out_{place}"], to=kind))
        outputs.append(port(f"out_{place}", trial.want.astype(np.int32 if kind == INT else np.float32)))
    graph = helper.make_graph(
        nodes,
        "trials",
        [
            helper.make_tensor_value_info(each.port, F if each.dtype == "float32" else INT, each.shape)
            for each, _ in inputs
        ],
        [
            helper.make_tensor_value_info(each.port, F if each.dtype == "float32" else INT, each.shape)
            for each in outputs
        ],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return model, inputs, outputs


def port(name: str, value: Array) -> Port:
    return Port(name, "input", name, value.shape, "float32" if value.dtype == np.float32 else "int32", -(2**31))


def all_trials() -> list[Trial]:
    logic = [
        Trial(op, (N, M)[: 1 if op == "Not" else 2], law(*(each > 0 for each in (N, M)[: 1 if op == "Not" else 2])))
        for op, law in LOGIC.items()
    ]
    return [*TRIALS, *logic]


@pytest.mark.parametrize(
    ("place", "trial"), list(enumerate(all_trials())), ids=[f"{i}-{trial.op}" for i, trial in enumerate(all_trials())]
)
def test_an_operation_gives_what_numpy_gives(place: int, trial: Trial, engine: dict[str, Array]) -> None:
    want = np.asarray(trial.want)
    np.testing.assert_allclose(engine[f"out_{place}"], want.astype(engine[f"out_{place}"].dtype), rtol=1e-5, atol=1e-5)


def test_every_operation_on_the_list_has_a_trial() -> None:
    assert {trial.op for trial in all_trials()} == set(VERIFIED)


def model_of(op: str, kinds: tuple[int, ...], out: int, constants: Mapping[str, Array], **attributes: Any) -> Any:
    names = [f"in{i}" for i in range(len(kinds))]
    graph = helper.make_graph(
        [helper.make_node(op, [*names, *constants], ["out"], **attributes)],
        "graph",
        [helper.make_tensor_value_info(name, kind, [3, 4]) for name, kind in zip(names, kinds, strict=True)],
        [helper.make_tensor_value_info("out", out, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (model_of("Erf", (F,), F, {}), "Erf"),
        (model_of("Less", (F, F), B, {}), "Less"),
        (model_of("Equal", (F, F), B, {}), "Equal on floats"),
        (model_of("Cast", (F,), B, {}, to=B), "Cast from float to bool"),
        (model_of("ReduceSum", (F,), F, {"axes": np.zeros(0, dtype=LONG)}), "ReduceSum without axes"),
        (model_of("ReduceSum", (INT,), INT, {"axes": np.ones(1, dtype=LONG)}), "ReduceSum on int32"),
        (model_of("Max", (F, F, F), F, {}), "Max of 3"),
        (model_of("ReduceL2", (F,), F, {"axes": np.ones(1, dtype=LONG)}), "ReduceL2"),
    ],
)
def test_what_was_not_verified_is_refused(model: onnx.ModelProto, named: str) -> None:
    assert any(named in each for each in unverified(model)), unverified(model)


@pytest.mark.parametrize("op", ["Less", "Equal"])
def test_comparisons_that_engines_get_wrong_are_written_with_others(op: str) -> None:
    model = rewritten(model_of(op, (F, F), B, {}))
    assert not unverified(model)
    assert op not in {node.op_type for node in model.graph.node}


class Cumulative(ExampleTower):
    """A tower with a running sum, which is on no list."""

    def __init__(self) -> None:
        super().__init__()
        self.out = linear(3, 1, torch.Generator().manual_seed(1))

    def logits(self, slots: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.out(torch.cumsum(inputs["dense"], dim=1))[:, 0]
        return logits


@pytest.fixture
def cumulative() -> Any:
    inputs = (
        Port("x0", "input", "dense", (4, 3)),
        Port("x1", "input", "label", (4,)),
        Port("x2", "input", "weight", (4,)),
    )
    return trace_step(Declared(Cumulative()), LocalSettings(steps=1, loss="bce"), Visit((), inputs, None))[0]


def test_a_tower_with_an_operation_that_is_on_no_list_is_refused_by_its_name(cumulative: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="CumSum"):
        OnnxExporter().write(cumulative, tmp_path)
    assert not list(tmp_path.iterdir())
