"""A real asynchronous federation on loopback, its processes killed: the same steps of the same updates, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog
from tests.plugins.transports.grpc import stepping
from tests.plugins.transports.grpc.served import Ground, Served, newest, served
from tests.plugins.transports.grpc.stepping import KeptSteps, replayed

CLIENTS, BUFFER, STALEST = 6, 3, 2
SMALL = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": CLIENTS,
    "evaluation.every": 0,
    "evaluation.negatives": 20,
    "checkpoint.every": 2,
}
SERVED = {
    "transport.lease_seconds": 8.0,
    "transport.heartbeat_seconds": 2.0,
    "asynchronous.buffer": BUFFER,
    "asynchronous.concurrency": 4,
    "asynchronous.max_staleness": STALEST,
}


@pytest.mark.parametrize(("rounds", "kills"), [(6, 3), pytest.param(60, 60, marks=pytest.mark.soak)])
def test_killed_at_any_time_it_makes_the_same_steps_of_the_same_updates(
    tmp_path: Path, rounds: int, kills: int
) -> None:
    ground = Ground.make(tmp_path, "dssm-synthetic", SMALL, CLIENTS)
    shutil.copyfile(str(stepping.__file__), ground.folder / "fedtower_plugins.py")
    with served(ground, "killed", {**SMALL, **SERVED, "rounds": rounds}) as run:
        run.swarm()
        run.wait_for(lambda: run.metric('fedtower_uploads_total{duplicate="false",task="train"}') > 0)
        kill(run, rounds, kills)
        run.finish(600.0)
        stepping.keep(run.folder, RunFolder.open(run.folder).recipe())
    kept = KeptSteps.read(run.folder / "kept")
    as_acknowledged(run, kept, rounds)
    as_told(run, kept, rounds)
    want, got = replayed(run.folder, kept), newest(run.folder)
    assert set(got) == {name for name in want if not name.startswith("clients")}
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def kill(run: Served, rounds: int, kills: int) -> None:
    """Kill the two processes in turns, at moments spread over the run."""
    draws = np.random.default_rng(9)
    for number in range(kills):
        run.wait_for(lambda: run.rounds() >= number * rounds // kills - 1)  # noqa: B023
        time.sleep(float(draws.uniform(0.0, 0.5)))
        name = ("table", "intake")[number % 2]
        pid = run.pid(name)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # the last round is over, and the process has ended
            assert number >= 2, "the run was over before both processes had been killed"
            return
        run.wait_for(lambda: run.pid(name) != pid)  # noqa: B023


def as_acknowledged(run: Served, kept: KeptSteps, rounds: int) -> None:
    """What was acknowledged was accepted once; every step took what no other took, and a client once."""
    done = Counter((said["round"], said["client"]) for said in run.said_by_devices() if _is_trained(said))
    accepted = Counter((window, client) for (window, _), (client, _) in kept.uploads.items())
    assert set(done.values()) == set(accepted.values()) == {1}
    assert set(done) <= set(accepted), "an update that was acknowledged is lost"
    assert set(kept.steps) == set(range(1, rounds + 1))
    taken = [place for places in kept.steps.values() for place in places]
    assert len(taken) == len(set(taken)), "an update counts twice"
    for version, places in kept.steps.items():
        fresh = [place for place in places if place[0] >= version - STALEST]
        assert len(fresh) == len({kept.uploads[place][0] for place in fresh}) in (0, BUFFER)
    left = len(kept.uploads) - len(taken)
    said = [event["message"] for event in RunLog(run.folder).record().warnings]
    assert any(f"{left} updates were accepted after the last step" in each for each in said) == bool(left)


def as_told(run: Served, kept: KeptSteps, rounds: int) -> None:
    """The log says of every version how stale its updates were, and how many were too stale."""
    for event in RunLog(run.folder).record().rounds:
        version = event["round"]
        behind = [version - window for window, _ in kept.steps[version]]
        fresh = [each for each in behind if each <= STALEST]
        assert event["clients"] == len(fresh)
        if fresh:
            assert event["staleness"] == {"mean": np.mean(fresh), "max": max(fresh)}
        assert event.get("refused", {}) == ({"stale": len(behind) - len(fresh)} if len(behind) > len(fresh) else {})


def _is_trained(said: dict[str, object]) -> bool:
    return said.get("event") == "done" and said.get("task") == "train"
