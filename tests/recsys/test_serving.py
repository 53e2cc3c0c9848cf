"""What keeps a server's processes running: one that is killed is back at once, one that fails is not tried for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fedtower.core.errors import ServingError
from fedtower.recsys.serving import Door, Worker, refuse_taken


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
