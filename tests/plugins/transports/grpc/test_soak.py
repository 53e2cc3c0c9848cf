"""A server that runs for weeks: ten thousand short rounds, after which nothing has grown but the log of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtower.recsys.process_log import KEPT, MOST_BYTES

PROGRAM = Path(__file__).parents[4] / "benchmarks" / "soak.py"
MOST_MB = 1.0  # a thousand rounds, of a process
LOG_MB = 0.4  # a thousand rounds of the run's own record, which is kept
# Two segments of the journal, and its index with a hundred rounds that are over.
JOURNAL_MB = 2 * 67.2 + 10.0
LOGS_MB = 3 * (KEPT + 1) * MOST_BYTES / 1e6  # of three processes
HANDLES = 8  # what a checkpoint or a call has open for a moment


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found."""
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    done = subprocess.run([sys.executable, str(PROGRAM), "--rounds", "10000", "--json", str(out)], check=False)
    assert done.returncode == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.mark.soak
def test_no_process_grows(told: dict[str, Any]) -> None:
    assert set(told["found"]["processes"]) == {"supervisor", "intake", "table", "swarm"}
    for name, each in told["found"]["processes"].items():
        assert each["growth"] < MOST_MB, name


@pytest.mark.soak
def test_handles_are_let_go_of(told: dict[str, Any]) -> None:
    for name, each in told["found"]["processes"].items():
        assert each["handles"][1] - each["handles"][0] <= HANDLES, name
    first, last = (told["samples"][place]["handles"] for place in (len(told["samples"]) // 5, -1))
    for name, handles in last.items():
        assert abs(handles - first[name]) <= HANDLES / 2, name


@pytest.mark.soak
def test_what_a_round_leaves_on_the_disk_goes(told: dict[str, Any]) -> None:
    folders = told["found"]["folders"]
    assert folders.pop("log.jsonl")["growth"] < LOG_MB
    assert folders.pop("logs")["most_mb"] < LOGS_MB
    assert folders.pop("journal")["most_mb"] < JOURNAL_MB
    for name, each in folders.items():
        assert each["most_mb"] < 2.0, name
        assert each["most_files"] < 150, name
        assert each["growth"] < 0.02, name
