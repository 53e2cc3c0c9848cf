"""Twenty devices with a user of MovieLens each, every one a process of its own, by the commands of the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtower.core.cli import call
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.run_parity import compare
from fedtower.recsys.runlog import RunLog
from tests.plugins.transports.grpc.served import Ground, as_options, served

ROUNDS = 20
SETTINGS = {"cohort.size": 10, "rounds": ROUNDS}


@pytest.mark.soak
@pytest.mark.usefixtures("shared_data")
def test_twenty_devices_come_to_what_a_simulation_of_them_does(run_root: Path) -> None:
    ground = Ground.make(run_root, "dssm-ml-100k", {}, 20)
    with served(ground, "deployed", {**SETTINGS, "transport.wait_for": 20}) as run:
        run.apart()
        run.finish(900.0)
    done = [said for said in run.said_by_devices() if said["event"] == "done"]
    assert sum(said["task"] == "train" for said in done) == ROUNDS * 10
    assert sum(said["task"] == "evaluate" for said in done) == 20
    shards = {"data.name": "shards", "data.path": "shards", "runtime.name": "mnn"}
    assert call(["run", "dssm-ml-100k", *as_options({**SETTINGS, **shards})]) == 0
    simulated = next(Path("runs").iterdir())
    assert call(["parity", str(run.folder), str(simulated)]) == 0
    round, lines = compare(run.folder, simulated)
    assert round == ROUNDS == RunFolder.open(run.folder).latest_round()
    assert {line.what for line in lines} > {"parameters", "optimizer", "tables", "test HR@10", "test NDCG@10"}
    assert {line.verdict for line in lines if not line.what.startswith("test")} == {"the same bits"}
    assert RunLog(run.folder).record().final("test")[0]["users"] == 20
