"""Whole runs in virtual time: over-selection, deadlines that adapt, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import list_checkpoints
from fedtower.core.client import VisitCosts
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.round import make_plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.traces import DeviceSettings, generated
from fedtower.recsys.report import write_report
from fedtower.recsys.run import Run
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.tasks import make_task
from fedtower.recsys.testing.states import saved
from fedtower.recsys.training import Federated, Setting

WINDOWS = {
    "transport.name": "virtual_clock",
    "transport.start_hour": 1.0,
    "cohort.over_selection": 1.3,
    "deadline.name": "adaptive",
    "deadline.window": 3,
    "deadline.first": 60.0,
    "rounds": 8,
    "evaluation.every": 0,
}


def in_virtual_time(small: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {**{name: value for name, value in small.items() if name != "transport.dropout"}, **WINDOWS, **more}


def told(run: Run) -> list[dict[str, Any]]:
    """The rounds and deadlines of a log, with all of their times: those are virtual."""
    events = [event for event in RunLog(run.folder).events() if event["event"] in ("round", "deadline")]
    last = {(event["event"], event["round"]): event for event in events}
    return [{key: value for key, value in event.items() if key != "time"} for _, event in sorted(last.items())]


class StopAfter:
    def __init__(self, round: int) -> None:
        self.round = round

    @hookimpl
    def stop_run(self, report: Any) -> str | None:
        return "it was told to" if report.round == self.round else None


@pytest.fixture(scope="module")
def straight(small: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fedtower.run("dssm-synthetic", in_virtual_time(small), runs=tmp_path_factory.mktemp("straight"))


def test_a_run_in_virtual_time_goes_on_as_if_it_had_never_stopped(
    straight: Run, small: Mapping[str, Any], tmp_path: Path
) -> None:
    stopped = fedtower.run("dssm-synthetic", in_virtual_time(small), runs=tmp_path, observers=[StopAfter(3)])
    fedtower.resume(stopped.folder)
    assert told(stopped) == told(straight)
    ends = [saved(run.folder / "checkpoints", 8) for run in (stopped, straight)]
    assert list_checkpoints(stopped.folder / "checkpoints")[-1] == 8
    assert_same_bits(ends[0], ends[1])
    assert {"deadline/needed", "deadline/met", "deadline/seconds", "transport/now"} <= set(ends[0])


def test_rounds_end_with_cohort_size_updates_and_the_rest_is_told(straight: Run, tmp_path: Path) -> None:
    rounds = [event for event in told(straight) if event["event"] == "round"]
    assert all(event["clients"] + event["dropped"] == 16 for event in rounds)  # 1.3 x 12, rounded up
    full = [event for event in rounds if event["clients"] == 12]
    assert len(full) >= 5
    for event in rounds:
        assert 0 < event["wasted_seconds"] < event["device_seconds"]
        assert event["seconds"] > 1.0
    summary = json.loads((straight.folder / "summary.json").read_text("utf-8"))
    assert summary["wasted_seconds"] == pytest.approx(sum(event["wasted_seconds"] for event in rounds))
    assert "for nothing" in write_report([straight.folder], tmp_path / "report.html").read_text("utf-8")


def test_the_deadline_comes_down_and_says_why(straight: Run) -> None:
    changes = [event for event in told(straight) if event["event"] == "deadline"]
    assert changes[0]["why"].startswith("deadline 60 s → ")
    assert changes[0]["seconds"] < 30.0
    state = saved(straight.folder / "checkpoints", 8)
    assert state["deadline/seconds"] == pytest.approx(changes[-1]["seconds"])
    assert len(state["deadline/needed"]) == 3


def test_the_width_of_blocks_changes_nothing(straight: Run, small: Mapping[str, Any], tmp_path: Path) -> None:
    other = fedtower.run("dssm-synthetic", in_virtual_time(small, **{"transport.block": 5}), runs=tmp_path)
    assert told(other) == told(straight)


def rounds_of(run: Run) -> list[dict[str, Any]]:
    return [event for event in told(run) if event["event"] == "round"]


def test_a_visit_is_known_to_cost_what_it_turns_out_to(small: Mapping[str, Any]) -> None:
    overrides = [f"{name}={json.dumps(value)}" for name, value in small.items() if "transforms" not in name]
    recipe, registry, draws = load_recipe("dssm-synthetic", overrides), discover(), Draws(1)
    data = registry.make("dataset", recipe.data.part, path="data").load(draws=draws, progress=lambda message: None)
    task = make_task(data, recipe, draws)
    training = Federated(Setting(recipe, registry, task, Hooks.none(), draws, lambda: 0.0))
    parts, clients = training._parts, np.arange(20)
    plan = make_plan(training._state, parts)
    load = VisitCosts(task.client_data(), parts.client.rows, block=7)(plan, clients)
    updates = parts.client.visit(plan, clients)
    np.testing.assert_array_equal(load.bytes_down, updates.metrics["bytes_down"])
    np.testing.assert_array_equal(load.bytes_up, updates.sizes)
    np.testing.assert_array_equal(load.steps, np.ones(20))


def test_over_selection_needs_a_cohort_of_a_size(small: Mapping[str, Any]) -> None:
    overrides = ["cohort.name=poisson", "cohort.client_rate=0.1", "cohort.over_selection=1.3"]
    with pytest.raises(RecipeError, match="the sampler 'poisson' has no size"):
        load_recipe("dssm-synthetic", overrides)
    with pytest.raises(RecipeError, match="over_selection must be at least 1"):
        load_recipe("dssm-synthetic", ["cohort.over_selection=0.9"])
    recipe = load_recipe("dssm-synthetic", ["cohort.over_selection=1.1", "cohort.size=10"])
    assert (recipe.cohort.asked.settings, recipe.cohort.target) == ({"size": 11}, 10)


def test_a_recipe_names_a_deadline_and_its_settings_are_written_out() -> None:
    recipe = load_recipe("dssm-synthetic", ["deadline.name=adaptive", "deadline.quantile=0.5"])
    assert recipe.deadline is not None
    assert recipe.deadline.settings["quantile"] == 0.5
    assert recipe.deadline.settings["window"] == 10
    with pytest.raises(RecipeError, match=r"deadline\.quantil"):
        load_recipe("dssm-synthetic", ["deadline.name=adaptive", "deadline.quantil=0.5"])
    assert load_recipe("dssm-synthetic").deadline is None


def test_traces_of_a_file_are_those_of_the_run(small: Mapping[str, Any], tmp_path: Path) -> None:
    settings = DeviceSettings(latency_seconds=50.0, hours=24.0, dropout=0.0)
    generated(settings, 60, Draws(2)).write(tmp_path / "traces.csv")
    more = {"transport.traces": str(tmp_path / "traces.csv"), "deadline.first": 600.0, "rounds": 1}
    run = fedtower.run("dssm-synthetic", in_virtual_time(small, **more), runs=tmp_path / "runs")
    (event,) = rounds_of(run)
    assert event["seconds"] > 50.0
    assert event["late"] == 4
