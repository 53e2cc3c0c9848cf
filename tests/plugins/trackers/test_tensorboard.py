"""The tensorboard tracker: what TensorBoard reads back is what the run told."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtower.core.hooks import Hooks
from fedtower.core.round import RoundReport
from fedtower.core.testing import examples
from fedtower.core.testing.observer import ObserverPromises
from fedtower.recsys.evaluation import Evaluation

pytest.importorskip("tensorboard", reason="the extra trackers is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedtower.plugins.trackers.tensorboard.tracker import TensorBoard


def started(folder: Path, tracker: TensorBoard) -> Hooks:
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(tracker, "tensorboard")
    hooks.observe("run_started", recipe=examples.recipe(), folder=folder)
    return hooks


def finish_rounds(hooks: Hooks, *rounds: int, loss: float = 0.5) -> None:
    for number in rounds:
        report = RoundReport(number, 9, loss, 10, 1, 100, 200, 0.25, metrics={"clipped": 0.75})
        hooks.observe("round_finished", report=report)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_figures_are_scalars_at_their_round(tmp_path: Path) -> None:
    hooks = started(tmp_path, TensorBoard())
    finish_rounds(hooks, 1, 2)
    judged = Evaluation("test", "full ranking", {"HR@10": 0.25}, 4, 4)
    hooks.observe("evaluated", round=2, subject="model", evaluation=judged)
    hooks.observe("evaluated", round=2, subject="ItemPop", evaluation=judged)
    # A kill from here on loses nothing.
    scalars = read(tmp_path / "tensorboard")
    assert scalars["train/loss"] == [(1, 0.5), (2, 0.5)]
    assert scalars["train/clipped"] == [(1, 0.75), (2, 0.75)]
    assert scalars["round/bytes_down"] == [(1, 200.0), (2, 200.0)]
    assert scalars["test (full ranking)/HR@10"] == scalars["ItemPop test (full ranking)/HR@10"] == [(2, 0.25)]
    hooks.observe("run_finished", summary={})


def test_a_resumed_run_replaces_the_rounds_it_runs_again(tmp_path: Path) -> None:
    finish_rounds(started(tmp_path, TensorBoard()), 1, 2, 3, 4, loss=0.5)
    hooks = started(tmp_path, TensorBoard())
    hooks.observe("run_resumed", round=2)
    finish_rounds(hooks, 3, 4, 5, loss=0.25)
    assert read(tmp_path / "tensorboard")["train/loss"] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]


def test_the_event_files_go_where_the_setting_says(tmp_path: Path) -> None:
    finish_rounds(started(tmp_path / "run", TensorBoard(folder=tmp_path / "board")), 1)
    assert read(tmp_path / "board")["train/loss"] == [(1, 0.5)]


class TestTensorBoard(ObserverPromises):
    make = TensorBoard
