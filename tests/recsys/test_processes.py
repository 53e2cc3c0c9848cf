"""Runs spread over processes: they train what one process trains, go on at another number, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.plugins.datasets.criteo import example as clicks
from fedtower.recsys.run import load
from fedtower.recsys.runlog import RunLog

Start = Callable[..., Any]
Options = Callable[..., list[str]]
Arrays = Mapping[str, NDArray[Any]]

# 60 users in batches of 17, and 110 examples in batches of 29: no batch divides by two.
ODD = {"standalone.users_per_batch": 17, "standalone.batch_size": 29}
EPOCHS = {**ODD, "mode": "standalone", "standalone.epochs": 4, "rounds": 4, "evaluation.every": 2}
KEPT = {"checkpoint.every": 1, "checkpoint.keep": 99}


def at_once(count: int) -> Iterator[dict[str, str]]:
    """What torchrun puts into the environment of each of ``count`` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(count):
        yield {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }


@pytest.fixture
def start(fork: Start, tmp_path: Path) -> Callable[..., list[Any]]:
    """Starts a command line in ``count`` processes; ``other`` are the words of those that do not lead, if not the
    same.
    """

    def all_of(*arguments: object, count: int = 2, other: Sequence[object] | None = None) -> list[Any]:
        children = []
        for rank, environment in enumerate(at_once(count) if count > 1 else [{}]):
            folder = tmp_path / f"terminal-{rank}-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            words = arguments if rank == 0 or other is None else other
            children.append(fork(*words, folder=folder, environment=environment))
        return children

    return all_of


@pytest.fixture
def finish(start: Callable[..., list[Any]], options: Options, tmp_path: Path) -> Callable[..., Path]:
    """Trains ``name`` in ``count`` processes and gives its folder."""

    def trained(name: str, overrides: Mapping[str, Any], count: int) -> Path:
        runs = tmp_path / f"of-{count}"
        small = options(overrides) if name == "dssm-synthetic" else clicks_of(tmp_path, overrides)
        children = start("run", name, *small, f"--runs={runs}", count=count)
        assert [child.wait() for child in children] == [0] * count, [child.err for child in children]
        for silent in children[1:]:
            assert (silent.out, silent.err) == ("", "")
        (folder,) = runs.iterdir()
        return folder

    return trained


def test_spread_tables_are_those_of_one_process(fork: Start, tmp_path: Path) -> None:
    children = []
    for rank, environment in enumerate(at_once(2)):
        (folder := tmp_path / str(rank)).mkdir()
        program = str(Path(__file__).with_name("spread.py"))
        children.append(fork(folder=folder, environment=environment, program=program))
    # At its end the other process asks for a row that is not there, which is an UpdateError's exit code for both.
    assert [child.wait() for child in children] == [8, 8], [child.err for child in children]
    for child in children:
        assert [line for line in child.out.splitlines() if line.startswith("not so")] == []
    assert "all of it" in children[0].out
    assert "row ids of 'item' go from 0 to 22, but 99 was asked for" in children[1].out


def clicks_of(folder: Path, overrides: Mapping[str, Any]) -> list[str]:
    """The words that make a recipe of labelled examples small, on a made-up file."""
    settings = {f"data.{name}": value for name, value in clicks.write(folder).items()}
    values = {**settings, "model.dim": 4, **overrides}
    return [f"--option={name}={json.dumps(value)}" for name, value in values.items()]


def state_of(folder: Path) -> dict[str, NDArray[Any]]:
    """All that a run has learnt, and what its clients keep, brought into one process."""
    training = load(folder).training
    return {
        **training.snapshot(),
        **{f"clients/{name}": kept for name, kept in training.learned().store.snapshot().items()},
    }


def assert_close(one: Arrays, other: Arrays) -> None:
    """Equal within the rounding of float32 sums, of which parameters show 1e-6 of the largest; what moments are left
    when everything has been learnt is differences of such sums.
    """
    assert set(one) == set(other)
    for name, value in one.items():
        scale = float(np.abs(value).max(initial=0.0)) if value.dtype.kind == "f" else 0.0
        part = 1e-3 if "adam/" in name or name.startswith("optimizer/") else 1e-5
        np.testing.assert_allclose(other[name], value, rtol=0, atol=part * scale, err_msg=name)


def figures(folder: Path) -> list[dict[str, float]]:
    """What the log says of every epoch and evaluation, in short."""
    record = RunLog(folder).record()
    losses = [{"loss": event["loss"], "clients": event["clients"]} for event in record.rounds]
    return [*losses, *(event["metrics"] for event in record.evaluations)]


CASES = {
    "users, rows dealt out": ("dssm-synthetic", EPOCHS),
    "users, tables dealt out": ("dssm-synthetic", {**EPOCHS, "rows.sharding": "table_wise", "rows.optimizer": "sgd"}),
    "examples": ("dlrm-criteo", EPOCHS),
    "examples, three processes": ("wide-deep-criteo", EPOCHS),
    "rounds": ("dssm-synthetic", {"rounds": 3, "transport.block": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_many_processes_train_what_one_trains(case: str, finish: Callable[..., Path]) -> None:
    name, overrides = CASES[case]
    one, many = (finish(name, overrides, count) for count in (1, 3 if "three" in case else 2))
    assert_close(state_of(one), state_of(many))
    for here, there in zip(figures(one), figures(many), strict=True):
        assert here == pytest.approx(there, abs=1e-4)
    assert load(one).evaluate().metrics == pytest.approx(load(many).evaluate().metrics, abs=1e-4)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_at_another_number_of_processes(
    first: int, then: int, finish: Callable[..., Path], start: Callable[..., list[Any]], tmp_path: Path
) -> None:
    straight = finish("dssm-synthetic", {**EPOCHS, **KEPT}, first)
    again = tmp_path / "again"
    shutil.copytree(straight, again)
    for later in ("000003", "000004"):
        shutil.rmtree(again / "checkpoints" / later)
    children = start("resume", again, count=then)
    assert [child.wait() for child in children] == [0] * then, [child.err for child in children]
    assert "going on after epoch 2" in children[0].out
    assert_close(state_of(straight), state_of(again))
    assert figures(straight)[-1] == pytest.approx(figures(again)[-1], abs=1e-4)


def test_a_rank_killed_in_the_middle_of_a_save_leaves_a_whole_checkpoint(
    start: Callable[..., list[Any]], finish: Callable[..., Path], options: Options, tmp_path: Path
) -> None:
    long = {**EPOCHS, "standalone.epochs": 12, "rounds": 12, "checkpoint.every": 1, "evaluation.every": 0}
    straight = state_of(finish("dssm-synthetic", long, 1))
    runs = tmp_path / "killed"
    children = start("run", "dssm-synthetic", *options(long), f"--runs={runs}")
    for victim in (1, 0, 1):
        newest = max((int(path.name) for path in runs.glob("*/checkpoints/[0-9]*")), default=0)
        wait_for(runs, f"*/checkpoints/{newest + 1:06d}", children)  # its saving removes what the last kill left
        (folder,) = runs.iterdir()
        wait_for(runs, "*/checkpoints/.*.unfinished/attachments/tables", children)
        children[victim].kill()
        assert children[1 - victim].wait() == 1
        assert "another of the 2 processes of this run ended without a word" in children[1 - victim].err
        load(folder)  # every file of the newest checkpoint is checked against its manifest
        children = start("resume", folder)
    assert [child.wait() for child in children] == [0, 0], [child.err for child in children]
    assert_close(straight, state_of(folder))


def wait_for(root: Path, pattern: str, children: Sequence[Any]) -> Path:
    """The first path under ``root`` like ``pattern``, as soon as there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until and all(child.poll() is None for child in children):
        for path in root.glob(pattern):
            return path
        time.sleep(0.001)
    raise AssertionError(f"no {pattern}: {[child.err[-500:] for child in children]}")


BAD = {
    "a misspelt option": (["--option=standalone.epohcs=2"], 2, "epohcs"),
    "another option": (["--option=standalone.epochs=2"], 2, "process 1 of 2 was started with another recipe"),
}


@pytest.mark.parametrize("bad", BAD)
def test_when_one_fails_all_end_with_its_code_and_it_is_said_once(
    bad: str, start: Callable[..., list[Any]], options: Options, tmp_path: Path
) -> None:
    more, code, said = BAD[bad]
    words = ["run", "dssm-synthetic", *options(EPOCHS), f"--runs={tmp_path / 'runs'}"]
    children = start(*words, other=[*words, *more])
    assert [child.wait() for child in children] == [code, code]
    complaints = [child.err for child in children if child.err]
    assert len(complaints) == 1, complaints
    assert complaints[0].startswith("error: ")
    assert said in complaints[0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run", "dssm-sinthetic"], 2, "dssm-sinthetic"),
        (["run", "dssm-synthetic", "-o", "mode=standalone", "-o", "local.loss=in_batch_softmax"], 2, "torchrun has"),
        (["run", "fedavg-mnist-mlp"], 2, "has none: leave torchrun out"),
        (
            ["run", "dssm-synthetic", "-o", "rows.public.share=0.1", "-o", "rows.public.warmup=1"],
            2,
            "public data trains the rows in one process",
        ),
        (["resume", "nowhere"], 5, "nowhere is not a run folder"),
    ],
)
def test_what_all_refuse_is_said_once(
    words: list[str], code: int, said: str, start: Callable[..., list[Any]], shared_data: Path
) -> None:
    children = start(*words)
    assert [child.wait() for child in children] == [code, code], [child.err for child in children]
    (complaint,) = [child.err for child in children if child.err]
    assert said in complaint


def test_an_interrupted_run_says_once_how_to_go_on(
    start: Callable[..., list[Any]], options: Options, tmp_path: Path
) -> None:
    long = {**EPOCHS, "standalone.epochs": 500, "rounds": 500, "checkpoint.every": 1, "evaluation.every": 0}
    children = start("run", "dssm-synthetic", *options(long), f"--runs={tmp_path / 'runs'}")
    wait_for(tmp_path / "runs", "*/checkpoints/000002", children)
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    assert [child.wait() for child in children] == [130, 130]
    assert "goes on from round" in children[0].err
    assert children[1].err == ""


def torchrun(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fedtower"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def workers_of(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    return [int(word) for word in Path(f"/proc/{agent}/task/{agent}/children").read_text("utf-8").split()]


def test_torchrun_itself_trains_what_one_process_trains(finish: Callable[..., Path], tmp_path: Path) -> None:
    runs = tmp_path / "torchrun"
    with torchrun("run", "dlrm-criteo", *clicks_of(tmp_path, EPOCHS), f"--runs={runs}") as run:
        out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    (folder,) = runs.iterdir()
    assert out.count("report: ") == 1
    assert "Warning" not in err
    assert_close(state_of(finish("dlrm-criteo", EPOCHS, 1)), state_of(folder))


@pytest.mark.parametrize("how", ["a rank is killed", pytest.param("the whole is told to end", marks=pytest.mark.soak)])
def test_torchrun_ends_with_its_ranks_and_one_process_goes_on(
    how: str, finish: Callable[..., Path], start: Callable[..., list[Any]], tmp_path: Path
) -> None:
    long = {**EPOCHS, "standalone.epochs": 12, "rounds": 12, "checkpoint.every": 1, "evaluation.every": 0}
    runs = tmp_path / "torchrun"
    with torchrun("run", "dlrm-criteo", *clicks_of(tmp_path, long), f"--runs={runs}") as run:
        until = time.monotonic() + 60
        while not list(runs.glob("*/checkpoints/000003")) and time.monotonic() < until and run.poll() is None:
            time.sleep(0.01)
        ranks = workers_of(run.pid)
        if how == "a rank is killed":
            os.kill(ranks[-1], signal.SIGKILL)
        else:
            run.terminate()
        run.communicate(timeout=60)
    assert run.returncode != 0
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    (folder,) = runs.iterdir()
    (child,) = start("resume", folder, count=1)
    assert child.wait() == 0, child.err
    assert_close(state_of(finish("dlrm-criteo", long, 1)), state_of(folder))
