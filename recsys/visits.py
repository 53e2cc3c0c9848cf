"""A visit on a device: the steps of an exported graph, one after another, the rows stepped beside it.

This runs in the engine's process. What it is handed was checked before (:mod:`fedtower.recsys.device`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.rows import step_rows

Array = NDArray[Any]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Arrays = Mapping[str, Array]
Values = Mapping[str, Any]


class Program(Protocol):
    """A loaded graph. What goes between steps, ``Any``, stays in the engine's own form."""

    def put(self, value: Array) -> Any:
        """A value in the engine's form."""
        ...

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one run, in order."""
        ...

    def get(self, value: Any) -> Array:
        """A value of the engine as an array of its own."""
        ...


class Load(Protocol):
    """Reads a graph's file: the names of its inputs and outputs are in the order in which it will be fed."""

    def __call__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
        """The loaded graph."""
        ...


class VisitHost:
    """Answers an engine's requests: ``open`` a graph, ``compute`` it once, ``train`` clients with it.

    Each plugin's own part is ``load``.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._program: Program | None = None

    def answer(self, word: str, values: Values, arrays: Arrays) -> tuple[Values, Arrays]:
        """The answer to one request."""
        requests: Mapping[str, Callable[[Values, Arrays], tuple[Values, Arrays]]] = {
            "open": self._open,
            "compute": self._compute,
            "train": self._train,
        }
        if word not in requests:
            raise ValueError(f"there is no request {word!r}")
        return requests[word](values, arrays)

    def _open(self, values: Values, arrays: Arrays) -> tuple[Values, Arrays]:
        path = Path(values["path"])
        if hashlib.sha256(path.read_bytes()).hexdigest() != values["digest"]:
            raise ValueError(f"{path} has changed since it was checked")
        self._inputs = [tuple(each) for each in values["inputs"]]
        self._outputs = [tuple(each) for each in values["outputs"]]
        self._program = self._load(path, [port for port, _, _ in self._inputs], [port for port, _, _ in self._outputs])
        return {}, {}

    def _compute(self, values: Values, arrays: Arrays) -> tuple[Values, Arrays]:
        program = self._opened()
        out = program.run([program.put(arrays[port]) for port, _, _ in self._inputs])
        return {}, {port: program.get(value) for (port, _, _), value in zip(self._outputs, out, strict=True)}

    def _opened(self) -> Program:
        if self._program is None:
            raise ValueError("no graph has been opened")
        return self._program

    def _train(self, values: Values, arrays: Arrays) -> tuple[Values, Arrays]:
        """Clients one after another: ``shared/``, ``own/``, ``state/``, ``input/``, ``place/``, ``rows``, ``offsets``,
        ``steps`` in; ``after/``, ``rows``, ``losses`` out.
        """
        program = self._opened()
        shared, own, state = (_group(arrays, group) for group in ("shared", "own", "state"))
        inputs, places = _group(arrays, "input"), _group(arrays, "place")
        offsets, steps = arrays["offsets"], arrays["steps"]
        rows = arrays["rows"].copy()
        begins = values["begins"]
        after = {
            name: np.empty((len(steps), *value.shape), dtype=np.float32)
            for name, value in [*shared.items(), *((name, value[0]) for name, value in own.items() if len(value))]
        }
        losses = np.zeros(len(steps))
        lr = program.put(np.array(values["lr"], dtype=np.float32))
        started = {name: program.put(value) for name, value in shared.items()}
        for client in range(len(steps)):
            held = {**started, **{name: program.put(np.asarray(value[client])) for name, value in own.items()}}
            kept = {name: program.put(value) for name, value in state.items()}
            kept |= {name: held[parameter] for name, parameter in begins.items()}
            mine = slice(int(offsets[client]), int(offsets[client + 1]))
            for at in range(int(steps[client])):
                feed = {
                    ("lr", "lr"): lr,
                    **{("parameter", name): value for name, value in held.items()},
                    **{("state", name): value for name, value in kept.items()},
                    **{("input", name): program.put(np.asarray(value[client, at])) for name, value in inputs.items()},
                    **{("slot", name): program.put(rows[mine][where[client, at]]) for name, where in places.items()},
                }
                out = program.run([feed[role, name] for _, role, name in self._inputs])
                slopes: dict[str, FloatArray] = {}
                for (_, role, name), value in zip(self._outputs, out, strict=True):
                    if role == "parameter":
                        held[name] = value
                    elif role == "state":
                        kept[name] = value
                    elif role == "loss":
                        losses[client] += float(program.get(value)) / int(steps[client])
                    elif values["train_rows"]:
                        slopes[name] = program.get(value)
                if slopes:
                    where = {name: places[name][client, at] for name in slopes}
                    rows[mine] = _stepped(rows[mine], where, slopes, values["row_lr"])
            for name in after:
                after[name][client] = program.get(held[name])
        return {}, {**{f"after/{name}": value for name, value in after.items()}, "rows": rows, "losses": losses}


def _stepped(
    rows: FloatArray, places: Mapping[str, IntArray], slopes: Mapping[str, FloatArray], lr: float
) -> FloatArray:
    """One client's rows after the gradients of all its slots."""
    where = np.concatenate([each.reshape(-1) for each in places.values()])
    flat = np.concatenate([slopes[name].reshape(-1, rows.shape[1]) for name in places])
    return step_rows(rows, where, flat, lr)


def _group(arrays: Arrays, group: str) -> dict[str, Array]:
    return {name.removeprefix(f"{group}/"): value for name, value in arrays.items() if name.startswith(f"{group}/")}
