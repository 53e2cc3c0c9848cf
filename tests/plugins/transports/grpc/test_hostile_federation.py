"""A federation, server and swarm, among peers that mean harm: it ends with the bits of one that was left alone."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
import numpy as np
import pytest

from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cli import call
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.tls import DeviceTls, connect
from tests.plugins.transports.grpc.damage import damaged
from tests.plugins.transports.grpc.raw import garbage, half_open
from tests.plugins.transports.grpc.standing import Peer, each, requests

CLIENTS, ROUNDS = 6, 20
SETTINGS = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": 4,
    "rounds": ROUNDS,
    "evaluation.every": 5,
    "evaluation.negatives": 20,
    "checkpoint.every": 5,
}
SERVED = {"transport.wait_for": CLIENTS, "transport.lease_seconds": 20.0, "transport.heartbeat_seconds": 5.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, shards, and codes that devices enrol with; the last code is the hostile one's."""
    place = tmp_path_factory.mktemp("federation")
    assert call(["data", "shard", "dssm-synthetic", str(place / "shards"), "-n", str(CLIENTS), *options(SETTINGS)]) == 0
    assert call(["certs", str(place / "keys"), "--host", "localhost"]) == 0
    assert call(["keygen", str(place / "keys")]) == 0
    credentials = Credentials(place / "keys" / "credentials.sqlite")
    *codes, own = credentials.make_codes(CLIENTS + 1, first_client=0)
    (place / "codes").write_text("\n".join(codes))
    (place / "token").write_text(credentials.enrol(own, "", b"a" * 16)[1])
    credentials.close()
    return place


def options(settings: dict[str, Any]) -> list[str]:
    return [option for key, value in settings.items() for option in ("-o", f"{key}={json.dumps(value)}")]


@contextmanager
def running(place: Path, log: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command, ended with the block."""
    with (place / log).open("w") as said:
        command = [sys.executable, "-m", "fedtower", *arguments]
        process = subprocess.Popen(command, cwd=place, stdout=said, stderr=said, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30.0)


def served(place: Path, name: str, beside: Any = None) -> dict[str, Any]:
    """The parameters and tables of a run that is served from begin to end; ``beside`` is called with its port."""
    serve = ["serve", "dssm-synthetic", "--port", "0", "--keys", "keys", "--runs", name]
    with running(place, f"{name}.log", *serve, *options({**SETTINGS, **SERVED})) as server:
        port = port_of(place / name, server)
        swarm = ["swarm", "--server", f"localhost:{port}", "--data", "shards", "--codes", "codes", "--keys", "keys"]
        with running(place, f"{name}-swarm.log", *swarm, "--patience", "60") as devices:
            thread = None if beside is None else beside(port)
            assert devices.wait(500.0) == 0, (place / f"{name}-swarm.log").read_text()[-3_000:]
            assert server.wait(60.0) == 0, (place / f"{name}.log").read_text(errors="replace")[-3_000:]
            if thread is not None:
                thread()
    arrays = read_checkpoint(next((place / name).iterdir()) / "checkpoints", ROUNDS)
    return {name: value for name, value in arrays.items() if not name.startswith("clients")}


def port_of(runs: Path, server: subprocess.Popen[bytes]) -> int:
    for _ in range(2_000):
        assert server.poll() is None
        for path in runs.glob("*/intake.json"):
            return int(json.loads(path.read_text())["port"])
        time.sleep(0.05)
    raise AssertionError("nobody listens")


class Harm:
    """Everything at once, until it is told to stop: strangers, damaged messages, bombs, garbage, open connections."""

    def __init__(self, place: Path, port: int) -> None:
        self.place, self.port, self.done, self.said = place, port, Event(), Counter[str]()
        self._threads = [Thread(target=each) for each in (self._calls, self._lines)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive()

    def _lines(self) -> None:
        """An open connection of every kind, 200 of them, and garbage on others."""
        draw = random.Random(3)
        with half_open(self.port, 200):
            while not self.done.is_set():
                garbage(self.port, draw)

    def _calls(self) -> None:
        asyncio.run(self._call())

    async def _call(self) -> None:
        tls, token = DeviceTls(self.place / "keys" / "authority.pem"), (self.place / "token").read_text()
        draw, good = random.Random(4), requests(bytes(16), bytes(32))
        del good["CheckIn"]  # it is not there to take part
        send: list[tuple[str, str]] = [("grpc.max_send_message_length", "-1")]
        async with connect(f"localhost:{self.port}", tls, insecure=False, options=send) as channel:
            while not self.done.is_set():
                known = draw.random() < 0.5
                peer = Peer(channel, (("authorization", f"Bearer {token if known else token + 'x'}"),))
                name = draw.choice([*good, "Submit"])
                data = damaged(draw.randrange(1 << 30), good.get(name, b"\x0a\x10" + bytes(16)))
                if draw.random() < 0.01:
                    answer = await peer.call("Resume", bytes(30 << 20), compression=grpc.Compression.Gzip)
                else:
                    answer = await peer.call(name, each([data]) if name == "Submit" else data)
                self.said[answer.reason.name if answer.reason else answer.outcome] += 1


@pytest.mark.soak
def test_a_federation_among_hostile_peers_ends_with_the_same_bits(place: Path) -> None:
    want, harm = served(place, "alone"), list[Harm]()

    def beside(port: int) -> Any:
        harm.append(Harm(place, port))
        return harm[0].stop

    got = served(place, "beset", beside)
    assert harm[0].said.total() > 1_000
    assert {"RATE", "UNKNOWN_DEVICE", "UNKNOWN_LEASE"} <= set(harm[0].said), harm[0].said
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
