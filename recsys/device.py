"""DeviceRuntime: trains from a bundle, in an engine's process, without torch; every value is checked before it is
fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.offers import Offer
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Work, as_updates
from fedtower.core.updates import Updates
from fedtower.recsys.bundle import Bundle, BundleError, Graph, InputError, Manifest, Port, Precision
from fedtower.recsys.engine import Engine, EngineError

Array = NDArray[Any]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

_BLOCK = 64  # clients a message: what is in flight is bounded by it, and not by the cohort


@dataclass(frozen=True)
class Format:
    """A file format of graphs and the engine that runs it: ``target`` gives the host in the engine's process."""

    suffix: str
    target: str
    timeout_seconds: float = 600.0


def format_of(offer: Offer) -> Format:
    """The format and engine of a runtime that trains from bundles. Raises RecipeError for any other runtime."""
    if not {"runs", "engine"} <= set(offer.capabilities):
        raise RecipeError(f"the runtime {offer.name!r} does not run bundles; mnn and onnx do")
    return Format(str(offer.capabilities["runs"]), str(offer.capabilities["engine"]))


@dataclass(frozen=True)
class DeviceGraph:
    """One graph of a bundle, opened in an engine of its own."""

    path: Path
    digest: str
    graph: Graph
    format: Format

    _engines: list[Engine] = field(default_factory=list, repr=False, compare=False)

    @property
    def engine(self) -> Engine:
        """The engine with the graph in it, started on first use, and again after it died.

        Raises:
            EngineError: the engine cannot read the graph, or died of it.
        """
        if self._engines and self._engines[0].alive:
            return self._engines[0]
        engine = Engine(self.format.target, timeout_seconds=self.format.timeout_seconds)
        ports = {
            kind: [(port.port, port.role, port.name) for port in ports]
            for kind, ports in (("inputs", self.graph.inputs), ("outputs", self.graph.outputs))
        }
        engine.ask("open", {"path": str(self.path.resolve()), "digest": self.digest, **ports})
        self._engines[:] = [engine]
        return engine

    def compute(self, values: Mapping[tuple[str, str], Array]) -> dict[tuple[str, str], Array]:
        """The outputs of one run, by role and name.

        Raises:
            InputError: an input is missing or does not fit.
        """
        fed = {port.port: _fit(port, values, "the graph's input") for port in self.graph.inputs}
        _, out = self.engine.ask("compute", {}, fed)
        return {(port.role, port.name): _shaped(out.get(port.port), port, self.format) for port in self.graph.outputs}


@dataclass(frozen=True)
class DeviceRuntime:
    """A runtime that holds a bundle; ``local`` is the visit that it is for."""

    bundle: Bundle
    local: LocalSettings
    format: Format

    def __post_init__(self) -> None:
        self.bundle.manifest.refuse_other(self.local)
        self.bundle.graph("train", self.format.suffix)

    @cached_property
    def _graph(self) -> DeviceGraph:
        return DeviceGraph(*self.bundle.graph("train", self.format.suffix), self.format)

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """The updates of the clients of ``work``, and what their device parameters have become.

        Raises:
            InputError: the plan or the data does not fit the graph; nothing was trained.
            EngineError: the engine failed or died; so did this visit, and nothing else.
        """
        manifest = self.bundle.manifest
        manifest.refuse_other(plan.local)
        check_visit(manifest, plan, work)
        source = None if manifest.rows is None else manifest.rows.source
        rows = {name: np.empty_like(value) for name, value in work.rows.items()}
        shapes = {name: value.shape for name, value in plan.parameters.items()}
        shapes |= {name: value.shape[1:] for name, value in work.states.items()}
        after = {name: np.empty((len(work), *shape), dtype=np.float32) for name, shape in shapes.items()}
        losses = np.zeros(len(work))
        for start in range(0, len(work), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(work)))
            offsets = np.zeros(block.stop - start + 1, dtype=np.int64)
            held = np.zeros((0, 1), dtype=np.float32)
            if source is not None:
                offsets = work.row_ids[source].offsets[start : block.stop + 1]
                held = work.rows[source][offsets[0] : offsets[-1]]
            _, out = self._graph.engine.ask("train", self._values(plan), self._arrays(plan, work, block, held, offsets))
            try:
                for name in after:
                    after[name][block] = out[f"after/{name}"]
                losses[block] = out["losses"]
                if source is not None:
                    rows[source][offsets[0] : offsets[-1]] = out["rows"]
            except (KeyError, ValueError) as error:
                raise EngineError(f"the engine {self.format.target} gave what does not fit: {error}") from error
        return as_updates(plan, work, after, rows, losses), {name: after[name] for name in work.states}

    def _values(self, plan: Plan) -> dict[str, Any]:
        return {
            "lr": float(plan.local.lr),
            "row_lr": float(plan.local.rows_lr),
            "train_rows": plan.train_rows,
            "begins": {each.name: each.parameter for each in self.bundle.manifest.state if each.parameter is not None},
        }

    def _arrays(self, plan: Plan, work: Work, block: slice, rows: FloatArray, offsets: IntArray) -> dict[str, Array]:
        manifest = self.bundle.manifest
        used = {port.name for port in self.bundle.manifest.graphs["train"].inputs if port.role == "input"}
        return {
            **{f"shared/{name}": value for name, value in plan.parameters.items()},
            **{f"own/{name}": value[block] for name, value in work.states.items()},
            **{f"state/{each.name}": each.fill({}) for each in manifest.state if each.parameter is None},
            **{
                f"input/{port.name}": work.inputs[port.name][block].astype(port.dtype, copy=False)
                for port in manifest.inputs
                if port.name in used
            },
            **{f"place/{port.name}": work.slots[port.name][block] for port in manifest.slots},
            "rows": rows,
            "offsets": offsets - offsets[0],
            "steps": work.steps[block],
        }


@dataclass(frozen=True)
class BundleScorer:
    """Scores with the forward graph of a bundle: candidates of one user, or a batch of examples.

    ``newer`` are parameters to use in place of the bundle's.
    """

    bundle: Bundle
    format: Format
    precision: Precision = "float32"
    newer: Mapping[str, FloatArray] = field(default_factory=dict)

    def updated(self, newer: Mapping[str, FloatArray]) -> BundleScorer:
        """The same graph in the same engine, with other parameters."""
        other: BundleScorer = replace(self, newer=newer)
        other.__dict__["_graph"] = self._graph  # where cached_property keeps it
        return other

    @cached_property
    def _graph(self) -> DeviceGraph:
        return DeviceGraph(*self.bundle.graph("forward", self.format.suffix), self.format)

    @cached_property
    def _parameters(self) -> dict[tuple[str, str], Array]:
        held = {**self.bundle.parameters(self.precision), **self.newer}
        return {("parameter", name): value for name, value in held.items()}

    def score(
        self,
        history: FloatArray,
        user: FloatArray,
        candidates: FloatArray,
        own: Mapping[str, FloatArray] | None = None,
    ) -> FloatArray:
        """How well each candidate suits a user, (n,), from the rows of her history, oldest first.

        ``own`` are the parameters that the device has for itself; without them those that it keeps are as they were
        before its first visit.

        Shape:
            history ``(t, W)``, the newest are used; user ``(F,)``; candidates ``(n, W)``

        Raises:
            InputError: a shape or a value that does not fit.
            BundleError: the bundle scores examples, not candidates.
        """
        ports = {(port.role, port.name): port for port in self._graph.graph.inputs}
        if ("candidates", "candidates") not in ports:
            raise BundleError(f"{self.bundle.path} scores labelled examples; it has no candidates to rank")
        slots, width = ports["slot", "history"].shape
        size = ports["candidates", "candidates"].shape[0]
        for name, value in (("history", history), ("candidates", candidates)):
            if value.ndim != 2 or value.shape[1] != width:
                raise InputError(f"{name} must be rows of width {width}, but has shape {value.shape}")
        seen = history[-slots:]
        padded = np.zeros((slots, width), dtype=np.float32)
        padded[: len(seen)] = seen
        fixed: dict[tuple[str, str], Array] = {
            **self._parameters,
            **{("parameter", name): value for name, value in (own or {}).items()},
            ("slot", "history"): padded,
            ("input", "target"): np.array([len(seen)], dtype=np.int32),
            ("input", "user"): user,
        }
        out = []
        for start in range(0, len(candidates), size):
            part = candidates[start : start + size]
            rows = np.zeros((size, width), dtype=np.float32)
            rows[: len(part)] = part
            scored = self._graph.compute({**fixed, ("candidates", "candidates"): rows})
            out.append(scored["scores", "scores"][: len(part)])
        return np.concatenate(out) if out else np.zeros(0, dtype=np.float32)

    def logits(
        self,
        slots: Mapping[str, FloatArray],
        inputs: Mapping[str, Array],
        own: Mapping[str, FloatArray] | None = None,
    ) -> FloatArray:
        """The logits of one batch of examples, padded to the batch size of the bundle; ``own`` as in :meth:`score`.

        Raises:
            InputError: a shape or a value that does not fit.
        """
        values: dict[tuple[str, str], Array] = {
            **self._parameters,
            **{("parameter", name): value for name, value in (own or {}).items()},
            **{("slot", name): value for name, value in slots.items()},
            **{("input", name): value for name, value in inputs.items()},
        }
        return self._graph.compute(values)["scores", "scores"]


def check_visit(manifest: Manifest, plan: Plan, work: Work) -> None:
    """Raise InputError unless everything that the graph will be fed is there and fits it."""
    whose = f"round {plan.round}"
    shared = {name: shape for name, shape in manifest.parameters.items() if name not in manifest.on_device}
    own = {name: manifest.parameters[name] for name in manifest.on_device}
    _check_names("the plan's parameters", plan.parameters, shared)
    for name, shape in shared.items():
        Port("", "parameter", name, shape).check(plan.parameters[name], whose)
    _check_names("the device's parameters", work.states, own)
    for name, shape in own.items():
        Port("", "parameter", name, shape).check(work.states[name], whose, leading=1)
    _check_names("the inputs", work.inputs, {port.name: port.shape for port in manifest.inputs})
    _check_names("the slots", work.slots, {port.name: port.shape for port in manifest.slots})
    for port in manifest.inputs:
        port.check(work.inputs[port.name], whose, leading=2)
    for name, count in (("steps", len(work.steps)), ("examples", len(work.examples))):
        if count != len(work):
            raise InputError(f"{whose}: there are {count} {name} for {len(work)} clients")
    limits = [value.shape[:2] for value in (*work.inputs.values(), *work.slots.values())]
    if any(limit[0] != len(work) or limit[1] != limits[0][1] for limit in limits):
        raise InputError(f"{whose}: {len(work)} clients need inputs and slots of as many clients and steps: {limits}")
    most = limits[0][1] if limits else 0
    if len(work) and not 0 <= int(work.steps.min()) <= int(work.steps.max()) <= most:
        raise InputError(f"{whose}: the steps of a client must lie in 0 .. {most}")
    _check_rows(manifest, work, whose)


def _check_rows(manifest: Manifest, work: Work, whose: str) -> None:
    if manifest.rows is None:
        if work.rows or work.row_ids:
            raise InputError(f"{whose}: the model has no rows, but the visit brings rows of {sorted(work.row_ids)}")
        return
    source, width = manifest.rows.source, manifest.rows.width
    _check_names("the sources of rows", work.rows, {source: ()})
    _check_names("the sources of row ids", work.row_ids, {source: ()})
    rows, needed = work.rows[source], work.row_ids[source]
    counts = np.diff(needed.offsets)
    whole = len(needed.offsets) == len(work) + 1 and needed.offsets[0] == 0 and (counts >= 0).all()
    if not whole or needed.offsets[-1] != len(needed.ids):
        raise InputError(f"{whose}: the offsets of the rows of {source!r} do not fit {len(work)} clients")
    Port("", "slot", f"rows of {source}", (len(needed.ids), width)).check(rows, whose)
    if len(needed.ids) and not 0 <= int(needed.ids.min()) <= int(needed.ids.max()) < manifest.rows.num_rows:
        raise InputError(f"{whose}: rows of {source!r} are numbered 0 .. {manifest.rows.num_rows - 1}")
    for port in manifest.slots:
        places = work.slots[port.name]
        Port("", "slot", port.name, port.shape[:-1], "int32", 0).check(places, whose, leading=2)
        if places.size and (places.reshape(len(work), -1).max(axis=1) >= np.maximum(counts, 1)).any():
            raise InputError(f"{whose}: the slot {port.name!r} points at a row that its client did not bring")


def _check_names(what: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if set(got) != set(want):
        raise InputError(f"{what} must be {sorted(want)}, but are {sorted(got)}")


def _fit(port: Port, values: Mapping[tuple[str, str], Array], whose: str) -> Array:
    if (port.role, port.name) not in values:
        raise InputError(f"the {port.role} {port.name!r} is missing; there are {sorted(values)}")
    value = values[port.role, port.name]
    port.check(value, whose)
    return np.asarray(value, dtype=port.dtype)


def _shaped(value: Array | None, port: Port, format: Format) -> Array:
    if value is None or value.shape != port.shape or value.dtype.name != port.dtype:
        found = "nothing" if value is None else f"{value.dtype} {value.shape}"
        raise EngineError(f"the engine {format.target} gave {found} for {port.role} {port.name!r} {port.shape}")
    return value


def best(scores: FloatArray, count: int) -> Sequence[int]:
    """The places of the best scores, best first."""
    return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]
