"""The mlflow tracker: what MLflow reads back is what the run told, and nothing else is asked or told anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtower.core.hooks import Hooks
from fedtower.core.round import RoundReport
from fedtower.core.testing import examples
from fedtower.core.testing.observer import ObserverPromises
from fedtower.recsys.evaluation import Evaluation

try:
    from fedtower.plugins.trackers.mlflow.tracker import MLflow
except ModuleNotFoundError:
    pytest.skip("the extra trackers is not installed", allow_module_level=True)

from mlflow import MlflowClient


def started(folder: Path, tracker: MLflow | None = None) -> Hooks:
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(tracker or MLflow(), "mlflow")
    hooks.observe("run_started", recipe=examples.recipe(), folder=folder)
    return hooks


def finish_round(hooks: Hooks, number: int, loss: float = 0.5) -> None:
    hooks.observe("round_finished", report=RoundReport(number, 9, loss, 10, 1, 100, 200, 0.25))


def client(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=(folder / "mlruns").as_uri())


def run_id(folder: Path) -> str:
    return (folder / "mlflow-run.txt").read_text("utf-8").strip()


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(folder).get_metric_history(run_id(folder), name)]


def test_figures_are_metrics_and_the_recipe_is_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "small-1"
    folder.mkdir()
    hooks = started(folder)
    finish_round(hooks, 1)
    finish_round(hooks, 2, loss=0.25)
    judged = Evaluation("test", "sampled, 99 negatives", {"HR@10": 0.25}, 4, 4)
    hooks.observe("evaluated", round=2, subject="model", evaluation=judged)
    hooks.observe("run_finished", summary={})
    run = client(folder).get_run(run_id(folder))
    assert (run.info.run_name, run.info.status) == ("small-1", "FINISHED")
    assert client(folder).get_experiment(run.info.experiment_id).name == "fedtower"
    assert run.data.params["seed"] == str(examples.recipe().seed)
    assert run.data.params["model.name"] == examples.recipe().model.name
    assert history(folder, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert history(folder, "test sampled 99 negatives/HR_at_10") == [(2, 0.25)]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    finish_round(started(tmp_path), 1)
    first = run_id(tmp_path)
    hooks = started(tmp_path)
    hooks.observe("run_resumed", round=1)
    finish_round(hooks, 2)
    assert run_id(tmp_path) == first
    assert client(tmp_path).get_run(first).info.status == "RUNNING"
    assert history(tmp_path, "train/loss") == [(1, 0.5), (2, 0.5)]


def test_the_experiment_and_the_place_can_be_named(tmp_path: Path) -> None:
    place = (tmp_path / "elsewhere").as_uri()
    (tmp_path / "run").mkdir()
    finish_round(started(tmp_path / "run", MLflow(tracking_uri=place, experiment="mine")), 1)
    assert MlflowClient(tracking_uri=place).get_experiment_by_name("mine") is not None
    assert not (tmp_path / "run" / "mlruns").exists()


def test_a_server_that_is_gone_is_reported_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    hooks = Hooks.none(report=messages.append)
    hooks.add(MLflow(), "mlflow")
    hooks.observe("run_started", recipe=examples.recipe(), folder=tmp_path)
    asked = []

    def gone(*arguments: object, **settings: object) -> None:
        asked.append(1)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(MlflowClient, "log_batch", gone)
    for number in (1, 2, 3):
        finish_round(hooks, number)
    assert len(asked) == 1
    assert len(messages) == 1
    assert "nobody answers" in messages[0]


def test_without_a_server_nothing_is_sent(tmp_path: Path) -> None:
    # In a fresh interpreter without pytest's and CI's marks, by which MLflow too keeps quiet.
    program = f"""
import os, socket, sys
from pathlib import Path
for name in [name for name in os.environ if name.startswith(("PYTEST", "MLFLOW", "CI", "GITHUB", "GITLAB"))]:
    del os.environ[name]
def refuse(*arguments, **settings):
    os.write(2, b"a connection was tried: %r" % (arguments,))
    os._exit(9)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from fedtower.core.testing import examples
from fedtower.plugins.trackers.mlflow.tracker import MLflow
tracker = MLflow()
tracker.run_started(examples.recipe(), Path({str(tmp_path)!r}))
tracker.round_finished(examples.report(1))
tracker.run_finished()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert history(tmp_path, "train/loss")


class TestMLflow(ObserverPromises):
    make = MLflow
