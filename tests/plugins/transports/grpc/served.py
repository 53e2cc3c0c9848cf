"""A federation on loopback, for tests: its keys and shards, and a server and devices as processes of their own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cli import call
from fedtower.core.errors import CheckpointError
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog

# Servers are killed again and again here: devices shall not wait ever longer for the next one.
PATIENT = ("--patience", "120", "--longest-pause", "2")

Found = TypeVar("Found")
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Ground:
    """A folder with keys, shards, and codes that devices enrol with: what is there before anybody serves."""

    folder: Path
    recipe: str

    @classmethod
    def make(cls, folder: Path, recipe: str, settings: Settings, clients: int) -> Ground:
        """As a user makes it, by the commands."""
        shards, keys = str(folder / "shards"), str(folder / "keys")
        assert call(["data", "shard", recipe, shards, "-n", str(clients), *as_options(settings)]) == 0
        assert call(["certs", keys, "--host", "127.0.0.1"]) == 0
        assert call(["keygen", keys]) == 0
        command = [sys.executable, "-m", "fedtower", "enrol", "codes", f"{keys}/credentials.sqlite"]
        done = subprocess.run([*command, "-n", str(clients), "--first-client", "0"], capture_output=True, check=True)
        (folder / "codes").write_bytes(done.stdout)
        return cls(folder, recipe)

    @property
    def shards(self) -> list[Path]:
        """One file a device."""
        return sorted((self.folder / "shards").glob("client-*.safetensors"))

    @property
    def codes(self) -> list[str]:
        """One code a device."""
        return (self.folder / "codes").read_text().split()


class Served:
    """A run that is served: a server, and devices that call it."""

    def __init__(self, ground: Ground, name: str, settings: Settings, *options: str) -> None:
        self.ground, self.name = ground, name
        self.runs = ground.folder / name
        self._logs: list[IO[str]] = []
        self.metrics_port = free_port()
        self.server = self._start(
            "server",
            *("serve", ground.recipe, "--port", "0", "--metrics-port", str(self.metrics_port)),
            *("--keys", str(ground.folder / "keys"), "--runs", str(self.runs)),
            *options,
            *as_options(settings),
        )
        self.devices: list[subprocess.Popen[bytes]] = []
        self.port = int(self.wait_for(lambda: json.loads((self.folder / "intake.json").read_text())["port"]))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return next(self.runs.iterdir())

    def swarm(self, *options: str) -> None:
        """All devices in one process."""
        data, codes = self.ground.folder / "shards", self.ground.folder / "codes"
        self.devices.append(self._device("swarm", "swarm", "--data", str(data), "--codes", str(codes), *options))

    def apart(self) -> None:
        """Each device a process of its own."""
        for shard, code in zip(self.ground.shards, self.ground.codes, strict=True):
            self.devices.append(self._device(shard.stem, "device", "--data", str(shard), "--code", code))

    def serve_again(self) -> None:
        """Go on with the run where devices know it to be."""
        again = ("serve", str(self.folder), "--port", str(self.port), "--keys", str(self.ground.folder / "keys"))
        self.server = self._start("server-again", *again)

    def pid(self, name: str) -> int:
        """The process that runs under a name now."""
        return int(self.wait_for(lambda: json.loads((self.folder / "processes.json").read_text())[name]))

    def rounds(self) -> int:
        """How many rounds are done."""
        done = [event["round"] for event in RunLog(self.folder).events() if event["event"] == "round"]
        return max(done, default=0)

    def metric(self, name: str, intake: int = 0) -> float:
        """What Prometheus would read of an intake."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port + intake}/metrics", timeout=5.0) as page:
            lines = page.read().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)

    def said_by_devices(self) -> list[dict[str, Any]]:
        """What the devices have said, each line an event."""
        paths = [Path(log.name) for log in self._logs if "server" not in log.name]
        return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")]

    def finish(self, seconds: float = 240.0) -> None:
        """Wait until devices and server have ended well."""
        until = time.monotonic() + seconds
        try:
            for process in (*self.devices, self.server):
                assert process.wait(max(until - time.monotonic(), 1.0)) == 0, self.said()
        finally:
            self.end()

    def end(self) -> None:
        """End what still runs."""
        running = [process for process in (*self.devices, self.server) if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait(30.0)
        for log in self._logs:
            log.close()

    def said(self) -> str:
        """The last lines of all, and which devices gave up, whenever they did."""
        gave_up = [str(event) for event in self.said_by_devices() if event.get("event") == "gave up"]
        return "\n".join([*gave_up, *(f"{log.name}: {Path(log.name).read_text()[-3000:]}" for log in self._logs)])

    def wait_for(self, look: Callable[[], Found | None], seconds: float = 120.0) -> Found:
        """What ``look`` finds, as soon as it does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if found := look():
                    return found
            except (CheckpointError, OSError, ValueError, KeyError, StopIteration):
                pass
            assert self.server.poll() is None, self.said()
            time.sleep(0.05)
        raise AssertionError(f"nothing came in {seconds} seconds: {self.said()}")

    def _device(self, log: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        server, keys = f"127.0.0.1:{self.port}", str(self.ground.folder / "keys")
        return self._start(log, command, "--server", server, "--keys", keys, "--json", *PATIENT, *arguments)

    def _start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        self._logs.append((self.ground.folder / f"{self.name}-{log}.log").open("w"))
        command = [sys.executable, "-m", "fedtower", *arguments]
        # In that folder, whose fedtower_plugins.py counts if there is one.
        return subprocess.Popen(
            command, cwd=self.ground.folder, stdout=self._logs[-1], stderr=subprocess.STDOUT, start_new_session=True
        )


@contextmanager
def served(ground: Ground, name: str, settings: Settings, *options: str) -> Iterator[Served]:
    """A server that is ended with the block, however that ends."""
    made = Served(ground, name, settings, *options)
    try:
        yield made
    finally:
        made.end()


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint without what clients keep: that is on the devices."""
    arrays = read_checkpoint(folder / "checkpoints", RunFolder.open(folder).latest_round())
    return {name: value for name, value in arrays.items() if not name.startswith("clients")}


def as_options(settings: Settings) -> list[str]:
    """Overrides, as the command line takes them."""
    return [option for key, value in settings.items() for option in ("-o", f"{key}={json.dumps(value)}")]


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
