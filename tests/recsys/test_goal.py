"""A run that ends when it has what it was for: at the first look that finds it, on either floor, and not before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedtower
from fedtower.core.errors import RecipeError
from fedtower.core.round import RoundReport
from fedtower.plugins.datasets.mnist import example as digits
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.goal import Goal
from fedtower.recsys.run import Run
from fedtower.recsys.runlog import RunLog

REPORT = RoundReport(4, 9, 0.5, 10, 0, 1, 1, 0.1)


def looked(goal: Goal, subject: str = "model", role: Any = "validation", **metrics: float) -> str | None:
    """What a goal says after a look that finds these."""
    goal.evaluated(4, subject, Evaluation(role, "held-out examples", metrics, 10, 0))
    return goal.stop_run(REPORT)


def test_every_metric_has_to_be_reached_and_a_loss_from_above() -> None:
    goal = Goal({"accuracy": 0.9, "logloss": 0.3})
    assert looked(goal, accuracy=0.9, logloss=0.31) is None
    assert looked(goal, accuracy=0.89, logloss=0.3) is None
    said = looked(goal, accuracy=0.9, logloss=0.3)
    assert said == "evaluation.until is reached: accuracy 0.9, logloss 0.3"


def test_a_look_counts_once_and_only_at_the_model_on_validation_data() -> None:
    goal = Goal({"accuracy": 0.9})
    assert looked(goal, subject="base rate", accuracy=1.0) is None
    assert looked(goal, role="test", accuracy=1.0) is None
    assert looked(goal, accuracy=1.0) is not None
    assert goal.stop_run(REPORT) is None


def test_a_metric_that_no_look_finds_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'acuracy' .did you mean 'accuracy'.*finds accuracy, logloss"):
        looked(Goal({"acuracy": 0.9}), accuracy=1.0, logloss=0.1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What makes ``fedavg-mnist-mlp`` a matter of a second, on made-up digits."""
    data = digits.write(tmp_path_factory.mktemp("digits"))
    few = {"cohort.size": 6, "rounds": 12, "standalone.epochs": 24, "standalone.batch_size": 16, "evaluation.every": 2}
    return {**{f"data.{key}": value for key, value in data.items()}, "model.hidden": [16], **few}


def looks(run: Run) -> list[tuple[int, float]]:
    events = RunLog(run.folder).record().evaluations
    return [(event["round"], event["metrics"]["accuracy"]) for event in events if event["role"] == "validation"]


@pytest.mark.parametrize("mode", ["simulated", "standalone"])
def test_a_run_ends_with_the_look_that_finds_it(tmp_path: Path, settings: Mapping[str, Any], mode: str) -> None:
    whole = fedtower.run("fedavg-mnist-mlp", {**settings, "mode": mode}, runs=tmp_path)
    curve = looks(whole)
    wanted = max(value for _, value in curve[:-1])
    first = next(round for round, value in curve if value >= wanted)
    assert first < curve[-1][0]
    ended = fedtower.run(
        "fedavg-mnist-mlp", {**settings, "mode": mode, "evaluation.until": {"accuracy": wanted}}, runs=tmp_path
    )
    assert looks(ended) == [look for look in curve if look[0] <= first]
    assert ended.summary["rounds"] == first
    (said,) = [event["message"] for event in RunLog(ended.folder).record().warnings]
    assert f"stopped after round {first}" in said
    assert "evaluation.until is reached: accuracy" in said


def test_a_goal_without_looks_is_refused(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    blind = {**settings, "evaluation.every": 0, "evaluation.until": {"accuracy": 0.5}}
    with pytest.raises(RecipeError, match=r"evaluation.every = 0 asks for none"):
        fedtower.run("fedavg-mnist-mlp", blind, runs=tmp_path)
