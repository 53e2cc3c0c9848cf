"""A PostgreSQL server of one's own, in a temporary folder and on a Unix socket: to try the journal with."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psycopg

from fedtower.core.errors import MissingDependency, StorageError

START_SECONDS = 60.0


@dataclass
class Server:
    """A server that nobody else can reach. What it writes survives kills of it, and not of the machine."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fedtower-pg-")))
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def dsn(self) -> str:
        """Where it is."""
        return f"host={self.folder} user=fedtower dbname=postgres"

    def make(self) -> None:
        """Make the database's files."""
        programs = find_programs()
        if os.getuid() == 0:
            # It refuses to run as root.
            shutil.chown(self.folder, *_somebody())
        self._run(
            [
                str(programs / "initdb"),
                *("--pgdata", str(self.folder / "data"), "--username", "fedtower", "--auth", "trust"),
                *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ]
        ).communicate()

    def start(self, *settings: str) -> None:
        """Start it, with settings such as ``"max_connections=20"``, and wait until it answers."""
        self._process = self._run(
            [
                *(str(find_programs() / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)),
                *(word for each in ("listen_addresses=", "fsync=off", *settings) for word in ("-c", each)),
            ]
        )
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.dsn).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    log = (self.folder / "log").read_text("utf-8", "replace")
                    raise StorageError(f"PostgreSQL does not start in {self.folder}:\n{log}") from error
                time.sleep(0.02)

    def stop(self, *, kill: bool = False) -> None:
        """End it: its clients are told, or with ``kill`` they find out."""
        if self._process is None:
            return
        # SIGQUIT is what a server does that must end at once: all of its processes do, and nothing is tidied up.
        self._process.send_signal(3 if kill else 2)
        self._process.wait()
        self._process = None

    def remove(self) -> None:
        """End it, and remove its files."""
        self.stop(kill=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        whose: dict[str, Any] = {}
        if os.getuid() == 0:
            user, group = _somebody()
            whose = {"user": user, "group": group, "extra_groups": []}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **whose)


def find_programs() -> Path:
    """The folder of the newest PostgreSQL server's programs.

    Raises:
        MissingDependency: there is none.
    """
    found = shutil.which("postgres")
    if found is not None:
        return Path(found).parent
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if not folders:
        raise MissingDependency(
            "there is no PostgreSQL server on this machine; `apt-get install postgresql` brings it on Debian"
        )
    return max(folders, key=lambda folder: float(folder.parent.name))


def _somebody() -> tuple[int, int]:
    """A user that is not root."""
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return entry.pw_uid, entry.pw_gid


@cache
def running() -> Server:
    """A server for as long as this process lives."""
    find_programs()
    server = Server()
    atexit.register(server.remove)
    server.make()
    server.start()
    return server


def example(folder: Path) -> dict[str, Any]:
    """Settings to try the journal with."""
    return {"dsn": running().dsn}
