"""TensorBoard: a run's figures as event files, written with TensorBoard's own writer: no torch, no TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedtower.core.hooks import hookimpl
from fedtower.core.round import RoundReport
from fedtower.core.tracking import evaluation_figures, round_figures
from fedtower.recsys.evaluation import Evaluation


@dataclass(eq=False)
class TensorBoard:
    """Each figure of a round or an evaluation as a scalar at its round; look at them with ``tensorboard --logdir``."""

    folder: Path = field(
        default=Path("tensorboard"),
        metadata={"help": "where the event files go; a relative folder is one in the run's"},
    )
    _writer: EventFileWriter | None = field(default=None, init=False, repr=False)

    @hookimpl
    def run_started(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder / self.folder))

    @hookimpl
    def run_resumed(self, round: int) -> None:
        # It tells TensorBoard to forget what an earlier file says of this round and later ones.
        self._write(Event(step=round + 1, session_log=SessionLog(status=SessionLog.START)))

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        self._write_figures(report.round, round_figures(report))

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Evaluation) -> None:
        self._write_figures(round, evaluation_figures(subject, evaluation))

    @hookimpl
    def run_finished(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_figures(self, step: int, figures: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        if self._writer is None:
            raise RuntimeError("run_started, which opens the event file, comes before everything else")
        event.wall_time = time.time()
        self._writer.add_event(event)
        # What is not flushed is lost by a kill.
        self._writer.flush()
