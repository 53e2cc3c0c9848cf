"""What keeps a server's processes running: one that is killed is back at once, one that fails is not tried for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtower.core.cli import call
from fedtower.core.errors import RecipeError, ServingError
from fedtower.core.registry import Gate, discover
from fedtower.recsys.opening import opened
from fedtower.recsys.serving import Door, Worker, refuse_taken
from fedtower.recsys.tether import hold
from tests.house.test_imports import HEAVY


def worker(program: str) -> Worker:
    return Worker("tried", [sys.executable, "-S", "-c", program], dict(os.environ))


@pytest.fixture
def sleeping() -> Iterator[Worker]:
    made = worker("import time; time.sleep(60)")
    made.start()
    yield made
    made.ask_to_end()
    made.end(10.0)


def test_a_process_that_was_killed_is_there_again_when_that_is_seen(sleeping: Worker) -> None:
    said: list[str] = []
    for _ in range(7):  # more often than one may fail
        pid = sleeping.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert sleeping.look(said.append) is None
        assert sleeping.pid not in (None, pid)
    assert said == ["the tried process ended by SIGKILL; it is started again"] * 7


def test_a_process_that_fails_again_and_again_ends_it() -> None:
    failing = worker("raise SystemExit(1)")

    def kept_running() -> None:
        failing.start()
        while True:
            failing.look(lambda message: None)
            time.sleep(0.01)

    with pytest.raises(ServingError, match="5 times within 60 seconds"):
        kept_running()


def test_a_port_that_somebody_listens_at_is_not_shared_with_him() -> None:
    with socket.socket() as somebody:
        somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        door = Door(port=somebody.getsockname()[1])
        with pytest.raises(ServingError, match="choose another with --port"):
            refuse_taken(door, patience_seconds=0.2)
    refuse_taken(door)


STARTS_ONE = """
import os, sys, time
from fedtower.recsys.serving import Worker
from fedtower.recsys.tether import TETHER, hold
child = "import time; from fedtower.recsys.tether import end_with_starter; end_with_starter(); time.sleep(600)"
with hold() as held:
    Worker("one", [sys.executable, "-c", child], {**os.environ, TETHER: str(held)}).start()
    print("started", flush=True)
    time.sleep(600)
"""


def test_who_is_started_to_serve_ends_with_the_one_that_started_it() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTS_ONE], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "started\n"
    starter.kill()
    starter.communicate(timeout=60.0)  # its child has the other end of this pipe, for as long as it lives


SERVES = """
import json, sys
from fedtower.core.cli import call
call(["serve", "dssm-synthetic", "--insecure", "--no-status", "--port", "0"])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_who_looks_after_the_processes_imports_nothing_that_trains(run_root: Path) -> None:
    assert call(["keygen", "keys"]) == 0
    supervisor = subprocess.Popen([sys.executable, "-c", SERVES], stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120.0
        while not list(run_root.glob("runs/*/processes.json")):
            assert supervisor.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60.0)
    modules = set(json.loads(said.splitlines()[-1]))
    assert "numpy" in modules
    assert not modules & (HEAVY | {"grpc"})


def test_what_is_wrong_with_a_recipe_is_raised_where_it_was_asked(run_root: Path) -> None:
    registry = discover([Gate("--plugins-block", block=("model-dssm",))])
    with hold() as tether, pytest.raises(RecipeError, match="model-dssm of fedtower is blocked: blocked by --plugins"):
        opened("dssm-synthetic", [], run_root / "runs", run_root / "keys", registry, tether)


BREAKS = """
from fedtower.core.hooks import hookimpl

class Breaks:
    def __init__(self):
        raise RuntimeError("it broke")

    def open(self, model, local):
        return self

@hookimpl
def fedtower_register(registry):
    registry.runtime("breaks", "fedtower_plugins:Breaks")
"""


def test_a_plugin_that_breaks_while_a_run_is_opened_is_told_of(
    run_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_root / "fedtower_plugins.py").write_text(BREAKS)
    with hold() as tether, pytest.raises(ServingError, match="exit code 1 and without an answer"):
        opened("dssm-synthetic", ["runtime.name=breaks"], run_root, run_root, discover(folder=run_root), tether)
    assert "RuntimeError: it broke" in capfd.readouterr().err
