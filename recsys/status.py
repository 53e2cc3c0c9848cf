"""Status: how a served run stands, read from its folder, while it runs or afterwards.

The table and the page of a status show the same object, and ``--json`` and ``/status.json`` are it:

==============  ======================================================================================================
``name``        the recipe's; ``folder`` is the run's
``at``          when this was read, UTC
``phase``       one of :data:`PHASES`, and ``words`` say it to people
``round``       the newest round that is done; ``rounds`` is how many there are to be
``devices``     ``there``: that called lately; ``needed``: before a round begins
``open``        the windows that are open: ``round``, ``task``, ``clients``, ``target``, ``accepted``, ``seconds_left``
``clients``     updates that counted in rounds; ``dropped``: of cohorts, how many did not, by reason
``refusals``    calls and updates refused at the public port, by reason
``leases``      given out, by task; ``acknowledged``: updates, by task; ``duplicates``: sent again
``bytes_up``    bytes of updates that came whole; ``bytes_down``: of artefacts and rows
``work``        of devices in training, as rounds that are done tell: ``seconds``, of that ``wasted``, and how many
                visits were ``late``
``loss``        of the newest round, and ``evaluation`` the newest: ``round``, ``role``, ``label``, ``metrics``
``curves``      by name, points ``[round, value]`` from left to right, at most 200, neighbours as their mean
``windows``     the newest of the journal: ``round``, ``task``, ``state``, ``accepted``, ``reason``
``processes``   ``name``, ``pid``, ``alive``, ``since``
``page``        where the live page is; empty when nobody serves it
``trouble``     why something of this could not be read; empty otherwise
==============  ======================================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtower.core.checking import Reason
from fedtower.core.errors import FedtowerError
from fedtower.core.journal import Journal, RoundRecord
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.recsys.chart import MOST_POINTS, Point, thin
from fedtower.recsys.line import DeployedTransport, Standing, Waiting
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import Followed, RunLog, RunRecord
from fedtower.recsys.running import Running, running_of

PHASES = {
    "starting": "the data and the model are being loaded",
    "waiting": "waiting for devices",
    "open": "a round is open",
    "folding": "a round is being folded",
    "evaluating": "devices evaluate",
    "between": "between two rounds",
    "restarting": "a process is being started again",
    "stopped": "nobody serves it",
    "finished": "all is done",
}
SILENT = "sent no update in time"
_WINDOWS = 8


@dataclass(frozen=True)
class Status:
    """How a served run stands; the module says what each is."""

    name: str
    folder: str
    at: str
    phase: str
    words: str
    round: int
    rounds: int
    devices: Mapping[str, int]
    open: Sequence[Waiting]
    clients: int
    dropped: Mapping[str, int]
    refusals: Mapping[str, int]
    leases: Mapping[str, int]
    acknowledged: Mapping[str, int]
    duplicates: int
    bytes_up: int
    bytes_down: int
    work: Mapping[str, float]
    loss: float | None
    evaluation: Mapping[str, Any] | None
    curves: Mapping[str, Sequence[Point]]
    windows: Sequence[Mapping[str, Any]]
    processes: Sequence[Mapping[str, Any]]
    page: str
    trouble: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _now() -> datetime:
    return datetime.now(UTC)


class Watched:
    """A served run that is looked at, once or again and again.

    Args:
        folder: The run's folder.
        registry: The plugins: the recipe's transport and journal are among them.
        journal: The run's journal, where it is open already; otherwise it is opened, and closed by :meth:`close`.
        clock: Gives the time that a status is stamped with.

    Raises:
        CheckpointError: the folder is not one of a run that was served.
    """

    def __init__(
        self,
        folder: RunFolder,
        registry: Registry,
        journal: Journal | None = None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._folder, self._registry, self._clock = folder, registry, clock
        self._federation = folder.federation()
        self._recipe: Recipe = folder.recipe()
        self._transport: DeployedTransport = registry.make("transport", self._recipe.transport, path="transport")
        self._journal, self._lent = journal, journal is not None
        self._log = Followed(RunLog(folder.path))

    def status(self) -> Status:
        """How it stands now. What cannot be read is left out, and said."""
        record, running = self._log.record(), running_of(self._folder.path)
        windows, trouble = self._windows()
        asynchronous, size = self._recipe.asynchronous, self._recipe.cohort.asked.settings.get("size")
        wanted = size if asynchronous is None else asynchronous.buffer
        standing = self._transport.standing(self._folder.path, windows, wanted)
        phase = _phase(record, running, windows, standing, self._folder.path)
        evaluation = record.evaluations[-1] if record.evaluations else None
        counts = standing.counts
        return Status(
            name=self._recipe.name,
            folder=str(self._folder.path),
            at=self._clock().isoformat(timespec="milliseconds"),
            phase=phase,
            words=_words(phase, standing),
            round=record.last_round,
            rounds=self._recipe.rounds,
            devices={"there": standing.there, "needed": standing.needed},
            open=standing.open,
            clients=int(record.total("clients")),
            dropped=_dropped(record),
            refusals=counts.refusals,
            leases=counts.leases,
            acknowledged=counts.acknowledged,
            duplicates=counts.duplicates,
            bytes_up=counts.bytes_up,
            bytes_down=counts.bytes_down,
            work=_work(record),
            loss=record.rounds[-1].get("loss") if record.rounds else None,
            evaluation=evaluation and {name: evaluation.get(name) for name in ("round", "role", "label", "metrics")},
            curves=_curves(record),
            windows=[_window(each) for each in windows[-_WINDOWS:]],
            processes=[_process(each) for each in running],
            page=page_of(self._folder.path) if any(each.is_alive for each in running) else "",
            trouble=trouble,
        )

    def close(self) -> None:
        """Let go of the journal, if it was opened here."""
        if self._journal is not None and not self._lent:
            self._journal.close()
            self._journal = None

    def _windows(self) -> tuple[list[RoundRecord], str]:
        """The journal's windows, or why they cannot be read."""
        try:
            if self._journal is None:
                make = self._registry.make("journal", self._recipe.journal, path="journal")
                self._journal = make.open(self._folder.path / "journal", self._federation.name)
            # Devices evaluate what came of a round's training.
            return sorted(self._journal.rounds(), key=lambda each: (each.round, each.task != "train")), ""
        except FedtowerError as error:
            return [], f"the journal cannot be read: {error}"


def page_of(folder: Path) -> str:
    """The address of a run's live page, as its intake wrote it; empty where it serves none."""
    try:
        return str(json.loads((folder / "intake.json").read_text(encoding="utf-8"))["page"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _phase(
    record: RunRecord, running: Sequence[Running], windows: Sequence[RoundRecord], standing: Standing, folder: Path
) -> str:
    """One of :data:`PHASES`."""
    alive = {each.name: each for each in running if each.is_alive}
    if record.finished is not None:
        return "finished"
    if not alive:
        return "stopped"
    if any(window.state == "open" for window in windows):
        return "evaluating" if all(window.task == "evaluate" for window in standing.open) else "open"
    if not {"intake", "table"} <= alive.keys():
        return "restarting"
    if not _is_loaded(record, alive["table"]):
        return "starting"
    if any(window.state == "closed" for window in windows):
        return "folding"
    return "waiting" if standing.there < standing.needed else "between"


def _is_loaded(record: RunRecord, table: Running) -> bool:
    """Whether this table process, and not one before it, has said what its model is."""
    said = record.model.get("time")
    return said is not None and datetime.fromisoformat(said) >= table.since.replace(microsecond=0)


def _words(phase: str, standing: Standing) -> str:
    """The phase, with the figures that belong to it."""
    if phase == "waiting":
        return f"waiting for devices: {standing.there} of {standing.needed} are there"
    for each in standing.open if phase in ("open", "evaluating") else ():
        what = f"round {each.round} is open" if each.task == "train" else "devices evaluate"
        return f"{what}: {each.accepted} of {each.target} have answered, {each.seconds_left:.0f} s left"
    return PHASES[phase]


def _dropped(record: RunRecord) -> dict[str, int]:
    """Of the cohorts of all rounds, how many clients did not count, by reason."""
    refused: Counter[str] = Counter()
    for event in record.rounds:
        refused.update({name: int(count) for name, count in (event.get("refused") or {}).items()})
    for none_of_the_cohort in (Reason.NOT_ASKED, Reason.REPEATED):
        del refused[none_of_the_cohort.value]
    silent = int(record.total("dropped")) - sum(refused.values())
    named = {f"refused: {name}": count for name, count in refused.most_common()}
    return {SILENT: silent, **named} if silent > 0 else named


def _work(record: RunRecord) -> dict[str, float]:
    """What training took of the devices."""
    seconds, wasted = (round(record.total(f"{name}_seconds"), 3) for name in ("device", "wasted"))
    return {"seconds": seconds, "wasted": wasted, "late": int(record.total("late"))}


def _curves(record: RunRecord) -> dict[str, list[Point]]:
    """The loss of rounds, and the first metrics of evaluations on validation items."""
    curves = {"training loss": [(event["round"], event["loss"]) for event in record.rounds if event.get("loss")]}
    judged = [event for event in record.evaluations if event.get("role") == "validation"]
    for name in record.first(dict.fromkeys(name for event in judged for name in event.get("metrics", {}))):
        points = [(event["round"], event["metrics"].get(name)) for event in judged]
        curves[f"validation {name}"] = [(x, y) for x, y in points if y is not None]
    return {name: thin(points, MOST_POINTS) for name, points in curves.items() if points}


def _window(record: RoundRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("round", "task", "state", "accepted", "reason")}


def _process(running: Running) -> dict[str, Any]:
    since = running.since.isoformat(timespec="seconds") if running.is_alive else None
    return {"name": running.name, "pid": running.pid, "alive": running.is_alive, "since": since}
