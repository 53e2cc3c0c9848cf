"""RunFolder: one run on disk; its recipe, its surroundings, its checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from fedtower.core.checkpoint import list_checkpoints, storage_errors
from fedtower.core.discovery import LOCAL_FILE
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.folders import make_folder
from fedtower.core.recipe import Recipe, parse_recipe
from fedtower.core.registry import Registry
from fedtower.recsys.runlog import RunLog

_LIBRARIES = ("fedtower", "numpy", "pandas", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu")


FEDERATION = "federation.json"


@dataclass(frozen=True)
class Federation:
    """What devices know a deployed run by: its federation's name, its own, and the folder of keys that they pin."""

    name: str
    run: str
    keys: Path

    @property
    def signing_key(self) -> Path:
        """The private key that plans are signed with."""
        return self.keys / "signing.pem"

    @property
    def credentials(self) -> Path:
        """Who may take part."""
        return self.keys / "credentials.sqlite"


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME-N``: recipe.toml, environment.json, log.jsonl, checkpoints/, fedtower_plugins.py if the recipe had
    one beside it, and after the run index/, summary.json, report.html.
    """

    path: Path

    @classmethod
    def create(cls, recipe: Recipe, registry: Registry, runs: Path) -> RunFolder:
        """A new folder under ``runs``, with the resolved recipe and what it will run on.

        Raises:
            StorageError: the place cannot be written.
            RecipeError: the recipe's name cannot be a folder's.
        """
        if not recipe.name.strip() or recipe.name.startswith((".", "-")) or set(recipe.name) & set("/\0"):
            raise RecipeError(
                f"name = {recipe.name!r} cannot be the name of the run's folder in {runs}; expected a word without "
                f"slashes that begins with a letter or a digit, such as my-run"
            )
        with storage_errors(runs):
            make_folder(runs)
            number = 1 + max((_number(path, recipe.name) for path in runs.iterdir()), default=0)
            while True:
                path = runs / f"{recipe.name}-{number}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:  # another run was quicker
                    number += 1
            (path / "recipe.toml").write_text(tomli_w.dumps(recipe.to_dict()), encoding="utf-8")
            if registry.folder is not None:  # the run's own copy is what a resume imports
                shutil.copyfile(registry.folder / LOCAL_FILE, path / LOCAL_FILE)
            (path / "environment.json").write_text(
                json.dumps(environment(recipe, registry), indent=1) + "\n", encoding="utf-8"
            )
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises CheckpointError when it is none."""
        if not (path / "recipe.toml").is_file():
            there = (
                sorted(found.parent.name for found in path.parent.glob("*/recipe.toml")) if path.parent.is_dir() else []
            )
            raise CheckpointError(
                f"{path} is not a run folder: it holds no recipe.toml. "
                + (f"Beside it there are {', '.join(there[-5:])}." if there else "`fedtower run NAME` makes one.")
            )
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return bool(list_checkpoints(self.checkpoints))

    def is_finished(self) -> bool:
        """Whether the run came to its end, and its summary was written."""
        return (self.path / "summary.json").is_file() and RunLog(self.path).record().finished is not None

    def federation(self) -> Federation:
        """The federation that this run is served as.

        Raises:
            CheckpointError: it never was.
        """
        try:
            values = json.loads((self.path / FEDERATION).read_text(encoding="utf-8"))
            return Federation(str(values["name"]), str(values["run"]), Path(values["keys"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} was not served to devices: there is no {FEDERATION} that can be read ({error}); "
                f"`fedtower serve RECIPE` makes such a run"
            ) from error

    @property
    def index(self) -> Path:
        """Where the index of its items is, named for the round of its model."""
        return self.path / "index"

    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        try:
            values = tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the run's recipe {self.path / 'recipe.toml'} cannot be read: {error}") from error
        return parse_recipe(values)

    def latest_round(self) -> int:
        """The round of the newest checkpoint. Raises CheckpointError when there is none."""
        rounds = list_checkpoints(self.checkpoints)
        if not rounds:
            raise CheckpointError(
                f"{self.path} has no checkpoint yet: the run ended before its first one. Start it again: fedtower run "
                f"{self.path / 'recipe.toml'}"
            )
        return rounds[-1]

    def way_on(self) -> str:
        """How to go on with a run that was interrupted."""
        rounds = list_checkpoints(self.checkpoints)
        if not rounds:
            return f"{self.path} has no checkpoint yet: start again"
        return f"`fedtower resume {self.path}` goes on from round {rounds[-1]}"

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        with storage_errors(self.path):
            unfinished = self.path / f".{name}"
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.path / name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run, so that nobody else trains it at the same time; a killed process lets go by itself."""
        with self._held(".lock", "trained"):
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the run, so that nobody else serves it at the same time."""
        with self._held(".serving", "served"):
            yield

    @contextmanager
    def _held(self, name: str, done: str) -> Iterator[None]:
        with storage_errors(self.path):
            handle = (self.path / name).open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{self.path} is being {done} by another process; wait for it, or end it"
                ) from error
            yield


def environment(recipe: Recipe, registry: Registry) -> dict[str, Any]:
    """Versions, plugins and seed: what a reader needs to run it again."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        **versions,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cores": os.cpu_count(),
        "seed": recipe.seed,
        "plugins": [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": plugin.status,
            }
            for plugin in registry.plugins()
        ],
    }


def _number(path: Path, name: str) -> int:
    prefix, _, number = path.name.rpartition("-")
    return int(number) if prefix == name and number.isdigit() else 0
