"""Export: a trained model as a bundle; nothing is released that was not computed once and found equal to torch."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import RecipeError, StorageError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.registry import Registry, discover
from fedtower.core.rows import step_rows
from fedtower.core.settings import Part
from fedtower.recsys.archive import cache_folder
from fedtower.recsys.bundle import (
    WEIGHTS,
    Bundle,
    Graph,
    Initial,
    Manifest,
    Port,
    Precision,
    digest_of,
    write_manifest,
    write_tensors,
)
from fedtower.recsys.device import DeviceGraph, Format, format_of
from fedtower.recsys.graph_cache import GraphCache
from fedtower.recsys.graphs import ExportError, Traced, Visit, trace_forward, trace_step
from fedtower.recsys.learned import Learned
from fedtower.recsys.models import Declared
from fedtower.recsys.phases import HEAD
from fedtower.recsys.tasks import Task

Array = NDArray[Any]
FloatArray = NDArray[np.float32]

FORMATS = ("onnx", "mnn")
TOLERANCE = 1e-5
"""How far an engine may be from torch after one run: of the value, or absolutely where that is below 1.

Engines sum in another order; one step of the shipped models was measured to be within 5e-6 (``benchmarks/RESULTS.md``).
"""

_LIBRARIES = ("fedtower", "torch", "onnx", "onnxscript", "onnxruntime", "MNN")


class Exporter(Protocol):
    """The seam of an exporter plugin: a frozen dataclass of settings that writes a graph in one file format.

    The door says the format (capability ``suffix``) and which other formats must be written before (``after``).
    """

    def write(self, graph: Traced, folder: Path) -> Path:
        """The file ``folder/NAME.SUFFIX``. Raises ExportError for a graph that the format's engines run wrong."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model to be exported: what it is called, what trains it, and what a visit's data looks like."""

    name: str
    declared: Declared
    local: LocalSettings
    visit: Visit
    recipe: str = ""


def export_model(
    subject: Subject,
    learned: Learned,
    out: Path,
    registry: Registry,
    *,
    formats: Sequence[str] = FORMATS,
    precisions: Sequence[Precision] = (),
    hooks: Hooks | None = None,
) -> Bundle:
    """The bundle, written to the new folder ``out``, verified.

    Raises:
        ExportError: an operation that is not verified, or an engine that gives other numbers than torch.
        StorageError: ``out`` is there already, or cannot be written.
    """
    if out.exists():
        raise StorageError(f"{out} is there already; remove it, or choose another folder with --out")

    def action() -> Bundle:
        step, state = trace_step(subject.declared, subject.local, subject.visit)
        forward = trace_forward(subject.declared, subject.visit)
        with _beside(out) as folder:
            checks = write_graphs([step, forward], folder, registry, formats)
            parameters = {
                name: learned.parameters[name] if name in learned.parameters else value.detach().numpy()
                for name, value in subject.declared.shared.named_parameters()
            }
            weights = _write_weights(folder, parameters, forward, precisions)
            manifest = _manifest(subject, state, {"train": step, "forward": forward})
            _finish(folder, replace(manifest, weights=weights, checks=checks))
            folder.rename(out)
        return Bundle.open(out)

    return (hooks or Hooks.none()).wrap("export", action, folder=out)


def visit_of(task: Task, declared: Declared, local: LocalSettings) -> Visit:
    """What a visit's data looks like, seen at the first client."""
    work = task.client_data().work(Plan(1, {}, local), np.zeros(1, dtype=np.int64))
    return Visit.of(declared, work, declared.cloud.width)


def cached_bundle(
    model: Declared, local: LocalSettings, visit: Visit, suffix: str, registry: Registry | None = None
) -> Bundle:
    """The train graph alone, without weights, from the cache if the same one was exported and verified before.

    Raises:
        ExportError: see :func:`export_model`.
    """
    registry = registry or _plugins()
    step, state = trace_step(model, local, visit)
    # What no graph holds is given with every plan: the rates and the number of steps are no part of it.
    settled = replace(local, steps=1 + local.head_first, epochs=None, share=1.0, lr=1.0, row_lr=None)
    manifest = _manifest(Subject("cached", model, settled, visit), state, {"train": step})
    formats = _with_those_before(suffix, registry)
    cache, key = GraphCache(cache_folder() / "graphs"), f"{suffix}-{_key(step, manifest, formats, registry)}"
    found = cache.find(key)
    if found is not None:
        return found
    with _beside(cache.folder / key) as made:
        checks = write_graphs([step], made, registry, formats)
        _finish(made, replace(manifest, checks=checks))
        return cache.keep(made, key)


def write_graphs(
    graphs: Sequence[Traced], folder: Path, registry: Registry, formats: Sequence[str]
) -> dict[str, float]:
    """Write every graph in every format and compute each once; how far each file is from torch.

    Raises:
        ExportError: an operation is not verified, or the file gives other numbers than torch.
        EngineCrashed: the converter or an engine died of the graph.
    """
    checks = {}
    for suffix in formats:
        exporter: Exporter = registry.make("exporter", Part(suffix))
        for graph in graphs:
            path = exporter.write(graph, folder)
            opened = DeviceGraph(path, digest_of(path), Graph(graph.inputs, graph.outputs), engine_of(suffix, registry))
            try:
                checks[path.name] = max(_compare(graph, opened, path.name, seed) for seed in (1, 2))
            finally:
                opened.engine.close()
    return checks


@functools.cache
def _plugins() -> Registry:
    """All installed plugins, looked for once: a simulation of many visits asks for as many graphs."""
    return discover()


def engine_of(suffix: str, registry: Registry) -> Format:
    """The engine of the runtime that reads this format. Raises RecipeError when none does."""
    for offer in registry.offers("runtime"):
        if offer.capabilities.get("runs") == suffix:
            registry.load("runtime", offer.name)
            return format_of(offer)
    raise RecipeError(
        f"no runtime reads {suffix!r} files, so what is exported in that format cannot be verified and is not released"
    )


def _compare(graph: Traced, opened: DeviceGraph, name: str, seed: int) -> float:
    """How far one run of the file is from torch, on values that are not kind: negative numbers, and equal rows."""
    values = _trial(graph, seed)
    want = graph.run(values)
    got = opened.compute({(port.role, port.name): value for port, value in zip(graph.inputs, values, strict=True)})
    furthest = 0.0
    for port, right in zip(graph.outputs, want, strict=True):
        furthest = max(furthest, _distance(port, got[port.role, port.name], right, name))
    furthest = max(furthest, _rows_apart(graph, got, want, name, seed))
    return furthest


def _distance(port: Port, got: Array, want: Array, name: str) -> float:
    off = float((np.abs(got - want) / np.maximum(np.abs(want), 1.0)).max(initial=0.0))
    if not off <= TOLERANCE:
        raise ExportError(
            f"{name} gives other numbers than torch: the {port.role} {port.name!r} is off by {off:.3g}, and "
            f"{TOLERANCE:g} is allowed; nothing was released"
        )
    return off


def _rows_apart(
    graph: Traced, got: Mapping[tuple[str, str], Array], want: Sequence[Array], name: str, seed: int
) -> float:
    """The same for a device's rows after the step, where several slots hold one row."""
    places = [place for place, port in enumerate(graph.outputs) if port.role == "gradient"]
    if not places:
        return 0.0
    ports = [graph.outputs[place] for place in places]
    width = ports[0].shape[-1]
    right = np.concatenate([want[place].reshape(-1, width) for place in places])
    ours = np.concatenate([got[port.role, port.name].reshape(-1, width) for port in ports])
    rows, ids = np.zeros((_ROWS, width), dtype=np.float32), np.arange(len(right)) % _ROWS
    mine, theirs = (step_rows(rows, ids, gradients, 0.125) for gradients in (ours, right))
    return _distance(replace(ports[0], name="rows after the step"), mine, theirs, name)


_ROWS = 3  # of so many rows all slots are filled: every id is there more than once


def _trial(graph: Traced, seed: int) -> list[Array]:
    """Values for every input. States lie between 0.25 and 0.75, as sums of squares and powers of a beta do: near zero
    an Adam step is the sign of rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)
    out: list[Array] = []
    for port, example in zip(graph.inputs, graph.examples, strict=True):
        if port.role == "state":
            value = 0.25 + 0.5 * torch.rand(example.shape, generator=generator)
        elif port.role == "slot":
            rows = 0.5 * torch.randn(_ROWS, port.shape[-1], generator=generator)
            count = int(np.prod(port.shape[:-1]))
            value = rows[torch.arange(count) % _ROWS].reshape(port.shape)
        elif port.role == "parameter":
            value = example + 0.1 * torch.randn(example.shape, generator=generator)
        elif port.name == HEAD:
            value = torch.full_like(example, float(seed % 2))  # both phases of a visit
        else:
            value = example
        out.append(value.numpy())
    return out


def _manifest(subject: Subject, state: Sequence[Initial], graphs: Mapping[str, Traced]) -> Manifest:
    visit = subject.visit
    return Manifest(
        model=subject.name,
        recipe=subject.recipe,
        local=asdict(subject.local),
        parameters={name: tuple(value.shape) for name, value in subject.declared.shared.named_parameters()},
        on_device=subject.declared.on_device,
        state=tuple(state),
        slots=visit.slots,
        inputs=visit.inputs,
        rows=visit.rows,
        graphs={name: Graph(graph.inputs, graph.outputs) for name, graph in graphs.items()},
        versions={name: metadata.version(name) for name in _LIBRARIES if _installed(name)},
    )


def _finish(folder: Path, manifest: Manifest) -> None:
    write_manifest(folder, replace(manifest, files={path.name: digest_of(path) for path in sorted(folder.iterdir())}))


def _write_weights(
    folder: Path, parameters: Mapping[str, FloatArray], forward: Traced, precisions: Sequence[Precision]
) -> dict[str, dict[str, Any]]:
    """The weights, and those of a lower precision with how far they move the scores."""
    write_tensors(folder / WEIGHTS, parameters)
    out: dict[str, dict[str, Any]] = {"float32": {"file": WEIGHTS, "error": 0.0}}
    for precision in precisions:
        file = f"weights.{precision}.safetensors"
        stored = _lowered(parameters, precision)
        write_tensors(folder / file, stored)
        out[precision] = {"file": file, "error": _scores_apart(forward, parameters, _raised(stored))}
    return out


def _lowered(parameters: Mapping[str, FloatArray], precision: Precision) -> dict[str, Array]:
    """Halves; or bytes with one scale for each output of a matrix, and vectors as they are."""
    out: dict[str, Array] = {}
    for name, value in parameters.items():
        if precision == "float16":
            out[name] = value.astype(np.float16)
        elif value.ndim < 2:
            out[name] = value
        else:
            peak = np.abs(value).max(axis=tuple(range(1, value.ndim)), keepdims=True)
            scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
            out[name], out[f"{name}/scale"] = np.rint(value / scale).astype(np.int8), scale
    return out


def _raised(stored: Mapping[str, Array]) -> dict[str, FloatArray]:
    return {
        name: value.astype(np.float32) * stored.get(f"{name}/scale", np.float32(1))
        for name, value in stored.items()
        if not name.endswith("/scale")
    }


def _scores_apart(forward: Traced, parameters: Mapping[str, FloatArray], other: Mapping[str, FloatArray]) -> float:
    """The greatest difference of any score, by the spread of the scores."""
    trial = _trial(forward, 1)
    (one,), (two,) = (
        forward.run(
            [
                held[port.name] if port.role == "parameter" else value
                for port, value in zip(forward.inputs, trial, strict=True)
            ]
        )
        for held in (parameters, other)
    )
    return float(np.abs(one - two).max() / max(float(np.std(one)), 1e-12))


def _with_those_before(suffix: str, registry: Registry) -> list[str]:
    return [*registry.get("exporter", suffix).capabilities.get("after", ()), suffix]


def _key(step: Traced, manifest: Manifest, formats: Sequence[str], registry: Registry) -> str:
    """A digest of all that the files are made of: the traced operations, their constants, and who writes them."""
    digest = hashlib.sha256(step.module.code.encode())
    for name, value in sorted(step.module.named_buffers()):
        digest.update(name.encode() + value.numpy().tobytes())
    for suffix in formats:
        module = import_module(registry.get("exporter", suffix).target.partition(":")[0])
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    digest.update(json.dumps(asdict(manifest), sort_keys=True).encode())
    return digest.hexdigest()[:32]


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder next to where the result will be; it is removed unless it was renamed."""
    made = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    with storage_errors(target.parent):
        made.mkdir(parents=True)
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def recipe_digest(values: Mapping[str, Any]) -> str:
    """A digest of a recipe's values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
