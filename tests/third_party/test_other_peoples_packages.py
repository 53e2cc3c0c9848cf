"""Packages of other people: built, installed by pip, discovered, in a real training; broken ones harm nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.third_party.conftest import Environment

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "2.5"
[project.entry-points."fedtower.plugins"]
{name} = "{module}"
[tool.setuptools]
py-modules = ["{module}"]
"""

# An aggregator and hooks of every family in one module. What they do is left in files, for the test to read.
GOOD = """
import json
import numpy as np
from pathlib import Path
from fedtower.core.hooks import hookimpl
from fedtower.core.updates import Updates, Rows, stack

class Largest:
    '''The update of the client with the most weight.'''

    def fold(self, blocks, state):
        cohort = stack(blocks)
        first = int(np.argmax(cohort.weights))
        with Path("folded.jsonl").open("a") as file:
            file.write(json.dumps(len(cohort)) + "\\n")
        one = cohort.slice(first, first + 1)
        rows = {t: Rows(r.offsets, r.row_ids, r.row_deltas, np.full(len(r.row_ids), one.weights[0]))
                for t, r in one.rows.items()}
        return Updates(weights=one.weights, dense=one.dense, rows=rows), state

@hookimpl
def fedtower_register(registry):
    registry.aggregator("largest", "good_plugin:Largest", summary="one decides")

def note(**values):
    with Path("seen.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\\n")

@hookimpl
def run_started(recipe, folder):
    note(hook="run_started", name=recipe.name)

@hookimpl
def update_received(round, updates):
    note(hook="update_received", round=round, clients=len(updates))

@hookimpl
def round_finished(report):
    note(hook="round_finished", round=report.round, clients=report.clients)

@hookimpl
def run_finished(summary):
    note(hook="run_finished")

@hookimpl(wrapper=True)
def client_train(plan, clients):
    result = yield
    note(hook="client_train", round=plan.round, clients=len(clients))
    return result

@hookimpl
def stop_run(report):
    return "two rounds are enough" if report.round == 2 else None
"""

BROKEN = {
    "no_import": ("import a_library_that_is_not_there\n", "No module named 'a_library_that_is_not_there'"),
    "bad_syntax": ("def f(:\n", "SyntaxError"),
    "misspelt": (
        "from fedtower.core.hooks import hookimpl\n@hookimpl\ndef round_finnished(report): ...\n",
        "did you mean 'round_finished'",
    ),
    "second_fedavg": (
        "from fedtower.core.hooks import hookimpl\n@hookimpl\ndef fedtower_register(registry):\n"
        "    registry.aggregator('fedavg', 'second_fedavg:X')\n",
        "two plugins offer the aggregator 'fedavg': aggregator-fedavg of fedtower",
    ),
    "quits": ("raise SystemExit(9)\n", "SystemExit: 9"),
    "too_new": ("fedtower_spec = 99\n", "written for plugin spec 99"),
    "fails_in_a_round": (
        "from fedtower.core.hooks import hookimpl\n@hookimpl\ndef round_finished(report): 1 / 0\n",
        "",
    ),
}


def project(folder: Path, name: str, source: str) -> Path:
    """A package of one module."""
    root = folder / name
    root.mkdir()
    module = name.replace("-", "_")
    (root / "pyproject.toml").write_text(PROJECT.format(name=name, module=module))
    (root / f"{module}.py").write_text(source)
    return root


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_wheel_takes_part_in_a_training(environment: Environment, small: list[str], tmp_path: Path) -> None:
    root = project(tmp_path, "good-plugin", GOOD)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)],
        capture_output=True,
        check=True,
    )
    environment.install(*map(str, tmp_path.glob("*.whl")))

    listed = json.loads(environment.fedtower("plugins", "list", "--json", folder=tmp_path).stdout)
    mine = next(part for part in listed["parts"] if part["name"] == "largest")
    assert (mine["distribution"], mine["version"], mine["plugin"]) == ("good-plugin", "2.5", "good-plugin")

    work = tmp_path / "work"
    work.mkdir()
    done = environment.fedtower(
        "run", "dssm-synthetic", *small, "-o", "rounds=5", "-o", "aggregator.name=largest", folder=work
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line) for line in (work / "folded.jsonl").read_text().splitlines()] == [6, 6]
    seen = lines(work / "seen.jsonl")
    hooks = [str(line["hook"]) for line in seen]
    assert hooks[0] == "run_started"
    assert hooks[-1] == "run_finished"
    finished = [line for line in seen if line["hook"] == "round_finished"]
    # Its stop_run ended five rounds after two.
    assert finished == [{"hook": "round_finished", "round": round, "clients": 6} for round in (1, 2)]
    for hook in ("update_received", "client_train"):
        assert sum(int(str(line["clients"])) for line in seen if line["hook"] == hook) == 12
    (folder,) = (work / "runs").iterdir()
    plugins = json.loads((folder / "environment.json").read_text())["plugins"]
    assert {"good-plugin": "active"}.items() <= {plugin["name"]: plugin["status"] for plugin in plugins}.items()

    blocked = environment.fedtower("--plugins-block", "good-plugin", "plugins", "list", "--json", folder=work)
    assert "largest" not in [part["name"] for part in json.loads(blocked.stdout)["parts"]]


def test_broken_packages_are_reported_and_harm_nobody(
    environment: Environment, small: list[str], tmp_path: Path
) -> None:
    for name, (source, _) in BROKEN.items():
        project(tmp_path, name, source)
    environment.install(*(str(tmp_path / name) for name in BROKEN))

    listed = json.loads(environment.fedtower("plugins", "list", "--json", folder=tmp_path).stdout)
    found = {plugin["name"]: plugin for plugin in listed["plugins"]}
    for name, (_, reason) in BROKEN.items():
        assert found[name]["status"] == ("failed" if reason else "active"), name
        assert reason in found[name]["reason"]
        assert found[name]["distribution"] == name.replace("_", "-") or found[name]["distribution"] == name
    shown = environment.fedtower("plugins", "list", folder=tmp_path).stdout
    assert "no_import of no_import 2.5 is failed: ModuleNotFoundError" in shown.replace(
        "no-import 2.5", "no_import 2.5"
    )

    done = environment.fedtower("run", "dssm-synthetic", *small, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert said.count("'fails_in_a_round (fails") == 1, "a failing observer is reported, and once"
    assert "ZeroDivisionError" in said

    done = environment.fedtower("run", "dssm-synthetic", "-o", "aggregator.name=no_import", folder=tmp_path)
    assert done.returncode == 2
    assert "is failed: ModuleNotFoundError" in " ".join(done.stderr.split())
    for words in (["--help"], ["recipes"], ["plugins", "show", "fedavg"]):
        assert environment.fedtower(*words, folder=tmp_path).returncode == 0
