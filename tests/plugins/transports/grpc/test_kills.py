"""Both processes of a server killed with SIGKILL at random moments: what was acknowledged counts once, to the bit."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fedtower
from fedtower.core.draws import Draws
from fedtower.plugins.journals.postgresql.server import Server
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog
from tests.plugins.journals.own_server import own_server
from tests.plugins.transports.grpc import keeping
from tests.plugins.transports.grpc.killing import Acknowledges, GivesRows, Killer
from tests.plugins.transports.grpc.replaying import Kept, Replayed
from tests.plugins.transports.grpc.served import Ground, Served, newest, served

CLIENTS, COHORT = 20, 8
SMALL = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": True,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": COHORT,
    "evaluation.every": 10,
    "evaluation.negatives": 20,
    "checkpoint.every": 2,
    "transforms.0.name": "clip",
    "transforms.0.norm": 0.5,
}
TAKEN = 'fedtower_uploads_total{duplicate="false",task="train"}'
GIVEN = 'fedtower_leases_total{task="train"}'
SERVED = {"transport.wait_for": CLIENTS, "transport.lease_seconds": 20.0, "transport.heartbeat_seconds": 2.0}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    ground = Ground.make(tmp_path_factory.mktemp("kills"), "dssm-synthetic", SMALL, CLIENTS)
    shutil.copyfile(str(keeping.__file__), ground.folder / "fedtower_plugins.py")
    return ground


@pytest.fixture
def postgresql() -> Iterator[Server]:
    with own_server("two intakes must be tried here") as server:
        yield server


@pytest.mark.parametrize(
    ("rounds", "of_intake", "of_table"), [(4, 10, 2), pytest.param(50, 150, 50, marks=pytest.mark.soak)]
)
def test_what_was_acknowledged_counts_once_whoever_is_killed(
    ground: Ground, rounds: int, of_intake: int, of_table: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(ground, "killed", {**SMALL, **SERVED, "rounds": rounds}) as run:
        run.swarm("--patience", "900")  # on a slow machine a device may meet a server that is away for minutes on end
        run.wait_for(lambda: run.metric(TAKEN) > 0)
        journal = keeping.journal_of(run.folder, RunFolder.open(run.folder).recipe())
        draws = Draws(20)
        intake = Killer(run, "intake", draws, Acknowledges(run, journal), most_seconds=1.0)
        table = Killer(run, "table", draws, GivesRows(run.folder), most_seconds=3.0)
        with ThreadPoolExecutor(2) as threads:
            killing = [threads.submit(intake.kill, of_intake, rounds), threads.submit(table.kill, of_table, rounds)]
            for each in killing:
                each.result()
        run.finish(600.0)
        keeping.keep(journal, run.folder / "kept")
        journal.close()
    with capsys.disabled():
        sys.stdout.write(f"\n{figures('accepting again', intake)}\n{figures('rows again', table)}\n")
    kept = Kept.read(run.folder / "kept")
    as_acknowledged(run, kept, rounds)
    as_unkilled(run, kept, rounds)
    as_simulated(run, rounds)


def test_two_intakes_on_one_federation_are_as_one(ground: Ground, postgresql: Server) -> None:
    journal = {"journal.name": "postgresql", "journal.dsn": postgresql.dsn}
    with served(ground, "shared", {**SMALL, **SERVED, **journal, "rounds": 3}, "--intakes", "2") as run:
        run.swarm("--lines", str(CLIENTS))
        run.wait_for(lambda: min(run.metric(GIVEN, each) for each in (0, 1)) > 0)
        kept_by = keeping.journal_of(run.folder, RunFolder.open(run.folder).recipe())
        for name in ("intake-2", "intake", "intake-2"):
            killer = Killer(run, name, Draws(3), Acknowledges(run, kept_by), most_seconds=1.0)
            killer.kill(1, 1)
        run.finish()
        keeping.keep(kept_by, run.folder / "kept")
        kept_by.close()
    kept = Kept.read(run.folder / "kept")
    as_acknowledged(run, kept, 3)
    as_simulated(run, 3)


def as_acknowledged(run: Served, kept: Kept, rounds: int) -> None:
    """Whoever was acknowledged is among those who count, once, and was not asked again."""
    done: Counter[tuple[int, int, str]] = Counter()
    for said in run.said_by_devices():
        key = (int(said["round"]), int(said["client"]), str(said["task"])) if "task" in said else None
        assert said["event"] != "task" or key not in done, f"a device was asked again: {said}"
        if said["event"] == "done" and key is not None:
            done[key] += 1
    counted = {(round, client, task) for (round, task), sent in kept.uploads.items() for client, _ in sent}
    assert set(done) == counted
    assert set(done.values()) == {1}
    assert [len(kept.clients(round)) for round in range(1, rounds + 1)] == [COHORT] * rounds


def as_unkilled(run: Served, kept: Kept, rounds: int) -> None:
    """Every aggregate, every folding of it, and all that they came to are those of the same updates, unkilled."""
    replayed = Replayed(run.folder, kept)
    want, got = replayed.bits(), newest(run.folder)
    assert set(got) == {name for name in want if not name.startswith("clients")}
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    lines = (run.folder / "kept" / "totals").read_text().split("\n")[:-1]
    folded = [(int(round), digest) for round, digest in map(str.split, lines)]
    assert {round for round, _ in folded} == set(range(1, rounds + 1)) == set(replayed.totals)
    assert all(digest == replayed.totals[round] for round, digest in folded)
    judged = RunLog(run.folder).record().final("test")[0]["metrics"]
    assert judged == pytest.approx(kept.sums(rounds + 1), abs=1e-12)


def as_simulated(run: Served, rounds: int) -> None:
    """What devices were given to train on was right all the time: it ends as a simulation with their engine does."""
    settings = {key: value for key, value in SMALL.items() if not key.startswith("data.")}
    shards = {"data.name": "shards", "data.path": str(run.ground.folder / "shards"), "data.split": "given"}
    asked = {**settings, **shards, "rounds": rounds, "runtime.name": "mnn"}
    simulated = fedtower.run("dssm-synthetic", asked, runs=run.ground.folder / "simulated")
    got, want = newest(run.folder), newest(simulated.folder)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def figures(what: str, killer: Killer) -> str:
    """Seconds from a kill, in words."""
    seconds = np.array(killer.seconds)
    middle, most, worst = np.quantile(seconds, 0.5), np.quantile(seconds, 0.99), seconds.max()
    return f"{what}, s after a kill: median {middle:.2f}, p99 {most:.2f}, at most {worst:.2f} ({len(seconds)} times)"
