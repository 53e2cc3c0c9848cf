"""A real federation on loopback: server, devices and their processes; with the numbers of a simulation, and killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cli import call
from fedtower.recsys.runlog import RunLog

CLIENTS, ROUNDS = 5, 4
SMALL = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": True,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": 3,
    "rounds": ROUNDS,
    "evaluation.every": 2,
    "evaluation.negatives": 20,
    "checkpoint.every": 2,
    "transforms.0.name": "clip",
    "transforms.0.norm": 0.5,
}
SERVED = {"transport.wait_for": CLIENTS, "transport.lease_seconds": 8.0, "transport.heartbeat_seconds": 2.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, shards, and codes that devices enrol with."""
    place = tmp_path_factory.mktemp("federation")
    options = [option for key, value in SMALL.items() for option in ("-o", f"{key}={json.dumps(value)}")]
    assert call(["data", "shard", "dssm-synthetic", str(place / "shards"), "-n", str(CLIENTS), *options]) == 0
    assert call(["certs", str(place / "keys"), "--host", "127.0.0.1"]) == 0
    assert call(["keygen", str(place / "keys")]) == 0
    return place


class Served:
    """A server and a swarm of devices, as processes of their own."""

    def __init__(self, place: Path, name: str, codes: Path) -> None:
        self.runs = place / name
        options = [o for key, value in {**SMALL, **SERVED}.items() for o in ("-o", f"{key}={json.dumps(value)}")]
        self._log = (place / f"{name}.log").open("w+")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.metrics_port = probe.getsockname()[1]
        self._server = self._start(
            "serve",
            "dssm-synthetic",
            "--port",
            "0",
            "--metrics-port",
            str(self.metrics_port),
            "--keys",
            str(place / "keys"),
            "--runs",
            str(self.runs),
            *options,
        )
        port = self.wait_for(lambda: json.loads((self.folder / "intake.json").read_text())["port"])
        self._swarm = self._start(
            *("swarm", "--server", f"127.0.0.1:{port}", "--data", str(place / "shards"), "--codes", str(codes)),
            *("--keys", str(place / "keys"), "--patience", "60"),
        )

    @property
    def folder(self) -> Path:
        return next(self.runs.iterdir())

    def pid(self, name: str) -> int:
        return int(self.wait_for(lambda: json.loads((self.folder / "processes.json").read_text())[name]) or 0)

    def rounds(self) -> int:
        """How many rounds are done."""
        return (self.folder / "log.jsonl").read_text().count('"round_finished"')

    def metric(self, name: str) -> float:
        """What Prometheus would read."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5.0) as page:
            lines = page.read().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)

    def finish(self, seconds: float = 240.0) -> None:
        try:
            assert self._swarm.wait(seconds) == 0, self.said()
            assert self._server.wait(30.0) == 0, self.said()
        finally:
            self.end()

    def end(self) -> None:
        for process in (self._swarm, self._server):
            if process.poll() is None:
                process.terminate()
                process.wait(30.0)
        self._log.close()

    def said(self) -> str:
        return Path(self._log.name).read_text()[-4000:]

    def wait_for(self, look: Callable[[], Any], seconds: float = 120.0) -> Any:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if found := look():
                    return found
            except (OSError, ValueError, KeyError, StopIteration):
                pass
            assert self._server.poll() is None, self.said()
            time.sleep(0.05)
        raise AssertionError(f"nothing came in {seconds} seconds: {self.said()}")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedtower", *arguments]
        return subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture(scope="module")
def codes(place: Path) -> Path:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedtower", "enrol", "codes", str(place / "keys" / "credentials.sqlite")),
            *("-n", str(CLIENTS), "--first-client", "0"),
        ],
        capture_output=True,
        check=True,
    )
    (place / "codes").write_bytes(done.stdout)
    return place / "codes"


@pytest.fixture(scope="module")
def undisturbed(place: Path, codes: Path) -> Served:
    served = Served(place, "undisturbed", codes)
    served.finish()
    return served


def checkpoint(folder: Path) -> dict[str, Any]:
    arrays = read_checkpoint(folder / "checkpoints", ROUNDS)
    return {name: value for name, value in arrays.items() if not name.startswith("clients")}


def test_a_deployed_run_has_the_numbers_of_a_simulated_one(place: Path, undisturbed: Served) -> None:
    settings = {key: value for key, value in SMALL.items() if not key.startswith("data.")}
    simulated = fedtower.run(
        "dssm-synthetic",
        {**settings, "data.name": "shards", "data.path": str(place / "shards"), "data.split": "given"},
        runs=place / "simulated",
    )
    got, want = checkpoint(undisturbed.folder), checkpoint(simulated.folder)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    moved = max(float(np.abs(got[name] - read_first(simulated.folder, name)).max()) for name in ("parameters/mixture",))
    assert moved > 1e-3
    final = RunLog(undisturbed.folder).record().final("test")[0]
    assert final["label"] == "on devices, 20 negatives"
    for name, figure in final["metrics"].items():
        assert figure == pytest.approx(simulated.metrics[name], abs=1e-6), name


def read_first(folder: Path, name: str) -> Any:
    """A parameter after half of the rounds."""
    return read_checkpoint(folder / "checkpoints", ROUNDS // 2)[name]


def test_killed_at_any_time_it_ends_with_the_same_bits(place: Path, codes: Path, undisturbed: Served) -> None:
    served = Served(place, "killed", codes)
    draws = np.random.default_rng(8)
    try:
        served.wait_for(lambda: served.metric('fedtower_leases_total{task="train"}') > 0)
        for name in ("intake", "table", "intake", "table"):
            served.wait_for(lambda: served.rounds() >= 0)
            time.sleep(float(draws.uniform(0.2, 2.5)))
            pid = served.pid(name)
            if served._server.poll() is not None:
                break
            os.kill(pid, signal.SIGKILL)
            served.wait_for(lambda: served.pid(name) != pid)  # noqa: B023
        served.finish()
    finally:
        served.end()
    got, want = checkpoint(served.folder), checkpoint(undisturbed.folder)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_device_that_is_not_enrolled_is_told_how(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = place / "shards" / "client-000000.safetensors"
    asked = ["device", "--server", "127.0.0.1:1", "--data", str(data), "--folder", str(place / "new")]
    assert call([*asked, "--keys", str(place / "keys")]) == 10
    assert "enrol codes" in " ".join(capsys.readouterr().err.split())
