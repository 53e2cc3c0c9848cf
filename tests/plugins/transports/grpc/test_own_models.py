"""Models of each client's own over devices: the bits and the figures of a simulation, and nothing of theirs that leaves
them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.errors import RecipeError
from fedtower.plugins.datasets.mnist.example import write as write_digits
from fedtower.plugins.transports.grpc.codec import decode_submission
from fedtower.recsys.run import Run, load
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.testing.states import saved
from tests.plugins.transports.grpc import keeping
from tests.plugins.transports.grpc.replaying import MOST_BYTES, Kept
from tests.plugins.transports.grpc.served import Ground, Served, newest, served

CLIENTS, ROUNDS = 4, 2
HISTORIES = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": False,
    "local.batch_size": 8,
    "local.negatives": 20,
    "local.history_length": 20,
    "local.row_lr": 2.0,
    "local.lr": 0.2,
    "transforms": [],
    "cohort.size": 3,
    "rounds": ROUNDS,
    "evaluation.every": 1,
    "evaluation.negatives": 50,
}
SERVED = {"transport.wait_for": CLIENTS, "transport.lease_seconds": 8.0, "transport.heartbeat_seconds": 2.0}
FEDREP = {"local.on_device": ["second"], "local.steps": 3, "local.head_first": 1, "evaluation.personal": True}
DITTO = {"local.ditto": 0.5, "local.steps": 2, "evaluation.personal": True}


@dataclass(frozen=True)
class Both:
    """A run over devices, and the simulation of its clients in the devices' engine."""

    devices: Served
    simulated: Run
    kept: Mapping[int, Mapping[str, Any]]
    """What each device had in its folder when the run was over, by name."""

    @classmethod
    def of(cls, ground: Ground, name: str, settings: Mapping[str, Any]) -> Both:
        shutil.copyfile(str(keeping.__file__), ground.folder / "fedtower_plugins.py")
        with served(ground, name, {**settings, **SERVED}) as run:
            run.swarm()
            run.finish()
        kept = {client: _kept(shard) for client, shard in enumerate(ground.shards)}
        given = {key: value for key, value in settings.items() if not key.startswith("data.")}
        shards = {"data.name": "shards", "data.path": str(ground.folder / "shards"), "runtime.name": "mnn"}
        if "mnist" not in ground.recipe:
            shards["data.split"] = "given"
        return cls(run, fedtower.run(ground.recipe, {**given, **shards}, runs=ground.folder / f"{name}-sim"), kept)

    def assert_same(self) -> None:
        """Their states to the bit, their clients' own among them, and their figures."""
        got, want = newest(self.devices.folder), newest(self.simulated.folder)
        assert set(got) == set(want)
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        self._assert_same_kept()
        for role in ("validation", "test"):
            ours, theirs = (_figures(folder, role) for folder in (self.devices.folder, self.simulated.folder))
            assert len(ours) == len(theirs) == (ROUNDS if role == "validation" else 1)
            for mine, other in zip(ours, theirs, strict=True):
                assert len(mine) > 1
                for name, figure in mine.items():
                    assert figure == pytest.approx(other[name], abs=1e-6), (role, name)

    def _assert_same_kept(self) -> None:
        clients = saved(self.simulated.folder / "checkpoints", ROUNDS)
        names = {name.split("/")[1].rpartition(".")[0] for name in clients if name.startswith("clients/")}
        took_part = [client for client, held in self.kept.items() if held]
        assert len(took_part) >= 3
        for name in names:
            assert clients[f"clients/{name}.clients"].tolist() == took_part
            for client, value in zip(took_part, clients[f"clients/{name}.values"], strict=True):
                np.testing.assert_array_equal(self.kept[client][name], value, err_msg=f"{name} of client {client}")
        assert all(set(self.kept[client]) == names for client in took_part)

    def assert_nothing_left(self, names: set[str]) -> None:
        """Of what is the devices' own, no upload has a part, and no file of the server a bit."""
        assert {name for held in self.kept.values() for name in held} == names
        uploads = Kept.read(self.devices.folder / "kept").uploads
        assert {task for _, task in uploads} == {"train", "evaluate"}
        for (_, task), each in uploads.items():
            for client, payload in each:
                updates = decode_submission(payload, client, most_bytes=MOST_BYTES).updates
                assert not names & set(updates.dense)
                assert bool(updates.dense) == (task == "train"), "who judges sends sums alone"
        files = [path.read_bytes() for path in self.devices.folder.rglob("*") if path.is_file()]
        arrays = [value.tobytes() for value in newest(self.devices.folder).values()]
        assert any(arrays[0] in file for file in files), "what is there is found"
        for name, value in ((name, value) for held in self.kept.values() for name, value in held.items()):
            # A number or two may be anywhere by chance.
            assert value.nbytes < 16 or not any(value.tobytes() in file for file in files), name


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("own"), "dssm-synthetic", HISTORIES, CLIENTS)


@pytest.mark.soak
def test_devices_with_heads_of_their_own_tune_and_judge_as_their_simulation_does(ground: Ground) -> None:
    both = Both.of(ground, "fedrep", {**HISTORIES, **FEDREP})
    both.assert_same()
    both.assert_nothing_left({"second.weight", "second.bias"})
    assert _label(both.devices.folder) == "on devices, 50 negatives, models fine-tuned"
    with pytest.raises(RecipeError, match=r"second\.weight, second\.bias of this model lives on the devices"):
        load(both.devices.folder).evaluate()


@pytest.mark.soak
def test_devices_with_copies_of_their_own_judge_those_as_their_simulation_does(ground: Ground) -> None:
    both = Both.of(ground, "ditto", {**HISTORIES, **DITTO})
    both.assert_same()
    shared = ("first.weight", "first.bias", "second.weight", "second.bias", "mixture")
    both.assert_nothing_left({f"personal.{name}" for name in shared})
    assert _label(both.devices.folder) == "on devices, 50 negatives, each client's own model"


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{"local.on_device": ["second"]}, {"local.ditto": 0.5}])
def test_devices_that_judge_what_they_are_sent_do_as_their_simulation_does(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    ground = Ground.make(tmp_path, "dssm-synthetic", HISTORIES, CLIENTS)
    both = Both.of(ground, "sent", {**HISTORIES, "local.steps": 2, **settings})
    both.assert_same()
    assert _label(both.devices.folder) == "on devices, 50 negatives"


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{"local.on_device": ["out"]}, {"local.ditto": 0.1, "evaluation.personal": True}])
def test_devices_tell_the_classes_that_they_know_as_their_simulation_does(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    digits = {"data.path": write_digits(tmp_path)["path"], "data.clients": CLIENTS, "data.validation_images": 30}
    small = {"data.partition": "shards", "model.hidden": [8], "local.batch_size": 12, "local.lr": 0.2}
    given = {**digits, **small, "cohort.size": 3, "rounds": ROUNDS, "evaluation.every": 1, **settings}
    ground = Ground.make(tmp_path, "fedavg-mnist-mlp", given, CLIENTS)
    both = Both.of(ground, "digits", given)
    both.assert_same()
    assert _label(both.devices.folder) == "on devices, held-out examples of each client's classes"


def _kept(shard: Path) -> dict[str, Any]:
    paths = (shard.with_suffix(".device") / "own").glob("*/*.npy")
    return {path.stem: np.load(path) for path in paths}


def _figures(folder: Path, role: str) -> list[dict[str, float]]:
    """What a run said of its model in this role, each time it did, by its own protocol first."""
    events = [each for each in RunLog(folder).events() if each["event"] == "evaluation" and each["role"] == role]
    return [dict(each["metrics"]) for each in (events if role == "validation" else events[:1])]


def _label(folder: Path) -> str:
    return str(RunLog(folder).record().final("test")[0]["label"])
