"""``fedtower bench``: a suite of somebody else's, really run, stopped, and gone on with."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from fedtower.core.cli import call
from fedtower.core.registry import discover
from fedtower.recsys.bench_command import Shown
from fedtower.recsys.suite import Column, Entry, Layout, Suite, tasks_of
from fedtower.recsys.suite_figures import Finished

GOALS = {"near": 0.9, "far": 0.99}

SUITE = """
title = "Sizes"
seeds = [1, 2]
options = [
    "data.users=60", "data.items=200", "data.mean_events=40", "model.dim=8", "model.hidden=16", "local.batch_size=16",
    "local.negatives=20", "local.history_length=20", "runtime.name=torch_loop", "rounds=4", "evaluation.every=2",
    "checkpoint.every=2",
]

[[entries]]
name = "small"
recipe = "dssm-synthetic"
options = ["cohort.size=5"]

[[entries]]
name = "large"
recipe = "dssm-synthetic"
options = ["cohort.size=9"]
against = "small"

[[tables]]
title = "Figures"
columns = ["HR@10", "bytes_up"]

[[plots]]
title = "Curves"
y = "HR@10"
"""

PLUGIN = """
from fedtower.core.hooks import hookimpl

@hookimpl
def fedtower_register(registry):
    registry.suite("sizes", "her_suite:suite.toml", summary="sizes of cohorts")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plugin of its own that offers the suite."""
    (tmp_path / "her_suite").mkdir()
    (tmp_path / "her_suite" / "__init__.py").touch()
    (tmp_path / "her_suite" / "suite.toml").write_text(SUITE)
    (tmp_path / "fedtower_plugins.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "her_suite", raising=False)  # of the test before
    return tmp_path


def results(place: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((place / "bench" / "sizes" / "results.json").read_text())
    return held


def runs(place: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime_ns for path in place.glob("bench/sizes/runs/*/summary.json")}


def test_a_suite_is_run_and_what_is_done_is_not_done_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "sizes", "--seeds", "1"]) == 0
    first = runs(place)
    assert set(first) == {"small-s1-1", "large-s1-1"}
    capsys.readouterr()
    assert call(["bench", "sizes"]) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 2
    assert max(map(len, out.splitlines())) <= 80
    after = runs(place)
    assert set(after) == {f"{name}-s{seed}-1" for name in ("small", "large") for seed in (1, 2)}
    assert {name: after[name] for name in first} == first

    held = results(place)
    rows = {row["entry"]: row for row in held["tables"][0]["rows"]}
    for entry in ("small", "large"):
        summaries = [json.loads((place / f"bench/sizes/runs/{entry}-s{s}-1/summary.json").read_text()) for s in (1, 2)]
        tested = [next(e for e in each["evaluations"] if e["role"] == "test") for each in summaries]
        mean = sum(each["metrics"]["HR@10"] for each in tested) / 2
        assert rows[entry]["figures"]["HR@10"]["mean"] == pytest.approx(mean)
        assert rows[entry]["figures"]["bytes_up"]["mean"] == sum(each["bytes_up"] for each in summaries) / 2
    apart = rows["large"]["figures"]["HR@10"]["mean"] - rows["small"]["figures"]["HR@10"]["mean"]
    assert rows["large"]["differences"]["HR@10"]["mean"] == pytest.approx(apart)
    page = (place / "bench/sizes/report.html").read_text()
    assert "<svg" in page
    assert "## Figures" in (place / "bench/sizes/results.md").read_text()


def test_a_line_about_a_run_has_the_figures_of_its_own_tables() -> None:
    near, far = (
        Layout(f"to {reach}", (Column("accuracy", reach), "bytes_up"), (name,)) for name, reach in GOALS.items()
    )
    suite = Suite("x", tuple(Entry(name, "dssm-synthetic") for name in GOALS), (near, far))
    (task, *_) = tasks_of(suite, discover(), only=["far"])
    figures = {"rounds to accuracy 0.9": 2.0, "rounds to accuracy 0.99": 30.5, "bytes_up": 1000.0}
    out = io.StringIO()
    Shown(Console(file=out), suite).ended(task, Finished("far", 1, figures=figures), 1, 1, before=False)
    assert out.getvalue() == "1 of 1: far-s1 done: rounds to accuracy 0.99 30.5; up 1.0 kB\n"


def test_another_option_is_another_run(place: Path) -> None:
    for options in ([], ["-o", "local.lr=0.5"]):
        assert call(["bench", "sizes", "--seeds", "1", "--only", "small", *options]) == 0
    assert set(runs(place)) == {"small-s1-1", "small-s1-2"}


def test_a_run_folder_of_another_version_is_left_alone(place: Path) -> None:
    older = place / "bench/sizes/runs/small-s1-1"
    older.mkdir(parents=True)
    (older / "recipe.toml").write_text('name = "small-s1"\nwhat_there_was = 3\n')
    assert call(["bench", "sizes", "--seeds", "1", "--only", "small"]) == 0
    assert set(runs(place)) == {"small-s1-2"}


def test_a_setting_that_a_run_did_not_know_was_at_its_default(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "sizes", "--seeds", "1", "--only", "small"]) == 0
    written = place / "bench/sizes/runs/small-s1-1/recipe.toml"
    held = tomllib.loads(written.read_text())
    for section, setting in (("model", "user_vector"), ("transport", "block"), ("local", "negatives_from")):
        del held[section][setting]  # of a model, of a transport, and of the recipe itself
    written.write_text(tomli_w.dumps(held))
    capsys.readouterr()
    assert call(["bench", "sizes", "--seeds", "1", "--only", "small"]) == 0
    assert "done before" in capsys.readouterr().out
    held["model"]["user_vector"] = True
    written.write_text(tomli_w.dumps(held))
    assert call(["bench", "sizes", "--seeds", "1", "--only", "small"]) == 0
    assert set(runs(place)) == {"small-s1-1", "small-s1-2"}


def test_one_entry_alone_leaves_the_results_of_the_others(place: Path) -> None:
    def told() -> dict[tuple[str, int], dict[str, float]]:
        return {(run["entry"], run["seed"]): run["figures"] for run in results(place)["runs"]}

    assert call(["bench", "sizes", "--seeds", "1,2", "--only", "small"]) == 0
    small = told()
    assert set(small) == {("small", 1), ("small", 2)}
    assert call(["bench", "sizes", "--seeds", "1", "--only", "large"]) == 0
    both = told()
    assert set(both) == {*small, ("large", 1)}
    assert {key: both[key] for key in small} == small
    (row,) = (each for each in results(place)["tables"][0]["rows"] if each["entry"] == "large")
    apart = both["large", 1]["HR@10"] - both["small", 1]["HR@10"]
    assert row["differences"]["HR@10"]["mean"] == pytest.approx(apart)
    page = (place / "bench/sizes/results.md").read_text()
    assert "| small" in page
    assert "Seeds 1, 2;" in page
    # Other options, and a run that did not come to its end, are none of these results.
    (place / "bench/sizes/runs/small-s2-1/summary.json").unlink()
    assert call(["bench", "sizes", "--seeds", "1", "--only", "large", "-o", "rounds=2"]) == 0
    assert set(told()) == {("large", 1)}
    assert call(["bench", "sizes", "--seeds", "1", "--only", "large"]) == 0
    assert told() == {key: both[key] for key in (("small", 1), ("large", 1))}


def test_one_that_fails_is_told_and_the_others_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = place / "her_suite" / "suite.toml"
    suite.write_text(suite.read_text().replace('options = ["cohort.size=5"]', 'options = ["local.lr=1e30"]'))
    assert call(["bench", "sizes", "--seeds", "1"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 runs failed, the first of them small with seed 1" in said
    held = {run["entry"]: run for run in results(place)["runs"]}
    assert held["small"]["error"]
    assert held["large"]["figures"]["HR@10"] > 0


def test_one_that_was_killed_goes_on_to_the_same_figures(place: Path) -> None:
    long = ["-o", "rounds=400", "-o", "checkpoint.every=5", "--seeds", "1", "--only", "small"]
    child = subprocess.Popen(
        [sys.executable, "-m", "fedtower", "bench", "sizes", *long],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])},
        stdout=subprocess.DEVNULL,
    )
    told = place / "bench/sizes/runs/small-s1-1/log.jsonl"
    until = time.monotonic() + 120
    while not (told.is_file() and '"checkpoint"' in told.read_text()) and time.monotonic() < until:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert call(["bench", "sizes", *long]) == 0
    assert '"event": "resumed"' in told.read_text()
    went_on = results(place)["runs"][0]["figures"]
    assert call(["bench", "sizes", *long, "--out", "bench/unbroken"]) == 0
    unbroken = json.loads((place / "bench/unbroken/results.json").read_text())["runs"][0]["figures"]
    assert went_on == unbroken
