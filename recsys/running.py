"""Running: the processes of a served run, as ``processes.json`` of its folder names them, and whether they are alive.

A process is known by its id and by when it was started: a later one may have been given the same id.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROCESSES = "processes.json"
_STATE, _STARTED = 0, 19  # fields 3 and 22 of /proc/PID/stat, counted from behind the name


@dataclass(frozen=True)
class Running:
    """A process, by its id and the clock ticks from the machine's start to its own."""

    name: str
    pid: int
    started: int

    @classmethod
    def of(cls, name: str, pid: int) -> Running:
        """The process that has this id now."""
        return cls(name, pid, int((_stat(pid) or ("",) * _STARTED + ("0",))[_STARTED]))

    @property
    def is_alive(self) -> bool:
        """Whether it is there, and has not ended."""
        fields = _stat(self.pid)
        return fields is not None and fields[_STATE] not in ("Z", "X") and int(fields[_STARTED]) == self.started

    @property
    def since(self) -> datetime:
        """When it was started, by today's wall clock."""
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / os.sysconf("SC_CLK_TCK")
        return datetime.fromtimestamp(time.time() - up, UTC)


def to_json(running: Mapping[str, Running]) -> dict[str, object]:
    """What ``processes.json`` holds: the ids by name, and under ``started`` the ticks."""
    ids: dict[str, object] = {name: each.pid for name, each in running.items()}
    return {**ids, "started": {name: each.started for name, each in running.items()}}


def running_of(folder: Path) -> list[Running]:
    """The processes of a run that was served; none of one that was not, or never came so far."""
    try:
        values = json.loads((folder / PROCESSES).read_text(encoding="utf-8"))
        return [Running(name, int(values[name]), int(ticks)) for name, ticks in values["started"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
