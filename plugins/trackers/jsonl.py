"""JSON lines: the log of a run, in ``log.jsonl`` of its folder. Every run has this tracker.

What the lines hold is in :mod:`fedtower.recsys.runlog`, which also reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtower.core.errors import FedtowerError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.recsys.runlog import RunLog

if TYPE_CHECKING:  # for the signatures only: every command line imports this module, to find what it offers
    from fedtower.core.recipe import Recipe
    from fedtower.core.round import RoundReport
    from fedtower.recsys.evaluation import Evaluation


@dataclass(eq=False)
class JSONLines:
    """A line for the start of a run, each round, evaluation and checkpoint, and its end, written when it happens."""

    _log: RunLog | None = field(default=None, init=False, repr=False)

    @hookimpl
    def run_started(self, recipe: Recipe, folder: Path) -> None:
        self._log = RunLog(folder)
        # A resumed run has its first line already.
        if not (self._log.path.exists() and self._log.record().started):
            self._log.append("run_started", name=recipe.name, mode=recipe.mode, seed=recipe.seed, rounds=recipe.planned)

    @hookimpl
    def run_resumed(self, round: int) -> None:
        self._append("resumed", round=round)

    @hookimpl
    def data_loaded(self, card: Mapping[str, Any], headline: tuple[str, ...]) -> None:
        self._append("data", card=card, headline=headline)

    @hookimpl
    def model_built(self, shared_bytes: int, table_bytes: int) -> None:
        self._append("model", shared_bytes=shared_bytes, table_bytes=table_bytes)

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        self._append(
            "round",
            round=report.round,
            loss=report.loss,
            metrics=report.metrics,
            clients=report.clients,
            dropped=report.dropped,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            seconds=round(report.seconds, 6),
            **({"examples": report.examples} if report.examples else {}),
            **({"refused": dict(report.refused)} if report.refused else {}),
            **({"staleness": dict(report.staleness)} if report.staleness else {}),
            **({"late": report.late} if report.late else {}),
            **_device_time(report),
        )

    @hookimpl
    def deadline_changed(self, round: int, seconds: float, why: str) -> None:
        self._append("deadline", round=round, seconds=seconds, why=why)

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Evaluation) -> None:
        figures = {"label": evaluation.protocol_label, "metrics": evaluation.metrics}
        counts = {"cases": evaluation.cases, "users": evaluation.users}
        if subject == "model":
            self._append("evaluation", round=round, role=evaluation.role, **figures, **counts)
        else:
            self._append("baseline", name=subject, role=evaluation.role, **figures, **counts)

    @hookimpl
    def checkpoint_written(self, round: int, path: Path) -> None:
        log = self._opened()
        inside = path.relative_to(log.folder) if path.is_relative_to(log.folder) else path
        self._append("checkpoint", round=round, path=str(inside))

    @hookimpl
    def index_built(self, round: int, figures: Mapping[str, Any]) -> None:
        self._append("index", round=round, **figures)

    @hookimpl
    def warned(self, message: str) -> None:
        self._append("warning", message=message)

    @hookimpl
    def run_finished(self, summary: Mapping[str, Any]) -> None:
        self._append("run_finished", **{key: value for key, value in summary.items() if key not in ("event", "time")})

    def _append(self, event: str, **values: Any) -> None:
        self._opened().append(event, **values)

    def _opened(self) -> RunLog:
        if self._log is None:
            raise FedtowerError("the log has no folder yet: run_started comes before everything else")
        return self._log


def _device_time(report: RoundReport) -> dict[str, float]:
    """What the round took of its devices, where that is known."""
    if not report.device_seconds:
        return {}
    return {"device_seconds": round(report.device_seconds, 3), "wasted_seconds": round(report.wasted_seconds, 3)}


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.tracker(
        "jsonl", "fedtower.plugins.trackers.jsonl:JSONLines", summary="log.jsonl in the run's folder; always on"
    )
