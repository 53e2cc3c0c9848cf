"""The step of K lanes at once as one flat graph of tensors, traced once for its shapes.

A *lane* holds one client at a time: its parameters, its optimiser's state, its rows. Lanes never mix: nothing is summed
over them, so what a lane computes depends on what is in it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fedtower.recsys.step import Step

Tensors = Mapping[str, Tensor]
Flat = Callable[[Sequence[Tensor]], Sequence[Tensor]]

GROUPS = ("parameters", "states", "rows", "slots", "inputs", "rates", "out")


@dataclass(frozen=True)
class Lanes:
    """The memory of the step of K lanes: everything by name, with the lanes as leading axis.

    ``parameters`` (K, *shape), but (*shape) for those in ``common``, which all lanes have alike; ``states`` the
    optimiser's; ``rows`` (K, R, W); ``slots`` (K, *slots) places in those rows; ``inputs`` (K, *shape); ``rates``
    the learning rates of towers and rows; ``out`` is written by the step: ``losses`` (K,), and see :class:`Kind`.
    """

    parameters: Tensors
    states: Tensors
    rows: Tensors
    slots: Tensors
    inputs: Tensors
    rates: Tensors
    out: Tensors

    def flat(self) -> list[Tensor]:
        """All of it in one list, in an order that depends on the names alone."""
        return [getattr(self, group)[name] for group in GROUPS for name in sorted(getattr(self, group))]

    def like(self, values: Sequence[Tensor]) -> Lanes:
        """The same names with other values, in the order of :meth:`flat`."""
        rest = iter(values)
        return Lanes(**{group: {name: next(rest) for name in sorted(getattr(self, group))} for group in GROUPS})


@dataclass(frozen=True)
class Kind:
    """What distinguishes one traced step from another, apart from shapes.

    A step leaves parameters, states and rows (if they are trained) where it found them, to be found by the next one.
    With ``once`` a visit is a single step from parameters that all lanes have in common. Then the optimiser's state
    begins and ends inside it, and what has been learnt goes to ``out``: as ``parameters/NAME`` the deltas of common
    parameters and what has become of a client's own, as ``rows/SOURCE`` the deltas of rows.
    """

    once: bool
    train_rows: bool


def trace(step: Step, lanes: Lanes, kind: Kind, common: frozenset[str]) -> GraphModule:
    """The step of lanes shaped like ``lanes`` as a graph of tensor operations, backward pass and optimiser included.

    It writes to its arguments, which are those of :meth:`Lanes.flat`, and gives nothing back.
    """

    def flat(*values: Tensor) -> list[Tensor]:
        given = lanes.like(values)
        parameters, states, rows, losses = advance(step, given, kind, common)
        if kind.once:
            deltas = {f"rows/{name}": value - given.rows[name] for name, value in rows.items()}
            for name, value in parameters.items():
                deltas[f"parameters/{name}"] = value - given.parameters[name] if name in common else value
            _write(given.out, deltas)
        else:
            _write({**given.parameters, **given.states}, {**parameters, **states})
            _write(given.rows, rows)
        given.out["losses"].copy_(losses)
        return []

    return as_graph(flat, lanes.flat())


def as_graph(function: Callable[..., list[Tensor]], example: Sequence[Tensor]) -> GraphModule:
    """A function of tensors shaped like ``example`` as a graph of operations."""
    # Fake tensors: tracing costs no arithmetic. What they leave on the nodes would clash with the compiler's own.
    graph = make_fx(function, tracing_mode="fake")(*example)
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    return graph


def _write(places: Tensors, values: Tensors) -> None:
    for name, value in values.items():
        if value is not places[name]:  # a frozen parameter comes out as it went in
            places[name].copy_(value)


def advance(
    step: Step, lanes: Lanes, kind: Kind, common: frozenset[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Every lane one step further: parameters, states, rows, and the losses ``(K,)``."""
    shared = {name: None if name in common else 0 for name in lanes.parameters}
    places, slots = {}, {}
    for rows in lanes.rows.values():
        first = torch.arange(rows.shape[0]) * rows.shape[1]
        for name, where in lanes.slots.items():
            places[name] = where + first.view(-1, *([1] * (where.dim() - 1)))
            slots[name] = rows.flatten(0, 1)[places[name]]

    def one(
        parameters: Tensors, states: Tensors, slots: Tensors, inputs: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
        before = step.init(parameters) if kind.once else states
        return step(parameters, before, slots, inputs, lanes.rates["lr"])

    dims = (shared, 0 if lanes.states else None, 0 if slots else None, 0)
    after, states, slopes, losses = vmap(one, in_dims=dims)(lanes.parameters, lanes.states, slots, lanes.inputs)
    moved = {}
    for source, rows in lanes.rows.items() if kind.train_rows else ():
        where = torch.cat([places[name].flatten() for name in slopes])
        slope = torch.cat([slopes[name].reshape(-1, rows.shape[2]) for name in slopes])
        summed = torch.zeros_like(rows).flatten(0, 1).index_add(0, where, slope)
        moved[source] = rows - lanes.rates["row_lr"] * summed.view_as(rows)
    return after, states, moved, losses
