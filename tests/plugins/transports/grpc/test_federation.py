"""A real federation on loopback: server, devices and their processes, with the numbers of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cli import call
from fedtower.recsys.runlog import RunLog
from tests.plugins.transports.grpc.served import Ground, Served, newest, served

CLIENTS, ROUNDS = 5, 4
SMALL = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": True,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.negatives_from": "untrained",  # what may be drawn is in the plan, and devices draw it
    "local.history_length": 20,
    "cohort.size": 3,
    "rounds": ROUNDS,
    "evaluation.every": 2,
    "evaluation.negatives": 20,
    "checkpoint.every": 2,
    "transforms.0.name": "clip",
    "transforms.0.norm": 0.5,
    # Bytes go up, and residuals stay on the devices, which are killed and go on.
    "transforms.1.name": "dgc",
    "transforms.1.density": 0.2,
    "transforms.1.rows": 0.8,
}
SERVED = {"transport.wait_for": CLIENTS, "transport.lease_seconds": 8.0, "transport.heartbeat_seconds": 2.0}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("federation"), "dssm-synthetic", SMALL, CLIENTS)


@pytest.fixture(scope="module")
def undisturbed(ground: Ground) -> Served:
    with served(ground, "undisturbed", {**SMALL, **SERVED}) as run:
        run.swarm()
        run.finish()
    return run


def test_a_deployed_run_has_the_numbers_of_a_simulated_one_and_is_not_served_again(
    ground: Ground, undisturbed: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {key: value for key, value in SMALL.items() if not key.startswith("data.")}
    simulated = fedtower.run(
        "dssm-synthetic",
        {**settings, "data.name": "shards", "data.path": str(ground.folder / "shards"), "data.split": "given"},
        runs=ground.folder / "simulated",
    )
    got, want = newest(undisturbed.folder), newest(simulated.folder)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    moved = max(float(np.abs(got[name] - read_first(simulated.folder, name)).max()) for name in ("parameters/mixture",))
    assert moved > 1e-3
    final = RunLog(undisturbed.folder).record().final("test")[0]
    assert final["label"] == "on devices, 20 negatives"
    for name, figure in final["metrics"].items():
        assert figure == pytest.approx(simulated.metrics[name], abs=1e-6), name
    assert call(["serve", str(undisturbed.folder), "--port", "0", "--keys", str(ground.folder / "keys")]) == 0
    assert "is finished: there is nothing more for devices to do" in capsys.readouterr().out


def read_first(folder: Path, name: str) -> Any:
    """A parameter after half of the rounds."""
    return read_checkpoint(folder / "checkpoints", ROUNDS // 2)[name]


def test_a_server_that_is_killed_whole_goes_on_when_it_is_served_again(ground: Ground, undisturbed: Served) -> None:
    with served(ground, "killed", {**SMALL, **SERVED, "evaluation.every": 0}) as run:
        run.swarm()
        run.wait_for(run.rounds)
        run.server.kill()  # nobody is left to end its processes
        run.server.wait()
        run.serve_again()
        run.finish()
    got, want = newest(run.folder), newest(undisturbed.folder)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_device_that_is_not_enrolled_is_told_how(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    data = ground.folder / "shards" / "client-000000.safetensors"
    asked = ["device", "--server", "127.0.0.1:1", "--data", str(data), "--folder", str(ground.folder / "new")]
    assert call([*asked, "--keys", str(ground.folder / "keys")]) == 10
    assert "enrol codes" in " ".join(capsys.readouterr().err.split())
