"""ProcessLog: what a process of a served run does, one JSON object a line, in ``logs/NAME.jsonl`` of the run's folder.

``log.jsonl`` is the record of a run and is kept whole; these are for whoever looks after the processes, and the oldest
go. Every line has ``time`` (UTC), ``process``, ``pid``, ``level`` and ``event``; the other keys depend on the event,
and are named for what they are: ``round``, ``task``, ``client``, ``device``, ``reason``, ``message``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedtower.core.checkpoint import storage_errors
from fedtower.recsys.runlog import plain_values

LOGS = "logs"
# Some 40,000 refusals a file, and at most 40 MB a process.
MOST_BYTES, KEPT = 8 << 20, 4


class ProcessLog:
    """The log of this process, until it is closed; any thread may write.

    Raises:
        StorageError: the file cannot be made. Later on, what cannot be written is said on stderr, once.
    """

    def __init__(self, folder: Path, process: str, *, most_bytes: int = MOST_BYTES, kept: int = KEPT) -> None:
        with storage_errors(folder):
            (folder / LOGS).mkdir(parents=True, exist_ok=True)
            self._handler = _Rotating(
                folder / LOGS / f"{process}.jsonl", maxBytes=most_bytes, backupCount=kept, encoding="utf-8"
            )
        self._handler.setFormatter(_Lines(process))
        self._logger = logging.Logger(process)
        self._logger.addHandler(self._handler)

    def write(self, event: str, *, level: int = logging.INFO, **values: Any) -> None:
        """Add a line."""
        self._logger.log(level, event, extra={"values": values})

    def catch_others(self) -> None:
        """Let this log have the warnings of libraries too, which stay on stderr besides."""
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger().addHandler(self._handler)
        logging.captureWarnings(True)

    def close(self) -> None:
        """Let go of the file."""
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def logged(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of all processes that are still there, each file's in order, with the name of the file's process; what
    a kill has torn is left out.
    """
    for newest in sorted((folder / LOGS).glob("*.jsonl")):
        for path in (*(newest.with_name(f"{newest.name}.{age}") for age in range(KEPT, 0, -1)), newest):
            for line in path.read_bytes().splitlines() if path.is_file() else ():
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                yield newest.stem, values


class FollowedLogs:
    """The lines of all processes of a run, by time: each look gives what was added since the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / LOGS
        self._read: dict[int, int] = {}  # by the number of the file, which it keeps when it is renamed

    def new(self) -> list[dict[str, Any]]:
        """The lines that are new, by time; a line that is half there comes with a later look, and a torn one never."""
        found = [values for path in self._folder.glob("*.jsonl*") for values in self._added(path)]
        return sorted(found, key=lambda values: str(values.get("time", "")))

    def _added(self, path: Path) -> Iterator[dict[str, Any]]:
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                read = self._read.get(about.st_ino, 0)
                if read > about.st_size:  # the number of a file that is gone, given to a new one
                    read = 0
                file.seek(read)
                whole, newline, _torn = file.read().rpartition(b"\n")
        except FileNotFoundError:  # it was the oldest
            return
        self._read[about.st_ino] = read + len(whole) + len(newline)
        for line in whole.splitlines():
            with suppress(ValueError):
                yield json.loads(line)


class _Lines(logging.Formatter):
    """A record as a line."""

    def __init__(self, process: str, clock: Callable[[float], str] | None = None) -> None:
        super().__init__()
        self._process = process
        self._clock = clock or _utc

    def format(self, record: logging.LogRecord) -> str:
        own = getattr(record, "values", None)
        about: dict[str, Any] = {
            "time": self._clock(record.created),
            "process": self._process,
            "pid": record.process,
            "level": record.levelname.lower(),
        }
        if own is None:  # a library's
            return json.dumps({**about, "event": "library", "logger": record.name, "message": super().format(record)})
        return json.dumps(plain_values({**about, "event": record.getMessage(), **own}), default=str)


class _Rotating(RotatingFileHandler):
    """A file that is followed by a new one when it is long; a full disk stops neither the process nor the next line."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise  # a mistake of ours in what is logged
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}); this is said once\n")


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
