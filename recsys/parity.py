"""Parity: every runtime beside ``torch_loop``, after one step, one client's visit and one round from one state."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.core.hooks import Hooks, hookimpl, new_manager
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.core.runtime import Runtime, Work
from fedtower.core.settings import Part
from fedtower.core.updates import Updates
from fedtower.recsys.tasks import make_task
from fedtower.recsys.training import Assembled, Federated, Setting, assemble, under

REFERENCE = "torch_loop"
OTHERS = ("vectorized", "onnx", "mnn")

TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "step": {"sgd": 1e-5, "momentum": 1e-5, "adagrad": 1e-4, "adam": 1e-4},
    "visit": {"sgd": 1e-4, "momentum": 1e-4, "adagrad": 1e-3, "adam": 1e-3},
    "round": {"sgd": 1e-4, "momentum": 1e-4, "adagrad": 1e-4, "adam": 1e-4},
}
"""How far two runtimes may be apart, of the value, or absolutely where it is below 1, by the device's optimiser.

Adam and Adagrad divide a gradient by its own size, so where it is little more than rounding, of which every order of
summation has its own, a step may differ by a good part of its length.
"""

Array = NDArray[Any]
FloatArray = NDArray[np.float32]

_NUDGES = 6


class ParityError(FedtowerError):
    """A runtime is absent, or gives other numbers than the plain one."""


@dataclass(frozen=True)
class Line:
    """One line of the table: how far ``what`` of a runtime is off, or why there is nothing to compare."""

    runtime: str
    moment: str
    what: str
    distance: float
    moved: float
    tolerance: float
    share: float
    absent: str = ""
    rounding: float = 0.0

    @property
    def allowed(self) -> float:
        """How far it may be off: twice as far as the reference is from itself for a rounding, where that was measured;
        else the tolerance, and ``share`` of how far training moved anything: where a step is short, staying where one
        was is near, and wrong.
        """
        return max(min(self.tolerance, self.share * self.moved), 2 * self.rounding)

    @property
    def holds(self) -> bool:
        """Whether it is near enough."""
        return not self.absent and self.distance <= self.allowed

    @property
    def verdict(self) -> str:
        """In words."""
        if self.absent or not self.holds:
            return self.absent or "beyond its tolerance"
        return "near" if self.rounding else "equal"


SHARES: Mapping[str, float] = {"sgd": 1e-3, "momentum": 1e-3, "adagrad": 5e-2, "adam": 5e-2}
"""How far, of the longest move of any number. Measured with Adam on ``dssm``: 5e-4 of it."""


def parity(recipe: Recipe, registry: Registry) -> Iterator[Line]:
    """A line for every runtime that is expected, moment, and thing compared, as they are measured.

    Raises:
        FedtowerError: the recipe, or the reference itself, does not work.
    """
    recipe = replace(recipe, mode="simulated", attack=None)  # what attackers do is no runtime's work
    draws = Draws(recipe.seed)
    data = registry.make("dataset", recipe.data.part, path="data").load(draws=draws, progress=lambda _: None)
    task = make_task(data, recipe, draws)
    setting = Setting(recipe, registry, task, Hooks.none(), draws, lambda: 0.0)
    expected = _results(setting, REFERENCE)
    reach: dict[str, float] = {}
    optimizer = recipe.local.optimizer
    share = SHARES[optimizer]
    for name in OTHERS:
        try:
            found = _results(setting, name)
        except FedtowerError as error:
            for moment, tolerances in TOLERANCES.items():
                absent = f"absent: {type(error).__name__}: {error}"
                yield Line(name, moment, "everything", float("nan"), float("nan"), tolerances[optimizer], share, absent)
            continue
        for moment, tolerances in TOLERANCES.items():
            for what, (value, start) in expected[moment].items():
                off, moved = distance(found[moment][what].value, value), distance(value, start)
                line = Line(name, moment, what, off, moved, tolerances[optimizer], share)
                if moment == "round" and not line.holds:
                    reach = reach or _reach_of_rounding(setting, expected["round"])
                    line = replace(line, rounding=reach[what])
                yield line


class _Pair(NamedTuple):
    """Numbers after training, and before."""

    value: Array
    start: Array


def _results(setting: Setting, name: str) -> dict[str, dict[str, _Pair]]:
    """The parameters and rows of one runtime, by moment."""
    recipe = setting.recipe
    part = _part_of(setting, name)
    setting = replace(setting, recipe=replace(recipe, runtime=part))
    model = assemble(setting)
    factory = setting.registry.make("runtime", part, path="runtime")
    runtime: Runtime = factory.open(model.declared, recipe.local)
    plan = Plan(1, model.declared.parameters(), recipe.local)
    work = _visit(setting, model, plan)
    return {
        "step": _after(runtime, plan, replace(work, steps=np.minimum(work.steps, 1))),
        "visit": _after(runtime, plan, work),
        "round": _after_round(setting),
    }


def _part_of(setting: Setting, name: str) -> Part:
    """A runtime, with the recipe's settings if it is the recipe's."""
    return setting.recipe.runtime if setting.recipe.runtime.name == name else Part(name)


def _visit(setting: Setting, model: Assembled, plan: Plan) -> Work:
    """The work of the first client that has any, its rows fetched."""
    for client in range(setting.task.num_clients):
        ids = np.array([client], dtype=np.int64)
        work = setting.task.client_data().work(plan, ids)
        if not work.steps[0]:
            continue
        rows = {}
        if model.tables is not None:
            rows = {source: model.tables.fetch(source, needed.ids) for source, needed in work.row_ids.items()}
        return replace(work, rows=rows, states={name: model.store.read(name, ids) for name in model.declared.on_device})
    raise ParityError("no client of this data set has anything to train on, so there is nothing to compare")


def _after(runtime: Runtime, plan: Plan, work: Work) -> dict[str, _Pair]:
    """What one visit made of the parameters, the rows and the device's own."""
    updates, own = runtime.train(plan, work)
    moved = {name: plan.parameters[name] + delta[0] for name, delta in updates.dense.items()}
    out = {"parameters": _Pair(_flat(moved), _flat(plan.parameters))}
    if updates.rows:
        rows = {name: work.rows[name] + rows.row_deltas for name, rows in updates.rows.items()}
        out["rows"] = _Pair(_flat(rows), _flat(work.rows))
    if own:
        out["device's own"] = _Pair(_flat(own), _flat(work.states))
    return out


class _Watch:
    """Keeps the total of a round."""

    total: Updates | None = None

    @hookimpl(wrapper=True)
    def aggregate(self, round: int) -> Generator[None, Any, Any]:
        result = yield
        self.total = result[0]
        return result


def _reach_of_rounding(setting: Setting, expected: Mapping[str, _Pair]) -> dict[str, float]:
    """How far the reference itself is off after a round when the parameters that it begins with are off by a rounding.

    Over the hundreds of steps of a round a number that is next to nothing falls on the other side of a ReLU's kink, and
    what comes after is another training, as right as the first. No runtime can be nearer to the reference than that.
    The largest of ``_NUDGES`` tries.
    """
    setting = replace(setting, recipe=replace(setting.recipe, runtime=_part_of(setting, REFERENCE)))
    tries = [_after_round(setting, nudge) for nudge in range(1, _NUDGES + 1)]
    return {what: max(distance(found[what].value, pair.value) for found in tries) for what, pair in expected.items()}


def _nudged(parameters: Mapping[str, FloatArray], draws: Draws, nudge: int) -> dict[str, FloatArray]:
    """The parameters, each number moved to one of its neighbours or not at all."""
    out = {}
    for name, value in parameters.items():
        way = draws.integers(3, "parity/nudge", nudge, np.arange(value.size, dtype=np.int64)).reshape(value.shape) - 1
        out[name] = np.where(
            way == 0, value, np.nextafter(value, np.float32(np.inf) * np.sign(way + 0.5).astype(np.float32))
        )
    return out


def _after_round(setting: Setting, nudge: int = 0) -> dict[str, _Pair]:
    """What one round's cohort adds up to: the aggregated update, before the server's optimiser.

    With ``nudge`` it begins with parameters that are off by a rounding, chosen by that number; what it adds up to is
    told from the same beginning.
    """
    watch, hooks = _Watch(), Hooks(new_manager())
    hooks.add(watch, "parity")
    training = Federated(replace(setting, hooks=hooks))
    before = training.learned().parameters
    if nudge:
        arrays = {**training.snapshot(), **under("parameters", _nudged(before, setting.draws, nudge))}
        training.restore(arrays, {})
    next(iter(training.rounds()))
    if watch.total is None:
        raise ParityError("the round aggregated nothing, so there is nothing to compare")
    total = watch.total
    moved = {name: before[name] + delta[0] for name, delta in total.dense.items()}
    out = {"parameters": _Pair(_flat(moved), _flat(before))}
    if total.rows:
        rows = _flat({name: rows.row_deltas for name, rows in total.rows.items()})
        out["rows"] = _Pair(rows, np.zeros_like(rows))
    return out


def _flat(values: Mapping[str, Array]) -> Array:
    return np.concatenate([np.asarray(values[name], dtype=np.float64).reshape(-1) for name in sorted(values)])


def distance(got: Array, want: Array) -> float:
    """How far the furthest number is off, of its value, or absolutely where that is below 1; infinite for NaN."""
    if got.shape != want.shape:
        return float("inf")
    off = float((np.abs(got - want) / np.maximum(np.abs(want), 1.0)).max(initial=0.0))
    return off if np.isfinite(off) else float("inf")


def describe(local: LocalSettings) -> str:
    """The device's optimiser and rate, for a title."""
    return f"{local.optimizer}, lr {local.lr:g}"
