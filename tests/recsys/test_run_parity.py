"""Two runs beside each other: the same bits, near, or not; and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import read_checkpoint, write_checkpoint
from fedtower.core.cli import call
from fedtower.core.errors import CheckpointError
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.run_parity import compare

SMALL = {
    "data.users": 60,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "local.negatives": 20,
    "local.history_length": 10,
    "cohort.size": 5,
    "rounds": 2,
    "evaluation.every": 0,
    "evaluation.negatives": 20,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedtower.run("dssm-synthetic", SMALL, runs=tmp_path_factory.mktemp("runs")).folder


def beside(run: Path, place: Path, name: str, by: float) -> Path:
    """The same run with one number of its checkpoint moved."""
    arrays = read_checkpoint(run / "checkpoints", 2)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] += by
    for file in ("recipe.toml", "log.jsonl"):
        (place / file).write_bytes((run / file).read_bytes())
    write_checkpoint(place / "checkpoints", 2, arrays, 2, {})
    return place


def test_a_run_has_its_own_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    round, lines = compare(run, run)
    assert round == 2
    assert {line.what for line in lines} >= {"parameters", "optimizer", "tables", "test HR@10"}
    assert {line.verdict for line in lines} == {"the same bits"}
    assert call(["parity", str(run), str(run), "--json"]) == 0
    assert {line["distance"] for line in json.loads(capsys.readouterr().out)} == {0.0}


@pytest.mark.parametrize(("name", "group"), [("parameters/mixture", "parameters"), ("tables/table/item", "tables")])
def test_one_number_that_is_off_is_found(run: Path, tmp_path: Path, name: str, group: str) -> None:
    for by, verdict in ((5e-5, "equal"), (3e-4, "beyond its tolerance"), (np.nan, "beyond its tolerance")):
        (place := tmp_path / str(by)).mkdir()
        _, lines = compare(beside(run, place, name, by), run)
        assert {line.what: line.verdict for line in lines if line.distance} == {group: verdict}


def test_runs_that_are_apart_end_with_an_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["parity", str(beside(run, tmp_path, "parameters/mixture", 1.0)), str(run)]) == 1
    said = capsys.readouterr()
    assert "beyond its tolerance" in said.out
    assert "runtime.name=mnn" in said.err
    assert call(["parity", str(run), str(run), "-o", "seed=2"]) == 2


def test_what_cannot_be_compared_is_said(run: Path, tmp_path: Path) -> None:
    arrays = read_checkpoint(run / "checkpoints", 2)
    (tmp_path / "recipe.toml").write_bytes((run / "recipe.toml").read_bytes())
    write_checkpoint(tmp_path / "checkpoints", 3, arrays, 2, {})
    with pytest.raises(CheckpointError, match="no checkpoint of the same round"):
        compare(run, tmp_path)
    arrays["parameters/mixture"] = np.zeros(7, np.float32)
    write_checkpoint(tmp_path / "checkpoints", 2, arrays, 2, {})
    with pytest.raises(CheckpointError, match="different parameters"):
        compare(run, tmp_path)


def test_a_served_run_goes_on_from_its_newest_checkpoint_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = discover()
    recipe = load_recipe("dssm-synthetic", ["mode=deployed", "transport.name=grpc"], registry)
    folder = RunFolder.create(recipe, registry, tmp_path)
    (folder.path / "log.jsonl").write_text("")
    for round in (4, 8):
        write_checkpoint(folder.checkpoints, round, {"round": np.array(round)}, 2, {})
    assert call(["resume", str(folder.path), "--from", "4"]) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "goes on from round 8" in said
    assert f"fedtower serve {folder.path}/recipe.toml" in said
