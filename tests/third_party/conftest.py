"""A fresh environment that other people's packages are really installed into, by pip."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees what is installed here, and has packages of its own beside it."""

    folder: Path

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    def install(self, *what: str) -> None:
        """``pip install`` into it, from folders and wheels only: nothing is fetched."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "--quiet"]
        self._run([*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", *what], self.folder, check=True)

    def fedtower(self, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """A command line of fedtower in it."""
        return self._run([self.python, "-m", "fedtower", *words], folder)

    def pytest(self, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Other people's own tests."""
        return self._run([self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words], folder)

    def _run(self, command: list[str], folder: Path, check: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


def _make(folder: Path) -> Environment:
    venv.create(folder, symlinks=True)
    own = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    here = sysconfig.get_path("purelib")
    # addsitedir also reads the .pth files of what is installed here in development mode.
    (own / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return Environment(folder)


@pytest.fixture(scope="session")
def make_environment() -> Callable[[Path], Environment]:
    """Makes a new environment in a folder, or finds the one that is there."""
    return lambda folder: Environment(folder) if folder.is_dir() else _make(folder)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fresh environment."""
    return _make(tmp_path / "environment")


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options that make ``dssm-synthetic`` a run of seconds, most of which are imports."""
    return [
        *("-o", "rounds=2", "-o", "data.users=60", "-o", "data.items=400", "-o", "data.mean_events=40"),
        *("-o", "cohort.size=6", "-o", "local.negatives=20"),
    ]
