"""Resuming: whatever stopped a run, and wherever, it ends with the bits of a run that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedtower
from fedtower.core.checkpoint import list_checkpoints, read_checkpoint
from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError
from fedtower.core.hooks import hookimpl
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.run import Run
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.testing.states import saved

Start = Callable[..., Any]
Options = Callable[..., list[str]]

DRAWS = Draws(20)
LONG = {
    "rounds": 40,
    "standalone.epochs": 15,
    "standalone.users_per_batch": 30,
    "checkpoint.every": 1,
    "evaluation.every": 20,
}


class StopAfter:
    """A plugin that ends the run after some round."""

    def __init__(self, round: int) -> None:
        self.round = round

    @hookimpl
    def stop_run(self, report: Any) -> str | None:
        return "it was told to" if report.round == self.round else None


def final(folder: Path) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return newest, saved(folder / "checkpoints", newest)


def assert_same_end(one: Path, other: Path) -> None:
    """Parameters, tables, optimisers, what clients keep, and every figure that was logged, to the last bit."""
    assert final(one)[0] == final(other)[0]
    assert_same_bits(final(one)[1], final(other)[1])
    names = {name.split("/")[0] for name in final(one)[1]}
    assert {"parameters", "tables", "clients"} <= names
    assert final(one)[1]["clients/user_vector.values"].any()
    assert learning_curve(one) == learning_curve(other)
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in (one, other)]
    for summary in summaries:
        del summary["seconds"], summary["index"]["build_seconds"], summary["index"]["microseconds_a_query"]
    assert summaries[0] == summaries[1]
    mine, yours = (read_checkpoint(folder / "index", final(folder)[0]) for folder in (one, other))
    assert_same_bits(mine, yours)


def learning_curve(folder: Path) -> list[dict[str, Any]]:
    """What the log says of every round, without the time it took."""
    record = RunLog(folder).record()
    events = [*record.rounds, *(event for event in record.evaluations if event["role"] == "validation")]
    return [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in events]


@pytest.mark.parametrize("mode", ["simulated", "standalone"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_that_a_plugin_stopped_ends_as_if_it_had_not(
    tmp_path: Path, small: Mapping[str, Any], request: pytest.FixtureRequest, mode: str, stop: int
) -> None:
    straight: Run = request.getfixturevalue("federated_run" if mode == "simulated" else "standalone_run")
    stopped = fedtower.run("dssm-synthetic", {**small, "mode": mode}, runs=tmp_path, observers=[StopAfter(stop)])
    assert stopped.summary["rounds"] == final(stopped.folder)[0] == stop
    fedtower.resume(stopped.folder)
    assert_same_end(stopped.folder, straight.folder)


def test_the_vectorised_runtime_goes_on_with_the_same_bits_too(tmp_path: Path, small: Mapping[str, Any]) -> None:
    settings = {**small, "runtime.name": "vectorized", "runtime.compile": False, "rounds": 4}
    straight = fedtower.run("dssm-synthetic", settings, runs=tmp_path)
    stopped = fedtower.run("dssm-synthetic", settings, runs=tmp_path, observers=[StopAfter(3)])
    fedtower.resume(stopped.folder)
    assert_same_end(stopped.folder, straight.folder)


def test_a_run_can_go_on_from_an_older_checkpoint(tmp_path: Path, small: Mapping[str, Any], federated_run: Run) -> None:
    run = fedtower.run("dssm-synthetic", {**small, "checkpoint.keep": 9}, runs=tmp_path)
    assert list_checkpoints(run.folder / "checkpoints") == [2, 4, 6]
    fedtower.resume(run.folder, start=2)
    assert_same_end(run.folder, federated_run.folder)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, small: Mapping[str, Any], federated_run: Run) -> None:
    run = fedtower.run("dssm-synthetic", small, runs=tmp_path)
    for _ in range(2):
        fedtower.resume(run.folder)
        assert_same_end(run.folder, federated_run.folder)
    with pytest.raises(CheckpointError, match=r"000001 has no readable manifest.json"):
        fedtower.resume(run.folder, start=1)


PUBLIC = {"rows.train": "public", "rows.public.share": 0.3, "rows.public.warmup": 2, "rounds": 12, "data.users": 40}


@pytest.mark.parametrize(
    ("settings", "kills"),
    [({"mode": "simulated"}, 20), ({"mode": "standalone"}, 5), (PUBLIC, 2)],
    ids=["simulated", "standalone", "public"],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tmp_path: Path, fork: Start, options: Options, settings: Mapping[str, Any], kills: int
) -> None:
    kill_and_compare(tmp_path, fork, options({**LONG, **settings}), kills)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["simulated", "standalone"])
def test_the_real_command_killed_twenty_times_ends_as_if_it_had_not_been(
    tmp_path: Path, options: Options, mode: str
) -> None:
    words = options({**LONG, "mode": mode, "standalone.epochs": 40})
    with ExitStack() as stack:

        def start(*arguments: object, folder: Path) -> Process:
            command = [sys.executable, "-m", "fedtower", *map(str, arguments)]
            with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
                started = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
            return Process(stack.enter_context(started), folder)

        kill_and_compare(tmp_path, start, words, kills=20)


def kill_and_compare(place: Path, start: Start, words: list[str], kills: int) -> None:
    """Run to the end once; then run, kill, resume, kill, ... and resume to the end: both ends are the same."""
    straight, killed = place / "straight", place / "killed"
    straight.mkdir()
    killed.mkdir()
    child = start("run", "dssm-synthetic", *words, folder=straight)
    assert child.wait() == 0, child.err
    pace = seconds_a_checkpoint(straight / "runs" / "dssm-synthetic-1")

    run = killed / "runs" / "dssm-synthetic-1"
    child = start("run", "dssm-synthetic", *words, folder=killed)
    for died in range(kills):
        # Every other one dies before it has got any further than the one before it.
        let_it_run(child, run, more=1 - died % 2, then=2 * pace * float(DRAWS.uniform("delay", died)))
        assert child.kill() == -signal.SIGKILL, f"it came to its end after {died} kills: {child.out} {child.err}"
        child = start("resume", run, folder=killed)
    assert child.wait() == 0, child.err
    assert_same_end(run, straight / "runs" / "dssm-synthetic-1")


def seconds_a_checkpoint(run: Path) -> float:
    """The mean time from one checkpoint to the next, as it went on this machine today."""
    written = sorted(path.stat().st_mtime for path in (run / "checkpoints").glob("0*"))
    return (written[-1] - written[0]) / (len(written) - 1)


def let_it_run(child: Any, run: Path, more: int, then: float) -> None:
    """Wait until the run has ``more`` new checkpoints, and then some time, but not longer than to the next one."""

    def newest() -> int:
        return max(list_checkpoints(run / "checkpoints"), default=0)

    start = newest()
    while child.poll() is None and newest() < start + more:
        time.sleep(0.001)
    until = time.monotonic() + then
    while time.monotonic() < until and newest() <= start + more:
        time.sleep(0.001)


def test_a_run_that_is_being_trained_is_refused_to_a_second_process(
    tmp_path: Path, fork: Start, options: Options
) -> None:
    run = tmp_path / "runs" / "dssm-synthetic-1"
    first = fork("run", "dssm-synthetic", *options({**LONG, "rounds": 100_000}), folder=tmp_path)
    let_it_run(first, run, more=1, then=0.0)
    (tmp_path / "second").mkdir()
    second = fork("resume", run, folder=tmp_path / "second")
    assert second.wait() == 5
    assert second.err == f"error: {run} is being trained by another process; wait for it, or end it"
    assert first.poll() is None
    # One that was killed holds nothing any longer.
    assert first.kill() == -signal.SIGKILL
    third = fork("resume", run, folder=tmp_path)
    let_it_run(third, run, more=1, then=0.0)

    # And one that is interrupted says how to go on.
    assert third.kill(signal.SIGINT) == 130
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert third.err == f"interrupted; `fedtower resume {run}` goes on from round {newest}"
    assert "Traceback" not in third.out


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(
    tmp_path: Path, small: Mapping[str, Any]
) -> None:
    run = fedtower.run("dssm-synthetic", {**small, "rounds": 1}, runs=tmp_path)
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint yet.*Start it again: fedtower run .*recipe\.toml"):
        fedtower.resume(run.folder)
    again = fedtower.run(run.folder / "recipe.toml", runs=tmp_path)
    assert again.summary["evaluations"] == json.loads((run.folder / "summary.json").read_text("utf-8"))["evaluations"]


def test_what_a_recipe_keeps_out_is_kept_out_when_it_goes_on(run_root: Path, small: Mapping[str, Any]) -> None:
    (run_root / "fedtower_plugins.py").write_text(LOUD, "utf-8")
    run = fedtower.run("dssm-synthetic", {**small, "rounds": 2})
    assert (run_root / "heard").read_text("utf-8") == "12"
    fedtower.resume(run.folder, start=2)
    quiet = fedtower.run("dssm-synthetic", {**small, "rounds": 2, "plugins.block": ["fedtower_plugins.py"]})
    fedtower.resume(quiet.folder, start=2)
    assert (run_root / "heard").read_text("utf-8") == "12"


LOUD = """
from pathlib import Path

from fedtower.core.hooks import hookimpl


@hookimpl
def round_finished(report):
    with Path("heard").open("a") as file:
        file.write(str(report.round))
"""


@dataclass(frozen=True)
class Process:
    """A child process, to be looked at and ended as a fork is."""

    started: subprocess.Popen[bytes]
    folder: Path

    def poll(self) -> int | None:
        return self.started.poll()

    def wait(self) -> int:
        return self.started.wait(300)

    def kill(self) -> int:
        self.started.kill()
        return self.wait()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text("utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text("utf-8")
