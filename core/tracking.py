"""Tracking: the names under which trackers record a run's figures, the same whatever they write to.

A tracker is a part that is told about a run through the *observe* hooks (:class:`fedtower.core.hooks.Observing`): a
dataclass of settings with a marked method for each hook it has a use for. What it keeps open is made in
``run_started``, which is called again when a run is resumed, then with a folder that holds what was recorded before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedtower.core.round import RoundReport

_COSTS = ("clients", "dropped", "bytes_up", "bytes_down", "seconds")


class Measured(Protocol):
    """What the ``evaluated`` hook tells: the figures of one role, and by which protocol they came about."""

    @property
    def role(self) -> str: ...
    @property
    def protocol_label(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


def round_figures(report: RoundReport) -> dict[str, float]:
    """The figures of a round by name; those that are not a number are left out.

    >>> from fedtower.core.round import RoundReport
    >>> report = RoundReport(1, 9, loss=0.7, clients=3, dropped=1, bytes_up=80, bytes_down=90, seconds=0.5)
    >>> round_figures(report)["train/loss"], round_figures(report)["round/dropped"]
    (0.7, 1.0)
    """
    figures = {"train/loss": report.loss}
    figures |= {f"train/{name}": value for name, value in report.metrics.items()}
    figures |= {f"round/{name}": getattr(report, name) for name in _COSTS}
    figures |= {f"round/staleness {name}": value for name, value in report.staleness.items()}
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}


def evaluation_figures(subject: str, evaluation: Measured) -> dict[str, float]:
    """The figures of an evaluation by role, protocol and metric; those of a baseline have its name in front.

    >>> from types import SimpleNamespace
    >>> judged = SimpleNamespace(role="test", protocol_label="full ranking", metrics={"HR@10": 0.5})
    >>> evaluation_figures("model", judged), evaluation_figures("ItemPop", judged)
    ({'test (full ranking)/HR@10': 0.5}, {'ItemPop test (full ranking)/HR@10': 0.5})
    """
    of = "" if subject == "model" else f"{subject} "
    where = f"{of}{evaluation.role} ({evaluation.protocol_label})"
    return {f"{where}/{name}": float(value) for name, value in evaluation.metrics.items() if math.isfinite(value)}
