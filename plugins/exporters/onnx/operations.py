"""Which operations an exported graph may be made of, and how others are written with them.

An operation stands on the list only after the engines were fed negative numbers, ties and duplicates through it and
gave what numpy gives (the tests do). A graph with any other operation is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

FLOAT, INT, LONG, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
_NUMBERS = {FLOAT, INT, LONG}
_MOST_FOLDED = 1 << 24

Types = Mapping[str, int]
Constants = Mapping[str, NDArray[Any]]


class _Look:
    """A node with what is known of its inputs."""

    def __init__(self, node: onnx.NodeProto, types: Types, constants: Constants) -> None:
        self.node = node
        self.types = [types.get(name) for name in node.input if name]
        self.constants = [constants.get(name) for name in node.input]
        self.out = types.get(node.output[0])
        self.attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}

    def constant(self, place: int) -> NDArray[Any] | None:
        return self.constants[place] if place < len(self.constants) else None


def _numbers(look: _Look) -> str:
    wrong = [each for each in look.types if each not in _NUMBERS]
    return f"on {_names(wrong)}" if wrong else ""


def _floats(look: _Look) -> str:
    wrong = [each for each in look.types if each != FLOAT]
    return f"on {_names(wrong)}" if wrong else ""


def _bools(look: _Look) -> str:
    return "" if all(each == BOOL for each in look.types) else "on other than bool"


def _cast(look: _Look) -> str:
    into = look.attributes["to"]
    if into not in (*_NUMBERS, BOOL) or look.types[0] not in (*_NUMBERS, BOOL):
        return f"to {_names([into])}"
    if into == BOOL and look.types[0] == FLOAT:
        return "from float to bool, which MNN gets wrong"
    return ""


def _equal(look: _Look) -> str:
    # MNN tells -0.0 from 0.0; floats are compared from both sides instead.
    return "on floats, where MNN tells -0.0 from 0.0" if FLOAT in look.types else _numbers(look)


def _reduce(look: _Look) -> str:
    axes = look.constant(1)
    if axes is None or not axes.size:
        return "without axes that are known beforehand, or over none"
    return "" if look.types[0] == FLOAT else f"on {_names(look.types[:1])}"


def _known(place: int) -> Callable[[_Look], str]:
    """The shape, or the places, must be constants."""

    def check(look: _Look) -> str:
        return "" if look.constant(place) is not None else "with a shape or places that the data decide"

    return check


def _slice(look: _Look) -> str:
    steps = look.constant(4)
    if any(look.constant(place) is None for place in (1, 2, 3)):
        return "with places that the data decide"
    return "" if steps is None or (steps == 1).all() else "with a stride"


def _where(look: _Look) -> str:
    if look.types[0] != BOOL or any(each not in _NUMBERS for each in look.types[1:]):
        return f"on {_names(look.types)}"
    return ""


def _any(look: _Look) -> str:
    return ""


VERIFIED: Mapping[str, Callable[[_Look], str]] = {
    **dict.fromkeys(["Add", "Sub", "Mul", "Neg", "Abs"], _numbers),
    **dict.fromkeys(["Div", "MatMul", "Gemm", "Exp", "Log", "Sqrt", "Clip"], _floats),
    **dict.fromkeys(["Relu", "Sigmoid", "Tanh", "Reciprocal", "Sign"], _floats),
    **dict.fromkeys(["Max", "Min"], _floats),
    **dict.fromkeys(["ReduceSum", "ReduceMax", "ReduceMin"], _reduce),
    **dict.fromkeys(["Greater", "GreaterOrEqual", "LessOrEqual"], _numbers),
    **dict.fromkeys(["And", "Or", "Not"], _bools),
    "Equal": _equal,
    "Cast": _cast,
    "Where": _where,
    "Reshape": _known(1),
    "Expand": _known(1),
    "Unsqueeze": _known(1),
    "Squeeze": _known(1),
    "Gather": _known(1),
    "Transpose": _any,
    "Concat": _any,
    "Slice": _slice,
}
"""What an operation must not be like, or nothing: the checks of the verified list."""


def unverified(model: onnx.ModelProto) -> list[str]:
    """The operations of a graph that are not on the list, each with what is wrong with it."""
    types, constants = _types(model), _constants(model)
    found = []
    if model.functions:
        found.append(f"functions {', '.join(each.name for each in model.functions)}")
    for node in model.graph.node:
        if node.domain or node.op_type not in VERIFIED:
            found.append(f"{node.domain}{'.' if node.domain else ''}{node.op_type}")
            continue
        wrong = VERIFIED[node.op_type](_Look(node, types, constants))
        if wrong:
            found.append(f"{node.op_type} {wrong}")
        elif node.op_type in ("Max", "Min") and len(node.input) != 2:
            found.append(f"{node.op_type} of {len(node.input)}")
    return sorted(set(found))


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without what can be known beforehand, without names of places in source files, and with verified
    operations where an equal one is not.
    """
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types, shapes = _types(model), _shapes(model)
    constants = dict(_constants(model))
    aliases: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = aliases.get(name, name)
        _replace(node, types, shapes, constants, aliases)
        if node.op_type == "Constant" or node.output[0] in constants or node.output[0] in aliases:
            continue
        if node.input and all(not name or name in constants for name in node.input):
            folded = _computed(node, constants)
            if sum(value.size for value in folded) <= _MOST_FOLDED:
                constants |= dict(zip(node.output, folded, strict=True))
                continue
        if node.op_type == "Equal" and types[node.input[0]] == FLOAT:
            sides = [f"{node.output[0]}_{word}" for word in ("least", "most")]
            for word, side in zip(("GreaterOrEqual", "LessOrEqual"), sides, strict=True):
                kept.append(helper.make_node(word, list(node.input), [side]))
            node = helper.make_node("And", sides, list(node.output))
        kept.append(node)
    return _clean(model, kept, constants, aliases)


def _replace(
    node: onnx.NodeProto,
    types: Types,
    shapes: Mapping[str, tuple[int, ...]],
    constants: dict[str, NDArray[Any]],
    aliases: dict[str, str],
) -> None:
    """Rewrite one node in place, or note what it is equal to."""
    if node.op_type == "CastLike":
        into = types[node.input[1]]
        node.op_type = "Cast"
        del node.input[1:]
        node.attribute.append(helper.make_attribute("to", into))
    if node.op_type == "Less":  # MNN's float Less is wrong
        node.op_type = "Greater"
        first, second = node.input
        node.input[0], node.input[1] = second, first
    if node.op_type == "Shape" and node.input[0] in shapes:
        start, end = (next((a.i for a in node.attribute if a.name == name), None) for name in ("start", "end"))
        constants[node.output[0]] = np.array(shapes[node.input[0]][start:end], dtype=np.int64)
    same_type = node.op_type == "Cast" and types.get(node.input[0]) == node.attribute[0].i
    if (node.op_type == "Identity" or same_type) and node.input[0] not in constants:
        aliases[node.output[0]] = node.input[0]
    if node.op_type == "Expand" and shapes.get(node.input[0]) == shapes.get(node.output[0], ()):
        aliases[node.output[0]] = node.input[0]


def _computed(node: onnx.NodeProto, constants: Constants) -> list[NDArray[Any]]:
    inputs = [name for name in node.input if name]
    graph = helper.make_graph(
        [node],
        "constant",
        [],
        [helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
        [numpy_helper.from_array(np.asarray(constants[name]), name) for name in dict.fromkeys(inputs)],
    )
    out = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])).run(None, {})
    return [np.asarray(value) for value in out]


def _clean(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: Constants, aliases: Mapping[str, str]
) -> onnx.ModelProto:
    """A new model of these nodes: outputs keep their names, and nothing else is kept that nobody reads."""
    outputs = {each.name for each in model.graph.output}
    given = {each.name for each in model.graph.input}
    for node in nodes:
        node.doc_string, node.name = "", ""
        del node.metadata_props[:]
    produced = {name for node in nodes for name in node.output}
    for name in sorted(outputs - produced):
        # An output that is a constant, an input, or another output needs a node of its own.
        source = aliases.get(name, name)
        zero = f"{name}_zero"
        nodes.append(helper.make_node("Add", [source, zero], [name]))
        constants = {**constants, zero: np.zeros((), dtype=np.float32)}
        if source == name:
            constants = {**constants, f"{name}_value": constants[name]}
            nodes[-1].input[0] = f"{name}_value"
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    graph = helper.make_graph(
        kept[::-1],
        "graph",
        [_plain(each) for each in model.graph.input],
        [_plain(each) for each in model.graph.output],
        [
            numpy_helper.from_array(np.ascontiguousarray(constants[name]).reshape(np.shape(constants[name])), name)
            for name in sorted(needed - given - outputs)
            if name in constants
        ],
    )
    clean = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="fedtower")
    clean.ir_version = 10
    return onnx.shape_inference.infer_shapes(clean, strict_mode=True)


def _plain(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    tensor = value.type.tensor_type
    return helper.make_tensor_value_info(value.name, tensor.elem_type, [each.dim_value for each in tensor.shape.dim])


def _values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*model.graph.value_info, *model.graph.input, *model.graph.output]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    types = {each.name: each.type.tensor_type.elem_type for each in _values(model)}
    return types | {each.name: each.data_type for each in model.graph.initializer}


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    known = {}
    for each in _values(model):
        tensor = each.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            known[each.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return known


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            (attribute,) = node.attribute
            value = helper.get_attribute_value(attribute)
            if isinstance(value, TensorProto):
                held[node.output[0]] = numpy_helper.to_array(value)
            else:
                kind = np.float32 if attribute.name.startswith("value_float") else np.int64
                held[node.output[0]] = np.array(value, dtype=kind)
    return held


def _names(types: list[int | None]) -> str:
    return ", ".join("unknown" if each is None else TensorProto.DataType.Name(each).lower() for each in types)
