"""RunFolder: names that nobody else has, a recipe that comes back, files that are whole."""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtower.core.errors import CheckpointError, RecipeError, StorageError
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.recsys.run import Run
from fedtower.recsys.run_folder import RunFolder, environment
from fedtower.recsys.training import Setting


@pytest.fixture
def recipe(setting_of: Callable[..., Setting]) -> Recipe:
    return setting_of().recipe


def test_runs_of_a_recipe_are_numbered(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    runs = tmp_path / "a" / "b"
    names = [RunFolder.create(recipe, registry, runs).path.name for _ in range(2)]
    (runs / "dssm-synthetic-7").mkdir()
    for other in ("dssm-synthetic-x", "dssm-synthetic", "other-99", "dssm-synthetic-other-12"):
        (runs / other).mkdir()
    names.append(RunFolder.create(recipe, registry, runs).path.name)
    assert names == ["dssm-synthetic-1", "dssm-synthetic-2", "dssm-synthetic-8"]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../up", "a/b", "/tmp/x", "-x", "a\0b"])
def test_a_name_that_is_no_folders_is_refused(tmp_path: Path, recipe: Recipe, registry: Registry, name: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be the name of the run's folder in .*; expected a word without"):
        RunFolder.create(replace(recipe, name=name), registry, tmp_path / "runs")
    assert not list(tmp_path.iterdir())


def test_processes_that_begin_at_once_get_folders_of_their_own(tmp_path: Path, recipe: Recipe) -> None:
    # A fork has the recipe and needs no registry: the folder's name is all that is looked at.
    context = multiprocessing.get_context("fork")
    start = context.Barrier(6)
    makers = [context.Process(target=_make, args=(recipe, tmp_path, place, start)) for place in range(6)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert sorted(path.name for path in tmp_path.glob("dssm-*")) == [f"dssm-synthetic-{n}" for n in range(1, 7)]
    told = [(tmp_path / f"told-{place}").read_text("utf-8") for place in range(6)]
    assert sorted(told) == [f"dssm-synthetic-{n}" for n in range(1, 7)]


def _make(recipe: Recipe, runs: Path, place: int, start: Any) -> None:
    start.wait()
    made = RunFolder.create(recipe, Registry(), runs)
    (runs / f"told-{place}").write_text(made.path.name, "utf-8")


def test_the_resolved_recipe_comes_back_equal(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    assert RunFolder.open(RunFolder.create(recipe, registry, tmp_path).path).recipe() == recipe


def test_a_finished_run_holds_what_a_reader_looks_for(federated_run: Run) -> None:
    there = {path.name for path in federated_run.folder.iterdir()}
    assert {"recipe.toml", "environment.json", "log.jsonl", "checkpoints", "summary.json"} <= there
    assert not list(federated_run.folder.rglob("*unfinished*"))
    told = json.loads((federated_run.folder / "environment.json").read_text("utf-8"))
    assert {"fedtower", "numpy", "torch", "torchrec", "python", "platform", "cores", "seed", "plugins"} <= set(told)
    assert told["seed"] == 1
    assert {"model-dssm", "dataset-synthetic"} <= {plugin["name"] for plugin in told["plugins"]}


def test_the_environment_names_no_machine_and_no_person(recipe: Recipe, registry: Registry) -> None:
    told = json.dumps(environment(recipe, registry))
    assert str(Path.home()) not in told
    assert str(Path.cwd()) not in told


@pytest.mark.parametrize("place", ["nothing-here", "dssm-synthetic-1/log.jsonl", "."])
def test_what_is_no_run_is_refused_with_the_runs_beside_it(
    tmp_path: Path, recipe: Recipe, registry: Registry, place: str
) -> None:
    RunFolder.create(recipe, registry, tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a run folder: it holds no recipe\.toml") as refused:
        RunFolder.open(tmp_path / place)
    if place == "nothing-here":
        assert "Beside it there are dssm-synthetic-1." in str(refused.value)


def test_a_run_that_left_nothing_says_how_to_begin(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    folder = RunFolder.create(recipe, registry, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet.*fedtower run .*/recipe\.toml"):
        folder.latest_round()
    assert folder.way_on() == f"{folder.path} has no checkpoint yet: start again"


@pytest.mark.parametrize("content", [b"name = \n", b"\xff\xfe", None])
def test_a_recipe_that_cannot_be_read_is_named(
    tmp_path: Path, recipe: Recipe, registry: Registry, content: bytes | None
) -> None:
    folder = RunFolder.create(recipe, registry, tmp_path)
    if content is None:
        (folder.path / "recipe.toml").unlink()
    else:
        (folder.path / "recipe.toml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the run's recipe .*recipe\.toml cannot be read"):
        folder.recipe()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    folder = RunFolder.create(recipe, registry, tmp_path)
    folder.write("summary.json", {"rounds": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may grow beyond 100 bytes
        with pytest.raises(OSError, match="File too large"):
            folder.write("summary.json", {"rounds": "1" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((folder.path / "summary.json").read_text("utf-8")) == {"rounds": 1}


def test_a_place_below_a_file_is_refused(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(StorageError, match=r"the folder .*file/runs cannot be made: a part of that path is a file"):
        RunFolder.create(recipe, registry, tmp_path / "file" / "runs")


def test_a_run_is_held_by_one_at_a_time(tmp_path: Path, recipe: Recipe, registry: Registry) -> None:
    folder = RunFolder.create(recipe, registry, tmp_path)
    with (
        folder.locked(),
        pytest.raises(CheckpointError, match="is being trained by another process; wait for it, or end it"),
        folder.locked(),
    ):
        pytest.fail("two hold it at once")
    with folder.locked():
        pass


def test_what_goes_wrong_inside_a_run_is_not_blamed_on_its_folder(
    tmp_path: Path, recipe: Recipe, registry: Registry
) -> None:
    folder = RunFolder.create(recipe, registry, tmp_path)
    with pytest.raises(PermissionError), folder.locked():
        raise PermissionError(13, "Permission denied", "ratings.csv")
