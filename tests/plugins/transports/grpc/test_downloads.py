"""Shared parameters that go down in fewer bytes: what devices make of them, and that it is what a simulation makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.recsys.runlog import RunLog
from tests.plugins.transports.grpc.served import Ground, newest, served

CLIENTS, ROUNDS = 4, 4
SMALL = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": 3,
    "rounds": ROUNDS,
    "evaluation.every": 0,
    "evaluation.negatives": 20,
    "checkpoint.every": ROUNDS,
}
DOWNLOADS: dict[str, dict[str, Any]] = {
    "selective": {"download.name": "selective", "download.share": 0.05},
    "quantize": {"download.name": "quantize", "download.bits": 8},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("federation"), "dssm-synthetic", SMALL, CLIENTS)


@pytest.mark.parametrize("name", ["selective", pytest.param("quantize", marks=pytest.mark.soak)])
def test_a_served_run_ends_with_the_bits_of_its_simulation_and_counts_its_bytes(ground: Ground, name: str) -> None:
    settings = {**SMALL, **DOWNLOADS[name]}
    with served(ground, name, {**settings, "transport.wait_for": CLIENTS}) as run:
        run.swarm()
        run.finish()
    simulated = fedtower.run(
        "dssm-synthetic",
        {
            **{key: value for key, value in settings.items() if not key.startswith("data.")},
            "data.name": "shards",
            "data.path": str(ground.folder / "shards"),
            "data.split": "given",
            "runtime.name": "mnn",
        },
        runs=ground.folder / "simulated",
    )
    got, want = newest(run.folder), newest(simulated.folder)
    assert set(got) == set(want)
    for part, value in want.items():
        np.testing.assert_array_equal(got[part], value, err_msg=part)
    rounds, ours = (RunLog(folder).record().rounds for folder in (run.folder, simulated.folder))
    assert [each["bytes_down"] for each in rounds] == [each["bytes_down"] for each in ours]
    if name == "selective":
        trained = [part.removeprefix("parameters/") for part in want if part.startswith("parameters/")]
        assert len(want["download/sizes"]) == ROUNDS - 1, "a difference for every round but the first"
        assert any(not np.array_equal(want[f"download/published/{p}"], want[f"parameters/{p}"]) for p in trained)
