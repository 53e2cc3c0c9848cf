"""Verdicts: promises run by pytest in a process of their own, so that a part that crashes is one that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from fedtower.core.errors import MissingDependency, PluginError
from fedtower.core.testing.promises import NOT_MADE

_PROMISES = """
from fedtower.core.garbage import begin_program
from fedtower.core.testing.offered import promised, promised_hooks

begin_program()
TestPromises = {}
"""


@dataclass(frozen=True)
class Verdict:
    """One promise, and whether it was kept; ``message`` says why not."""

    promise: str
    kept: bool
    message: str = ""


@dataclass(frozen=True)
class Claim:
    """What is to be proven: an expression that gives a promise class, and a title for it."""

    title: str
    expression: str


def part_claim(kind: str, name: str) -> Claim:
    """That an installed part keeps the promises of its kind."""
    return Claim(f"{kind} {name}", f"promised({kind!r}, {name!r})")


def hooks_claim(plugin: str, distribution: str) -> Claim:
    """That the hooks of an installed plugin keep theirs."""
    return Claim(f"hooks of {plugin}", f"promised_hooks({plugin!r}, {distribution!r})")


def judge(claim: Claim, blocked: Iterable[str] = ()) -> list[Verdict]:
    """Run the promises; ``blocked`` plugins are kept out there too.

    Raises:
        MissingDependency: pytest is not installed.
        PluginError: the promises could not be run at all.
    """
    if find_spec("pytest") is None:
        raise MissingDependency(
            "checking a plugin needs pytest, which is not installed; `pip install 'fedtower[test]'` brings it"
        )
    with TemporaryDirectory(prefix="fedtower-check-") as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_promises.py").write_text(_PROMISES.format(claim.expression))
        result = folder / "result.xml"
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pytest",
                    str(folder),
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "--import-mode=importlib",
                ),
                *("-c", str(folder / "pytest.ini"), "--rootdir", str(folder), f"--junit-xml={result}"),
            ],
            env={
                **{key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "FEDTOWER_PLUGINS_BLOCK": ",".join(blocked),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        verdicts = _read(result) if result.is_file() else []
    if not verdicts:
        raise PluginError(f"the promises of {claim.title} could not be run:\n{done.stdout}{done.stderr}")
    return verdicts


def _read(result: Path) -> list[Verdict]:
    """The verdicts in a file of pytest's, in the order in which they were run, without promises that do not apply."""
    return [_verdict(case) for case in ElementTree.parse(result).iter("testcase") if not _does_not_apply(case)]


def _does_not_apply(case: ElementTree.Element) -> bool:
    return any((child.get("message") or "").startswith(NOT_MADE) for child in case if child.tag == "skipped")


def _verdict(case: ElementTree.Element) -> Verdict:
    promise = case.get("name", "").removeprefix("test_").replace("_", " ")
    faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
    if any(fault.get("message") == "collection failure" for fault in faults):
        return Verdict("it can be imported", False, "\n".join(fault.text or "" for fault in faults))
    return Verdict(promise, not faults, "\n".join(fault.get("message") or fault.text or "" for fault in faults))
