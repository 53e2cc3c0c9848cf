"""RunLog: what happened in a run, one JSON object a line, in ``log.jsonl`` of the run's folder.

Every line has ``event`` and ``time``; the other keys depend on the event:

=================  ====================================================================================================
``run_started``    ``name``, ``mode``, ``seed``, ``rounds``
``data``           ``card``: the data card; ``headline``: the metrics to look at first
``model``          ``shared_bytes``: what a plan carries; ``table_bytes``: the cloud's tables, which no client is sent
``resumed``        ``round``: from where; what was logged of later rounds no longer counts
``round``          ``round``, ``loss``, ``metrics``, ``clients``, ``dropped``, ``bytes_up``, ``bytes_down``,
                   ``seconds``; ``refused``, where there were such: how many updates did not count, by reason; and,
                   where they are known, ``device_seconds``, ``wasted_seconds``, ``late``, and ``staleness``: ``mean``
                   and ``max`` of the updates of an asynchronous round
``deadline``       ``round``, ``seconds``: from the next round on, ``why``
``evaluation``     ``round``, ``role``, ``label``, ``metrics``, ``cases``, ``users``
``baseline``       ``name``, ``role``, ``label``, ``metrics``
``checkpoint``     ``round``, ``path``
``index``          ``round``, ``name``, ``items``, ``recall``, ``at``, ``queries``, ``build_seconds``,
                   ``microseconds_a_query``, ``bytes``
``warning``        ``message``
``run_finished``   ``rounds``, ``seconds``, ``metrics``, ``report``
=================  ====================================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtower.core.errors import CheckpointError, StorageError, nearest

Event = Mapping[str, Any]

LOG = "log.jsonl"
RECIPE = "recipe.toml"


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class RunLog:
    """The log of one run folder. Lines are only ever added; each is in the file when :meth:`append` returns.

    Args:
        folder: The run's folder.
        clock: Gives the time that a line is stamped with.
    """

    folder: Path
    clock: Callable[[], datetime] = field(default=_now, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """``log.jsonl``."""
        return self.folder / LOG

    def append(self, event: str, **values: Any) -> None:
        """Add one line. What JSON has no number for (not a number, infinity) is written as null.

        Raises:
            StorageError: the file cannot be written.
        """
        line = json.dumps(plain_values({"event": event, "time": self.clock().isoformat(timespec="seconds"), **values}))
        try:
            # One write to a file opened for appending: lines of two writers do not mix, and a kill tears the last one
            # only.
            with self.path.open("ab+", buffering=0) as file:
                file.write(("" if self._ends_whole(file) else "\n").encode() + line.encode() + b"\n")
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror}); free some space or give a run folder that can be "
                "written, then `fedtower resume` goes on from the last checkpoint"
            ) from error

    def events(self) -> Iterator[Event]:
        """All events in order. A line that a kill has torn is left out.

        Raises:
            CheckpointError: there is no log, or it is not one of a run.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise CheckpointError(f"the log {self.path} cannot be read ({error.strerror}); {_HOLDS}") from error
        for line in lines:
            event = event_of(line)
            if event is not None:
                yield event

    def record(self) -> RunRecord:
        """What the log says once everything that was overtaken is left out.

        Of a round that was run twice, and of anything else that was said twice, the later line counts; of rounds after
        the one that a run was resumed from, none of the earlier lines does.
        """
        gathered = Gathered()
        for event in self.events():
            gathered.add(event)
        return gathered.record(self.folder)

    @staticmethod
    def _ends_whole(file: Any) -> bool:
        if not file.seek(0, 2):
            return True
        file.seek(-1, 2)
        return bool(file.read(1) == b"\n")


def event_of(line: bytes) -> Event | None:
    """The event of a line, if it is one and whole."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


class Gathered:
    """The events of a log that count, as far as they have been read."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Event] = {}

    def add(self, event: Event) -> None:
        """The next event: it may make earlier ones void."""
        kind = event["event"]
        if kind == "resumed":
            self._kept = {key: old for key, old in self._kept.items() if not _is_undone(old, event)}
        key = (kind, *(str(event.get(name)) for name in _SAME.get(kind, ())))
        self._kept.pop(key, None)
        self._kept[key] = event

    def record(self, folder: Path) -> RunRecord:
        """All of them, by what they are about."""
        of: dict[str, list[Event]] = {kind: [] for kind in _KINDS}
        for key, event in self._kept.items():
            of.setdefault(key[0], []).append(event)
        return RunRecord(
            folder=folder,
            started=of["run_started"][-1] if of["run_started"] else {},
            card=of["data"][-1].get("card", {}) if of["data"] else {},
            headline=tuple(of["data"][-1].get("headline", ())) if of["data"] else (),
            model=of["model"][-1] if of["model"] else {},
            rounds=tuple(sorted(of["round"], key=lambda event: event.get("round", 0))),
            evaluations=tuple(of["evaluation"]),
            baselines=tuple(of["baseline"]),
            checkpoints=tuple(of["checkpoint"]),
            index=of["index"][-1] if of["index"] else None,
            warnings=tuple(of["warning"]),
            resumed=tuple(of["resumed"]),
            finished=of["run_finished"][-1] if of["run_finished"] else None,
        )


class Followed:
    """The log of a run that goes on: each look reads what was added since the last one."""

    def __init__(self, log: RunLog) -> None:
        self._log, self._gathered, self._read = log, Gathered(), 0

    def record(self) -> RunRecord:
        """What counts of the log now; nothing of one that is not there yet."""
        try:
            with self._log.path.open("rb") as file:
                file.seek(self._read)
                whole, newline, _torn = file.read().rpartition(b"\n")
        except FileNotFoundError:
            whole = newline = b""
        self._read += len(whole) + len(newline)
        for event in map(event_of, whole.splitlines()):
            if event is not None:
                self._gathered.add(event)
        return self._gathered.record(self._log.folder)


@dataclass(frozen=True)
class RunRecord:
    """The events of a run that count, by what they are about; ``finished`` is ``None`` of a run that did not come to
    its end.
    """

    folder: Path
    started: Event
    card: Event
    headline: Sequence[str]
    model: Event
    rounds: Sequence[Event]
    evaluations: Sequence[Event]
    baselines: Sequence[Event]
    checkpoints: Sequence[Event]
    index: Event | None
    warnings: Sequence[Event]
    resumed: Sequence[Event]
    finished: Event | None

    @property
    def last_round(self) -> int:
        """The newest round that was finished, 0 before the first."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    def total(self, name: str) -> float:
        """The sum of one of the rounds' figures: ``bytes_up``, ``bytes_down``, ``seconds``, ``dropped``."""
        return sum(event.get(name) or 0 for event in self.rounds)

    @property
    def staleness(self) -> dict[str, float] | None:
        """How many versions behind updates were, ``mean`` and ``max``; nothing of a run whose rounds wait."""
        told = [(event["staleness"], event["clients"]) for event in self.rounds if event.get("staleness")]
        if not told:
            return None
        mean = sum(each["mean"] * clients for each, clients in told) / sum(clients for _, clients in told)
        return {"mean": round(mean, 3), "max": max(each["max"] for each, _ in told)}

    @property
    def row_selection(self) -> RowSelection | None:
        """What fetching rows saved; nothing of a run that sent nothing, or whose model has no tables."""
        sent, tables = self.total("bytes_down"), self.model.get("table_bytes", 0)
        if not sent or not tables:
            return None
        return RowSelection(sent / self.total("clients"), float(self.model["shared_bytes"] + tables))

    def first(self, metrics: Iterable[str]) -> list[str]:
        """Those of ``metrics`` that a reader looks at first: the run's headline, at any length of list.

        The first two where the log does not say.
        """
        names, kinds = list(metrics), {name.partition("@")[0] for name in self.headline}
        return [name for name in names if name.partition("@")[0] in kinds] or names[:2]

    def final(self, role: str = "test") -> list[Event]:
        """The newest evaluation of each protocol for ``role``."""
        newest = {event.get("label"): event for event in self.evaluations if event.get("role") == role}
        return list(newest.values())

    def summary(self) -> dict[str, Any]:
        """The run in one object, as ``summary.json`` holds it."""
        about = {name: self.started.get(name) for name in ("name", "mode", "seed")}
        return {
            **about,
            "rounds": self.last_round,
            "seconds": self.total("seconds"),
            "bytes_up": self.total("bytes_up"),
            "bytes_down": self.total("bytes_down"),
            "dropped": self.total("dropped"),
            **{name: self.total(name) for name in ("device_seconds", "wasted_seconds", "late") if self.total(name)},
            **({} if self.staleness is None else {"staleness": self.staleness}),
            **({} if self.row_selection is None else {"row_selection": self.row_selection.to_dict()}),
            "evaluations": [_bare(event) for role in ("validation", "test") for event in self.final(role)],
            "baselines": [_bare(event) for event in self.baselines],
            **({} if self.index is None else {"index": _bare(self.index)}),
        }


@dataclass(frozen=True)
class RowSelection:
    """Bytes down to one client in one visit: as it was, with the rows that it needs, and as it would have been with
    the whole tables.
    """

    bytes_down: float
    with_tables: float

    @property
    def times_as_much(self) -> float:
        """How many times as much the whole tables would have been."""
        return self.with_tables / self.bytes_down

    def to_dict(self) -> dict[str, float]:
        """The three figures, as ``summary.json`` holds them."""
        down, whole = round(self.bytes_down), round(self.with_tables)
        return {"bytes_down_a_visit": down, "with_whole_tables": whole, "times_as_much": round(self.times_as_much, 3)}


_HOLDS = "a run folder is what `fedtower run` makes: it holds log.jsonl, recipe.toml, environment.json and checkpoints/"


def open_run(folder: str | Path) -> RunLog:
    """The log of an existing run.

    Raises:
        CheckpointError: ``folder`` is not a run folder; the message says what one holds, and which are near.
    """
    folder = Path(folder)
    if (folder / LOG).is_file():
        return RunLog(folder)
    runs = sorted({*_runs_in(folder), *_runs_in(folder.parent), *_runs_in(Path("runs"))}, key=str)
    names = {run.name: run for run in runs}
    what = "is not a run folder" if folder.is_dir() else "does not exist" if not folder.exists() else "is a file"
    close = nearest(folder.name, names)
    there = f"; runs nearby are {', '.join(str(run) for run in runs[-5:])}" if runs else "; there are no runs nearby"
    raise CheckpointError(f"{folder} {what}{close}; {_HOLDS}{there}")


def _runs_in(folder: Path) -> list[Path]:
    try:
        return [child for child in folder.iterdir() if (child / LOG).is_file()]
    except OSError:
        return []


# What makes two events of a kind the same thing said twice.
_SAME = {
    "resumed": ("round", "time"),
    "round": ("round",),
    "evaluation": ("round", "role", "label"),
    "baseline": ("name", "role", "label"),
    "checkpoint": ("round",),
    "deadline": ("round",),
    "index": (),
    "warning": ("message",),
}
_KINDS = ("run_started", "data", "model", *_SAME, "run_finished")


def _is_undone(event: Event, resumed: Event) -> bool:
    """Whether going back to the round of ``resumed`` makes ``event`` void."""
    if event["event"] in ("round", "evaluation", "checkpoint", "deadline", "index"):
        return bool(event.get("round", 0) > resumed.get("round", 0))
    return bool(event["event"] == "run_finished")


def _bare(event: Event) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("event", "time")}


def plain_values(value: Any) -> Any:
    """``value`` as JSON can hold it: numpy's numbers as Python's, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
