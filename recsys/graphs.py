"""Graphs: the train step and the forward pass of a model as flat graphs of plain operations, traced from the very
functions that train it.

What comes out has no autograd, no optimiser object and no dictionary: tensors in, tensors out, shapes fixed. It is
made of few operations, because each operation that an engine runs has to be verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx import GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from fedtower.core.errors import FedtowerError
from fedtower.core.plan import LocalSettings
from fedtower.core.runtime import Work
from fedtower.recsys.bundle import Initial, Port, RowPort
from fedtower.recsys.decompositions import OVERRIDES
from fedtower.recsys.models import Declared, ExampleTower, SequenceTower
from fedtower.recsys.phases import HEAD
from fedtower.recsys.step import make_step, pure

aten = torch.ops.aten
CANDIDATES = 128
"""How many candidates the forward graph scores at once; more are scored in pieces, fewer are padded."""


class ExportError(FedtowerError):
    """A model cannot be exported: an operation that no engine was verified to run, or a graph that gives other
    numbers than torch.
    """


@dataclass(frozen=True)
class Traced:
    """A graph: its operations, its ports in order, and an example of every input."""

    name: str
    module: GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    examples: tuple[Tensor, ...]

    def run(self, values: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """What torch computes."""
        with torch.no_grad():
            out = self.module(*(torch.from_numpy(np.array(value)) for value in values))
        return [value.numpy() for value in out]


@dataclass(frozen=True)
class Visit:
    """What a visit's data looks like: the ports of its slots and inputs."""

    slots: tuple[Port, ...]
    inputs: tuple[Port, ...]
    rows: RowPort | None

    @classmethod
    def of(cls, model: Declared, work: Work, width: int) -> Visit:
        """The shapes of a block of work; ``width`` is that of a row."""
        slots = tuple(
            Port(f"r{place}", "slot", name, (*value.shape[2:], width))
            for place, (name, value) in enumerate(work.slots.items())
        )
        inputs = tuple(
            Port(
                f"x{place}",
                "input",
                name,
                tuple(value.shape[2:]),
                "float32" if value.dtype.kind == "f" else "int32",
                *_range(model, name, work, slots),
            )
            for place, (name, value) in enumerate(work.inputs.items())
        )
        num_rows = max((table.num_rows for table in model.tables), default=0)
        return cls(slots, inputs, RowPort(model.source, width, num_rows) if slots else None)

    def example(self, seed: int) -> dict[tuple[str, str], Tensor]:
        """Values that a visit might have: negative numbers, and the ends of every range of integers, twice."""
        generator = torch.Generator().manual_seed(seed)
        out: dict[tuple[str, str], Tensor] = {}
        for port in (*self.slots, *self.inputs):
            if port.dtype == "float32":
                value = torch.randn(port.shape, generator=generator)
                if port.name == "weight":
                    value = (value > -1.0).float()
                    value.reshape(-1)[:1] = 1.0
                if port.high is not None:
                    value = torch.randint(port.low or 0, 1 + port.high, port.shape, generator=generator).float()
            else:
                low, high = port.low or 0, 1 if port.high is None else port.high
                value = torch.randint(low, high + 1, port.shape, generator=generator, dtype=torch.int32)
                flat = value.reshape(-1)
                for place, end in enumerate((low, high, low, high)[: len(flat)]):
                    flat[place] = end
            out[port.role, port.name] = value
        return out


def trace_step(model: Declared, local: LocalSettings, visit: Visit) -> tuple[Traced, tuple[Initial, ...]]:
    """``(parameters, state, slots, inputs, lr) -> (parameters', state', slot gradients, loss)`` and how states begin.

    What a step leaves as it was (frozen parameters, say) is no output; what it does not look at is no input.

    Raises:
        ExportError: the step cannot be traced, or a state begins as nothing that a device can make.
    """
    step = make_step(model.shared, local, model.on_device)
    parameters = {name: value.detach().clone() for name, value in model.shared.named_parameters()}
    state = step.init(parameters)
    data = visit.example(1)
    ports = [
        *(Port(f"p{i}", "parameter", name, tuple(value.shape)) for i, (name, value) in enumerate(parameters.items())),
        *(Port(f"s{i}", "state", name, tuple(value.shape)) for i, (name, value) in enumerate(state.items())),
        *visit.slots,
        *visit.inputs,
        Port("lr", "lr", "lr", ()),
    ]
    values = [*parameters.values(), *state.values(), *data.values(), torch.tensor(0.125)]

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        held = _by_role(ports, flat)
        after, moved, slopes, loss = step(
            held["parameter"], held["state"], held["slot"], held["input"], held["lr"]["lr"]
        )
        return (
            *(after[name] for name in parameters),
            *(moved[name] for name in state),
            *(slopes[port.name] for port in visit.slots),
            loss,
        )

    outputs = [
        *(Port(f"np{i}", "parameter", name, tuple(value.shape)) for i, (name, value) in enumerate(parameters.items())),
        *(Port(f"ns{i}", "state", name, tuple(value.shape)) for i, (name, value) in enumerate(state.items())),
        *(Port(f"g{i}", "gradient", port.name, port.shape) for i, port in enumerate(visit.slots)),
        Port("loss", "loss", "loss", ()),
    ]
    return _trace("train", run, ports, outputs, values), _initials(step.init, parameters)


def trace_forward(model: Declared, visit: Visit) -> Traced:
    """Scores of candidates from a history, or logits of examples; the parameters are inputs like the rest.

    Raises:
        ExportError: the tower has neither.
    """
    tower = model.shared
    parameters = {name: value.detach().clone() for name, value in tower.named_parameters()}
    data = visit.example(2)
    ports = [Port(f"p{i}", "parameter", name, tuple(value.shape)) for i, (name, value) in enumerate(parameters.items())]
    values = list(parameters.values())
    if isinstance(tower, SequenceTower) and visit.rows is not None:
        width, names = visit.rows.width, {port.name: port for port in (*visit.slots, *visit.inputs)}
        slots = names["history"].shape[0]
        more = [
            (names["history"], data["slot", "history"]),
            (Port("x0", "input", "target", (1,), "int32", 0, slots), torch.tensor([slots // 2], dtype=torch.int32)),
            (Port("x1", "input", "user", names["user"].shape), data["input", "user"]),
            (Port("c", "candidates", "candidates", (CANDIDATES, width)), torch.randn(CANDIDATES, width)),
        ]
        represent, score = pure(tower, "represent"), pure(tower, "score")
        outputs = [Port("y", "scores", "scores", (CANDIDATES,))]

        def run(*flat: Tensor) -> tuple[Tensor, ...]:
            held = _by_role(ports, flat)
            mine = held["parameter"]
            vectors = represent(mine, held["slot"]["history"], held["input"]["target"], held["input"]["user"])
            return (score(mine, vectors, held["candidates"]["candidates"])[0],)

    elif isinstance(tower, ExampleTower):
        more = [(port, data[port.role, port.name]) for port in (*visit.slots, *visit.inputs)]
        logits = pure(tower, "logits")
        shape = tuple(logits(parameters, *_slots_and_inputs(visit, data)).shape)
        outputs = [Port("y", "scores", "scores", shape)]

        def run(*flat: Tensor) -> tuple[Tensor, ...]:
            held = _by_role(ports, flat)
            return (logits(held["parameter"], held["slot"], held["input"]),)

    else:
        raise ExportError(
            f"{type(tower).__name__} is neither a SequenceTower nor an ExampleTower, so nothing says how it scores"
        )
    ports += [port for port, _ in more]
    return _trace("forward", run, ports, outputs, [*values, *(value for _, value in more)])


def _slots_and_inputs(
    visit: Visit, data: Mapping[tuple[str, str], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {port.name: data["slot", port.name] for port in visit.slots}, {
        port.name: data["input", port.name] for port in visit.inputs
    }


def _range(model: Declared, name: str, work: Work, slots: Sequence[Port]) -> tuple[int | None, int | None]:
    """What whole numbers an input may hold, as far as the kind of tower says."""
    shapes = {port.name: port.shape for port in slots}
    if isinstance(model.shared, SequenceTower) and name == "target":
        return 0, shapes["history"][0] - 1
    if isinstance(model.shared, ExampleTower) and name == "label":
        held = {port.name: torch.zeros(port.shape) for port in slots}
        inputs = {other: torch.zeros(value.shape[2:]) for other, value in work.inputs.items()}
        with torch.no_grad():
            logits = model.shared.logits(held, inputs)
        return 0, logits.shape[1] - 1 if logits.dim() == 2 else 1
    if name == HEAD:
        return 0, 1
    return (None, None) if work.inputs[name].dtype.kind == "f" else (0, None)


def _by_role(ports: Sequence[Port], flat: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
    held: dict[str, dict[str, Tensor]] = {
        role: {} for role in ("parameter", "state", "slot", "input", "lr", "candidates")
    }
    for port, value in zip(ports, flat, strict=True):
        # Towers see the types that they see in every other runtime; a device's integers have 32 bits.
        held[port.role][port.name] = value.long() if port.dtype == "int32" else value
    return held


def _initials(
    init: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], parameters: Mapping[str, Tensor]
) -> tuple[Initial, ...]:
    """What each state is before the first step, told by looking at two sets of parameters."""
    sets = [
        {name: torch.full_like(value, base + place) for place, (name, value) in enumerate(parameters.items())}
        for base in (0.25, 1000.5)
    ]
    one, other = (init(each) for each in sets)
    out = []
    for name, value in one.items():
        shape = tuple(value.shape)
        flat = value.reshape(-1)
        if torch.equal(value, other[name]) and (flat == flat[:1]).all():
            out.append(Initial(name, shape, value=float(flat[0]) if len(flat) else 0.0))
            continue
        same = [
            parameter
            for parameter in parameters
            if torch.equal(value, sets[0][parameter]) and torch.equal(other[name], sets[1][parameter])
        ]
        if not same:
            raise ExportError(f"the optimiser's state {name!r} begins neither as a number nor as a parameter")
        out.append(Initial(name, shape, parameter=same[0]))
    return tuple(out)


def _trace(
    name: str,
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    values: Sequence[Tensor],
) -> Traced:
    table: dict[Any, Callable[..., Any]] = {
        **core_aten_decompositions(),
        **get_decompositions(_ALSO_DECOMPOSED),
        **OVERRIDES,
    }
    # functionalize() and make_fx() carry no types.
    functional: Any = torch.func.functionalize(run, remove="mutations")
    try:
        module = make_fx(functional, decomposition_table=table)(*(value.clone() for value in values))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ExportError(f"the {name} graph cannot be traced: {error}") from error
    _fold(module)
    return _pruned(name, module, inputs, outputs, values)


# Of these, torch's own decompositions are more basic than the core set asks for.
_ALSO_DECOMPOSED = [
    aten._log_softmax,
    aten._log_softmax_backward_data,
    aten._softmax,
    aten._softmax_backward_data,
    aten.elu,
    aten.gelu,
    aten.gelu_backward,
    aten.leaky_relu,
    aten.log_sigmoid_forward,
    aten.native_group_norm,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.rsqrt,
    aten.sigmoid_backward,
    aten.silu,
    aten.softplus,
    aten.softplus_backward,
    aten.tanh_backward,
    aten.threshold_backward,
    aten.var,
    aten.var_mean,
]


def _fold(module: GraphModule) -> None:
    """Compute at once whatever depends on no input, also where only a shape was asked of one; and merge equals."""
    graph = module.graph
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function":
            made = _made_of_shape(node)
            if made is not None:
                known[node] = made
            elif all(each in known for each in node.all_input_nodes):
                args, kwargs = (map_arg(each, lambda held: known[held]) for each in (node.args, node.kwargs))
                known[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        if node in known and node.op == "call_function" and any(user not in known for user in node.users):
            name = f"constant_{node.name}"
            module.register_buffer(name, known[node].detach().clone().contiguous())
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    for node in graph.nodes:
        _whole_sums(node)
    graph.eliminate_dead_code()
    module.recompile()


_OF_A_SHAPE: Mapping[Any, float] = {
    aten.zeros_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_ones.default: 1.0,
}


def _made_of_shape(node: Node) -> Tensor | None:
    like = node.meta.get("val")
    if node.target in (aten.full_like.default, aten.new_full.default):
        fill = node.args[1 if node.target is aten.full_like.default else 2]
    elif node.target in _OF_A_SHAPE:
        fill = _OF_A_SHAPE[node.target]
    else:
        return None
    if not isinstance(like, Tensor) or not isinstance(fill, int | float):
        return None
    return torch.full(tuple(like.shape), fill, dtype=like.dtype)


def _whole_sums(node: Node) -> None:
    """Name the axes of a sum over all of them: an engine takes an empty list as none."""
    if node.target in (aten.sum.dim_IntList, aten.amax.default, aten.amin.default) and isinstance(node.args[0], Node):
        axes = node.args[1] if len(node.args) > 1 else []
        rank = node.args[0].meta["val"].dim()
        if not axes and rank:
            node.args = (node.args[0], list(range(rank)), *node.args[2:])


def _pruned(
    name: str, module: GraphModule, inputs: Sequence[Port], outputs: Sequence[Port], values: Sequence[Tensor]
) -> Traced:
    """Without the inputs that nothing looks at, and the outputs that are an input again, or gradients that are 0."""
    graph = module.graph
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    end = next(node for node in graph.nodes if node.op == "output")
    results = list(end.args[0])
    place_of = {node: place for place, node in enumerate(holders)}
    kept = []
    for port, node in zip(outputs, results, strict=True):
        if node in place_of and (inputs[place_of[node]].role, inputs[place_of[node]].name) == (port.role, port.name):
            continue
        if port.role == "gradient" and node.op == "get_attr" and not getattr(module, str(node.target)).any():
            continue
        kept.append((port, node))
    end.args = (tuple(node for _, node in kept),)
    graph.eliminate_dead_code()
    used = [(port, value, node) for port, value, node in zip(inputs, values, holders, strict=True) if node.users]
    for node in holders:
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return Traced(
        name,
        module,
        tuple(port for port, _, _ in used),
        tuple(port for port, _ in kept),
        tuple(value for _, value, _ in used),
    )
