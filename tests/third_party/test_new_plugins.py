"""What ``fedtower plugins new`` writes installs, keeps its promises, passes its own tests, and runs, for every kind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedtower.core.plugin_commands.scaffold import begin
from fedtower.core.registry import discover

if TYPE_CHECKING:
    from tests.third_party.conftest import Environment

KINDS = [*(kind.name for kind in discover().kinds()), "observer"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def packages(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, make_environment: Callable[[Path], Environment]
) -> tuple[Environment, Path]:
    """A package of every kind, written and installed once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "new-plugins"
    ready = folder / "ready"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ready.exists(), "another worker could not install the packages"
        return make_environment(folder / "environment"), folder
    registry = discover()
    environment = make_environment(folder / "environment")
    for kind in KINDS:
        begin(registry, kind, f"my_{kind}", folder)
    environment.install(*(word for kind in KINDS for word in ("-e", str(folder / f"my_{kind}"))))
    ready.touch()
    return environment, folder


def test_there_are_as_many_kinds_as_expected() -> None:
    assert len(KINDS) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_check_as_written(kind: str, packages: tuple[Environment, Path]) -> None:
    environment, folder = packages
    done = environment.fedtower("plugins", "check", f"my_{kind}", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    kept, _, of = done.stdout.splitlines()[-1].partition(": ")[2].partition(" of ")
    assert int(kept) == int(of.split()[0]) >= 4


def test_their_own_tests_pass(packages: tuple[Environment, Path]) -> None:
    environment, folder = packages
    tests = [f"my_{kind}/tests" for kind in KINDS]
    done = environment.pytest("-W", "error", "--import-mode=importlib", *tests, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_they_are_written_the_way_we_write(packages: tuple[Environment, Path]) -> None:
    _, folder = packages
    sources = [str(folder / f"my_{kind}") for kind in KINDS]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["format", "--check", *config], ["check", "--ignore", "D1,D301,I001", *config]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *sources], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_a_run_uses_one_of_every_kind(packages: tuple[Environment, Path], tmp_path: Path) -> None:
    environment, _ = packages
    done = environment.fedtower(
        *("run", "my_recipe", "-o", "rounds=2", "-o", "data.name=my_dataset", "-o", "data.users=60"),
        *("-o", "model.name=my_model", "-o", "runtime.name=my_runtime", "-o", "transforms.0.name=my_transform"),
        *("-o", "cohort.name=my_sampler", "-o", "cohort.size=6", "-o", "aggregator.name=my_aggregator"),
        *("-o", "server.optimizer=my_server_optimizer", "-o", "transport.name=my_transport"),
        *("-o", "download.name=my_download"),
        *("-o", "deadline.name=my_deadline", "-o", "attack.name=my_attack", "-o", "attack.share=0.2"),
        *("-o", "trackers.0.name=my_tracker", "-o", "index.name=my_index"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert len((run / "rounds.csv").read_text().splitlines()) == 3
    assert json.loads((run / "summary.json").read_text())["index"]["name"] == "my_index"
    assert (run / "my_observer.txt").read_text().startswith("2 rounds, ")
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"round",' in line]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    done = environment.fedtower("my_command", str(run), folder=tmp_path)
    assert done.stdout.count("round") == 2


@pytest.mark.parametrize("override", ["aggregator.name=my_aggregator", "model.name=my_model"])
def test_each_works_in_the_recipe_that_its_readme_names(
    override: str, packages: tuple[Environment, Path], small: list[str], tmp_path: Path
) -> None:
    environment, folder = packages
    kind = override.partition(".")[0]
    readme = (folder / f"my_{kind}" / "README.md").read_text()
    assert f"fedtower run dssm-synthetic -o {override}" in readme
    done = environment.fedtower("run", "dssm-synthetic", *small, "-o", override, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package = begin(discover(), "aggregator", "my-trimmed-mean", Path())
    assert package.next_steps == (
        "pip install -e my-trimmed-mean",
        "fedtower plugins check my-trimmed-mean",
        "fedtower run dssm-synthetic -o aggregator.name=my-trimmed-mean",
    )
    written = sorted(str(path.relative_to(package.root)) for path in package.root.rglob("*") if path.is_file())
    assert written == list(package.files)
    assert "src/my_trimmed_mean/__init__.py" in written
    assert "class MyTrimmedMean" in (package.root / "src/my_trimmed_mean/__init__.py").read_text()
