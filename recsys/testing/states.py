"""The whole state of a training, in memory or on disk, with what its clients keep as one array a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import read_attachments, read_checkpoint
from fedtower.core.segments import values_of
from fedtower.recsys.training import Training, under


def everything(training: Training) -> dict[str, NDArray[Any]]:
    """The snapshot of a training, and that of its clients."""
    return {**training.snapshot(), **under("clients", training.learned().store.snapshot())}


def saved(checkpoints: Path, round: int) -> dict[str, NDArray[Any]]:
    """What :func:`everything` gave when the checkpoint was written, however its clients lie in segments."""
    attached = read_attachments(checkpoints, round).get("clients")
    kept = {} if attached is None else _kept(attached)
    return {**read_checkpoint(checkpoints, round), **under("clients", kept)}


def _kept(place: Path) -> dict[str, NDArray[Any]]:
    arrays = {}
    for name, held in json.loads((place / "clients.json").read_text("utf-8")).items():
        newest: dict[int, Any] = {}
        for file in held["segments"]:
            for clients, values in values_of(place / file):
                newest |= dict(zip(clients.tolist(), values, strict=True))
        arrays[f"{name}.clients"] = np.array(sorted(newest), dtype=np.int64)
        arrays[f"{name}.values"] = np.array([newest[client] for client in sorted(newest)], dtype=np.float32)
    return arrays
