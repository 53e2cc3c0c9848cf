"""The jsonl tracker: what the hooks tell is in the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtower.core.hooks import Hooks
from fedtower.core.recipe import Recipe, parse_recipe
from fedtower.core.round import RoundReport
from fedtower.core.testing.observer import ObserverPromises
from fedtower.plugins.trackers.jsonl import JSONLines
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.runlog import RunLog


def recipe() -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "rounds": 9,
            "seed": 3,
            "local": {"steps": 1},
            "data": {"name": "synthetic"},
            "model": {"name": "dssm"},
            "cohort": {"name": "uniform"},
            "server": {"optimizer": "sgd", "lr": 1.0},
        }
    )


def started(folder: Path) -> Hooks:
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(JSONLines(), "jsonl")
    hooks.observe("run_started", recipe=recipe(), folder=folder)
    return hooks


def report(number: int) -> RoundReport:
    return RoundReport(number, 9, 0.5, 10, 1, 100, 200, 0.25, metrics={"clipped": 0.75})


def test_a_run_is_in_its_log(tmp_path: Path) -> None:
    hooks = started(tmp_path)
    hooks.observe("data_loaded", card={"name": "generated", "users": 3}, headline=("HR@5", "MRR"))
    hooks.observe("model_built", shared_bytes=40, table_bytes=176)
    hooks.observe("warned", message="mind the gap")
    hooks.observe("round_finished", report=report(1))
    evaluation = Evaluation("test", "full ranking", {"HR@10": np.float64(0.5)}, 4, 3)
    hooks.observe("evaluated", round=1, subject="model", evaluation=evaluation)
    hooks.observe("evaluated", round=1, subject="ItemPop", evaluation=evaluation)
    hooks.observe("checkpoint_written", round=1, path=tmp_path / "checkpoints" / "000001")
    hooks.observe("run_finished", summary={"rounds": 1, "seconds": 0.25})
    events = [{key: value for key, value in event.items() if key != "time"} for event in RunLog(tmp_path).events()]
    assert events == [
        {"event": "run_started", "name": "small", "mode": "simulated", "seed": 3, "rounds": 9},
        {"event": "data", "card": {"name": "generated", "users": 3}, "headline": ["HR@5", "MRR"]},
        {"event": "model", "shared_bytes": 40, "table_bytes": 176},
        {"event": "warning", "message": "mind the gap"},
        {
            "event": "round",
            "round": 1,
            "loss": 0.5,
            "metrics": {"clipped": 0.75},
            "clients": 10,
            "dropped": 1,
            "bytes_up": 100,
            "bytes_down": 200,
            "seconds": 0.25,
        },
        {
            "event": "evaluation",
            "round": 1,
            "role": "test",
            "label": "full ranking",
            "metrics": {"HR@10": 0.5},
            "cases": 4,
            "users": 3,
        },
        {
            "event": "baseline",
            "name": "ItemPop",
            "role": "test",
            "label": "full ranking",
            "metrics": {"HR@10": 0.5},
            "cases": 4,
            "users": 3,
        },
        {"event": "checkpoint", "round": 1, "path": "checkpoints/000001"},
        {"event": "run_finished", "rounds": 1, "seconds": 0.25},
    ]


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    first = started(tmp_path)
    for number in (1, 2, 3):
        first.observe("round_finished", report=report(number))
    hooks = started(tmp_path)
    hooks.observe("run_resumed", round=2)
    hooks.observe("round_finished", report=report(3))
    events = list(RunLog(tmp_path).events())
    assert [event["event"] for event in events] == ["run_started", "round", "round", "round", "resumed", "round"]
    assert [event["round"] for event in RunLog(tmp_path).record().rounds] == [1, 2, 3]


class TestJSONLines(ObserverPromises):
    make = JSONLines
