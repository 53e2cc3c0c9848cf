"""Parity of two runs: whether they came to the same, a deployed one and the simulation of its clients above all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import list_checkpoints, read_checkpoint
from fedtower.core.errors import CheckpointError
from fedtower.recsys.parity import TOLERANCES, distance
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import open_run

_KEPT_BY_CLIENTS = "clients"  # of a deployed run it is on the devices


@dataclass(frozen=True)
class Difference:
    """How far ``what`` of one run, so many numbers, is from the other's: of the value, or absolutely below 1."""

    what: str
    numbers: int
    distance: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it is near enough."""
        return self.distance <= self.allowed

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.distance:
            return "the same bits"
        return "equal" if self.holds else "beyond its tolerance"


def compare(folder: Path, other: Path) -> tuple[int, list[Difference]]:
    """The newest round of which both runs have a checkpoint, and how far they are apart there; and in the metrics that
    both have of their test items, if these are of that round.

    Raises:
        CheckpointError: there is no such round, or the runs are of different models.
    """
    runs = [RunFolder.open(folder), RunFolder.open(other)]
    rounds = [set(list_checkpoints(run.checkpoints)) for run in runs]
    if not rounds[0] & rounds[1]:
        raise CheckpointError(
            f"{folder} and {other} have no checkpoint of the same round: there are {sorted(rounds[0])} and "
            f"{sorted(rounds[1])}; run one of them again with the other's rounds and checkpoint.every"
        )
    round = max(rounds[0] & rounds[1])
    allowed = TOLERANCES["round"][runs[0].recipe().local.optimizer]
    mine, theirs = (_grouped(read_checkpoint(run.checkpoints, round)) for run in runs)
    return round, [*_states(mine, theirs, allowed), *_metrics(folder, other, round, allowed)]


def _states(
    one: Mapping[str, dict[str, NDArray[Any]]], other: Mapping[str, dict[str, NDArray[Any]]], allowed: float
) -> Iterator[Difference]:
    for group in sorted({*one, *other}):
        mine, theirs = one.get(group, {}), other.get(group, {})
        if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
            raise CheckpointError(
                f"the checkpoints hold different {group}, so the runs are of different models or optimisers: "
                f"{sorted(mine)} and {sorted(theirs)}"
            )
        off = max((distance(value, theirs[name]) for name, value in mine.items()), default=0.0)
        yield Difference(group, sum(value.size for value in mine.values()), off, allowed)


def _metrics(folder: Path, other: Path, round: int, allowed: float) -> Iterator[Difference]:
    """The figures by the recipe's protocol, which comes first."""
    mine, theirs = (_judged(run, round) for run in (folder, other))
    for name in (name for name in mine if name in theirs):
        yield Difference(f"test {name}", 1, distance(np.array(mine[name]), np.array(theirs[name])), allowed)


def _judged(folder: Path, round: int) -> Mapping[str, float]:
    """What a run says of the model after a round, if it says anything."""
    for event in open_run(folder).record().final("test")[:1]:
        if event["round"] == round:
            return dict(event["metrics"])
    return {}


def _grouped(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    """The arrays of a checkpoint by what they belong to."""
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for name, value in arrays.items():
        group = name.partition("/")[0]
        if group not in ("round", _KEPT_BY_CLIENTS):
            groups.setdefault(group, {})[name] = value
    return groups
