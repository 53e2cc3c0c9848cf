"""Serving: a deployed run on disk, and the two processes that work on it, started again whenever one dies.

The *intake* serves the public port, the *table* process trains. This one does neither, so that it need never die: it
imports no torch, no model and no network.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import RecipeError, ServingError
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.core.settings import plain
from fedtower.recsys.engine import own_path
from fedtower.recsys.process_log import ProcessLog
from fedtower.recsys.run_folder import FEDERATION, RunFolder
from fedtower.recsys.running import PROCESSES, Running, to_json
from fedtower.recsys.tether import TETHER

TABLE = "fedtower.recsys.table_process"
_GRACE_SECONDS = 15.0
_MOST_DEATHS, _WITHIN_SECONDS = 5, 60.0
# A recipe, data, a plugin, a checkpoint, a library, a model or a key is at fault: another try would end the same way.
_FOR_GOOD = {2, 3, 4, 5, 7, 9, 10}


@dataclass(frozen=True)
class Door:
    """The public port, and the files by which devices know it; and where the status page is, if there is to be one."""

    host: str = "127.0.0.1"
    port: int = 0
    insecure: bool = False
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    status_host: str = "127.0.0.1"
    status_port: int | None = None

    @property
    def page(self) -> str:
        """The address of the status page."""
        host = f"[{self.status_host}]" if ":" in self.status_host else self.status_host
        return f"http://{host}:{self.status_port}/"


def found(folder: RunFolder, keys: Path) -> None:
    """Let a new run folder belong to the federation of a folder of keys, which gets a name that no other has.

    Devices that have enrolled there take part in every run of it.
    """
    path = keys / "federation"
    with storage_errors(keys):
        if not path.is_file():
            path.write_text(secrets.token_hex(8), encoding="ascii")
        name = path.read_text(encoding="ascii")
    folder.write(FEDERATION, {"name": name, "run": secrets.token_hex(8), "keys": str(keys.resolve())})


def intake_config(folder: RunFolder, recipe: Recipe, door: Door) -> dict[str, Any]:
    """What an intake is told."""
    federation = folder.federation()
    return {
        "folder": str(folder.path.resolve()),
        "federation": federation.name,
        "journal": {"name": recipe.journal.name, "settings": plain(recipe.journal.settings)},
        "transport": plain(recipe.transport.settings),
        "credentials": str(federation.credentials),
        "address": asdict(door),
    }


def with_ports(door: Door) -> Door:
    """The same with free ports instead of 0: an intake that is started again must find its own."""
    return replace(
        door,
        port=door.port or _free(door.host),
        status_port=_free(door.status_host) if door.status_port == 0 else door.status_port,
    )


def _free(host: str) -> int:
    """A port that nobody listens at now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def intake_module(registry: Registry, recipe: Recipe) -> str:
    """The module that serves the public port of the recipe's transport. Raises RecipeError when there is none."""
    offer = registry.get("transport", recipe.transport.name)
    module = offer.capabilities.get("intake")
    if not isinstance(module, str):
        others = [each.name for each in registry.offers("transport") if "intake" in each.capabilities]
        raise RecipeError(
            f'mode = "deployed" needs a transport that devices can call, and {offer.name!r} is none; set '
            f"transport.name to {' or '.join(others)}"
        )
    return module


@dataclass
class Worker:
    """A child process that is started again when it dies."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    _process: subprocess.Popen[bytes] | None = None
    _deaths: list[float] = field(default_factory=list)
    _not_before: float = 0.0

    @property
    def pid(self) -> int | None:
        """The process's id, while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process."""
        held = [int(self.environment[TETHER])] if TETHER in self.environment else []
        self._process = subprocess.Popen(
            self.command, env=dict(self.environment), pass_fds=held, start_new_session=True
        )

    def look(self, said: Callable[[str], None]) -> int | None:
        """Its exit code, once it has ended by itself; one that was killed or failed is started again.

        Raises:
            ServingError: it dies again and again.
        """
        if self._process is None:
            if time.monotonic() >= self._not_before:
                self.start()
            return None
        code = self._process.poll()
        if code is None or code == 0:
            return code
        if code in _FOR_GOOD:
            raise ServingError(f"the {self.name} process ended with exit code {code}; what it said stands above")
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < _WITHIN_SECONDS] + ([now] if code > 0 else [])
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if len(self._deaths) >= _MOST_DEATHS:
            raise ServingError(
                f"the {self.name} process ended {how}, {_MOST_DEATHS} times within {_WITHIN_SECONDS:g} seconds; what "
                f"it said stands above. Nothing that was acknowledged is lost: `fedtower serve` goes on with the run's "
                f"folder"
            )
        said(f"the {self.name} process ended {how}; it is started again")
        self._process, self._not_before = None, now + 0.05 * (2 ** len(self._deaths) - 1)
        return self.look(said)  # one that was killed is started at once: devices wait

    def ask_to_end(self) -> None:
        """Ask it to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Wait for its end, and end it if that takes longer."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(
    folder: RunFolder,
    recipe: Recipe,
    registry: Registry,
    door: Door,
    *,
    intakes: int = 1,
    tether: int | None = None,
    verbose: bool = False,
    said: Callable[[str], None] = lambda message: None,
) -> int:
    """Keep the processes running until the last round is done; the exit code. There may be several ``intakes``, which
    share the port; devices are dealt out to them as they connect. All end when what holds the ``tether`` has ended.

    Raises:
        ServingError: a process cannot be kept running, or the port is another's.
        KeyboardInterrupt: SIGINT or SIGTERM came; all processes have ended in order.
    """
    refuse_taken(door)
    log = ProcessLog(folder.path, "supervisor")
    environment = {**os.environ, "PYTHONPATH": own_path(), **({} if tether is None else {TETHER: str(tether)})}
    public = _intakes(intakes, folder, recipe, registry, door, environment)
    options = ["--verbose"] if verbose else []
    table = Worker("table", [sys.executable, "-m", TABLE, str(folder.path), *options], environment)
    before = signal.signal(signal.SIGTERM, _interrupt)
    log.write("started", host=door.host, port=door.port, status_port=door.status_port)
    try:
        _keep(public, table, folder, log, _both(said, log))
        log.write("finished")
        return 0
    except ServingError as error:
        log.write("failed", level=logging.ERROR, message=str(error))
        raise
    finally:
        _end([*public, table])
        log.write("stopped")
        log.close()
        signal.signal(signal.SIGTERM, before)


def _keep(
    intakes: Sequence[Worker], table: Worker, folder: RunFolder, log: ProcessLog, said: Callable[[str], None]
) -> None:
    """Start all, and start again whichever dies, until the table process has ended by itself."""
    for worker in (*intakes, table):
        worker.start()
    known: dict[str, int] = {}
    while table.look(said) != 0:
        if 0 in [intake.look(said) for intake in intakes]:
            raise ServingError("the intake process has ended without being asked to")
        alive = {worker.name: worker.pid for worker in (*intakes, table) if worker.pid is not None}
        alive = {"supervisor": os.getpid(), **alive}
        if alive != known:
            known = alive
            folder.write(PROCESSES, to_json({name: Running.of(name, pid) for name, pid in alive.items()}))
            log.write("processes", **alive)
        time.sleep(0.05)


def _end(workers: Sequence[Worker]) -> None:
    """End all at the same time: an intake drains while the table process puts down what it has."""
    for worker in workers:
        worker.ask_to_end()
    until = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        worker.end(max(until - time.monotonic(), 0.0))


def _both(said: Callable[[str], None], log: ProcessLog) -> Callable[[str], None]:
    """Says something to people, and writes it down."""

    def say(message: str) -> None:
        log.write("restarting", level=logging.WARNING, message=message)
        said(message)

    return say


def refuse_taken(door: Door, patience_seconds: float = 10.0) -> None:
    """Raise ServingError if somebody listens at the port, and goes on to: intakes share theirs, so they would share it
    with a stranger too, and devices would come to either.
    """
    until = time.monotonic() + patience_seconds  # those whose starter was killed are about to end
    while True:
        try:
            _listen_once(door)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ServingError(
                    f"nobody can listen at {door.host}:{door.port} ({error.strerror}): another server has it, or the "
                    f"address is not of this machine; end that one, or choose another with --port and --host"
                ) from error
        time.sleep(0.1)


def _listen_once(door: Door) -> None:
    """Raise OSError unless the port is free."""
    with socket.socket(socket.AF_INET6 if ":" in door.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a moment ago is free
        probe.bind((door.host, door.port))
        probe.listen()


def _intakes(
    count: int, folder: RunFolder, recipe: Recipe, registry: Registry, door: Door, environment: Mapping[str, str]
) -> list[Worker]:
    """The intakes, on one port; each has a port of its own for its page, one after the other."""
    module, workers = intake_module(registry, recipe), list[Worker]()
    for number in range(count):
        name = "intake" if number == 0 else f"intake-{number + 1}"
        own = door if door.status_port is None else replace(door, status_port=door.status_port + number)
        config = folder.path / f"{name}-config.json"
        with storage_errors(folder.path):
            config.write_text(json.dumps(intake_config(folder, recipe, own)), encoding="utf-8")
        workers.append(Worker(name, [sys.executable, "-m", module, str(config)], environment))
    return workers


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
