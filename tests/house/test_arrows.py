"""The rule of who may import whom: each contract is broken here on purpose, so that none of them is asleep."""

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]

BREACHES = {
    "core/updates.py": ("import fedtower.recsys.metrics", "plugins -> recsys -> core"),
    "recsys/metrics.py": ("import fedtower.plugins.samplers.uniform", "plugins -> recsys -> core"),
    "protos/__init__.py": ("import fedtower.core.updates", "plugins -> recsys -> core"),
    "plugins/samplers/uniform.py": ("import fedtower.plugins.samplers.poisson", "Plugins are strangers"),
    "plugins/models/dssm/model.py": ("import fedtower.plugins.runtimes.torch_loop.runtime", "Plugins are strangers"),
    "core/draws.py": ("import fedtower.core.round", "Inside core"),
    "core/aggregation.py": ("import fedtower.core.registry", "Inside core"),
    "core/unplaced.py": ("", "Inside core"),
    "core/rows.py": ("import torch", "The device path"),
    "core/registry.py": ("import click", "The device path"),
    "recsys/history.py": ("import fedtower.recsys.tables", "The device path"),
    "recsys/models.py": ("import torchrec", "torchrec and its kernels"),
    "recsys/batches.py": ("import pandas", "pandas and pyarrow"),
    "plugins/aggregators/fedavg.py": ("import faiss", "Every other heavy library"),
    "plugins/transports/grpc/codec.py": ("import torch", "The device path"),
    "plugins/transports/in_process.py": ("import grpc", "Every other heavy library"),
    "plugins/runtimes/vectorized/crew.py": ("import ray", "Every other heavy library"),
}

# What the command line of core, and the promises, need besides what core needs.
COMMAND_LINE = {"click", "rich", "tomli_w"}
PROMISES = {"click", "hypothesis", "pytest", "tomli_w"}


def check_arrows(tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "300"}
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the rooms, to be broken."""
    for room in ("core", "fedtower", "plugins", "protos", "recsys"):
        shutil.copytree(ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_the_tree_keeps_the_rule(tree: Path) -> None:
    checked = check_arrows(tree)
    assert checked.returncode == 0, checked.stdout
    assert "7 kept, 0 broken" in checked.stdout


@pytest.mark.parametrize("file", BREACHES)
def test_a_breach_is_seen(file: str, tree: Path) -> None:
    line, contract = BREACHES[file]
    with (tree / file).open("a") as module:
        module.write(f"\n{line}\n")
    checked = check_arrows(tree)
    broken = [said for said in checked.stdout.splitlines() if said.endswith("BROKEN") or " BROKEN " in said]
    assert checked.returncode == 1
    assert any(said.startswith(contract) for said in broken), checked.stdout


def top_of_core() -> list[str]:
    """The modules above the round: the command line and the promises."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    layers = parser["importlinter:contract:core"]["layers"].strip().splitlines()
    return [f"fedtower.core.{name.strip()}" for name in layers[0].split(":")]


def test_core_needs_numpy_and_pluggy_and_no_more() -> None:
    graph = grimp.build_graph("fedtower", include_external_packages=True, cache_dir=None)
    modules = sorted(name for name in graph.modules if name.startswith("fedtower.core"))
    assert len(modules) > 20
    for module in modules:
        allowed = {"fedtower", "numpy", "pluggy"}
        if module.startswith("fedtower.core.testing"):
            allowed |= PROMISES
        elif module.startswith(tuple(top_of_core())):
            allowed |= COMMAND_LINE
        imported = {name.partition(".")[0] for name in graph.find_modules_directly_imported_by(module)}
        assert imported - sys.stdlib_module_names <= allowed, module
