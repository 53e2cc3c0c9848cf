"""The table process of a deployed run: ``python -m fedtower.recsys.table_process RUN``; `fedtower serve` starts it."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedtower.core.cohort import Cohort
from fedtower.core.errors import FedtowerError
from fedtower.core.garbage import begin_program, undisturbed
from fedtower.core.hooks import hookimpl
from fedtower.core.round import RoundReport
from fedtower.recsys.display import Display
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.process_log import ProcessLog
from fedtower.recsys.tether import end_with_starter

_MOST_CLIENTS = 100  # of whom a line says that they dropped out


@dataclass(frozen=True)
class Logged:
    """Writes what happens in the table process to its log."""

    log: ProcessLog

    @hookimpl
    def run_resumed(self, round: int) -> None:
        self.log.write("resumed", round=round)

    @hookimpl
    def round_started(self, round: int, cohort: Cohort) -> None:
        self.log.write("round_started", round=round, cohort=len(cohort))

    @hookimpl
    def update_refused(self, round: int, client: int, reason: str, words: str) -> None:
        self.log.write("refused", round=round, client=client, reason=reason, message=words)

    @hookimpl
    def client_dropped(self, round: int, clients: np.ndarray, reason: str) -> None:
        named = [int(client) for client in clients[:_MOST_CLIENTS]]
        self.log.write("dropped", round=round, count=len(clients), clients=named, reason=reason)

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        counts: dict[str, Any] = {"clients": report.clients, "dropped": report.dropped, "refused": dict(report.refused)}
        self.log.write("round_finished", round=report.round, loss=report.loss, seconds=report.seconds, **counts)

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Evaluation) -> None:
        figures: dict[str, Any] = {"role": evaluation.role, "cases": evaluation.cases, "metrics": evaluation.metrics}
        self.log.write("evaluated", round=round, subject=subject, **figures)

    @hookimpl
    def checkpoint_written(self, round: int, path: Path) -> None:
        self.log.write("checkpoint", round=round, path=str(path))

    @hookimpl
    def warned(self, message: str) -> None:
        self.log.write("warning", level=logging.WARNING, message=message)

    @hookimpl
    def run_finished(self, summary: Mapping[str, Any]) -> None:
        self.log.write("finished", rounds=summary.get("rounds"))


def main(arguments: list[str]) -> int:
    """Train to the end; the exit code."""
    parser = argparse.ArgumentParser(prog="fedtower table process")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--verbose", action="store_true")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    log = ProcessLog(asked.folder, "table")
    log.catch_others()
    log.write("started")
    end_with_starter()
    try:
        return _train(asked.folder, log, verbose=asked.verbose)
    finally:
        log.close()


def _train(folder: Path, log: ProcessLog, *, verbose: bool) -> int:
    """Train; what goes wrong is said to people, and written down."""
    try:
        with Display(Console(highlight=False), verbose=verbose) as display:
            begin_program()
            with undisturbed():  # it brings torch and the tables
                from fedtower.recsys.run import train_deployed
            train_deployed(folder, observers=[display, Logged(log)], progress=display.say)
    except FedtowerError as error:
        log.write("failed", level=logging.ERROR, message=str(error), exit_code=error.exit_code)
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        log.write("stopped")
        return 130
    except Exception as error:
        log.write("failed", level=logging.CRITICAL, message=f"{type(error).__name__}: {error}", exit_code=1)
        raise
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
