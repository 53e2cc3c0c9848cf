"""The states of tables and optimisers as arrays by name, and back: in memory, or in a folder that many processes
wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fedtower.core.errors import CheckpointError

Arrays = Mapping[str, NDArray[Any]]


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, NDArray[Any]]:
    """The state of a torch optimiser as arrays, named ``position/moment``."""
    states = optimizer.state_dict()["state"]
    return {f"{position}/{name}": copied(value) for position, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: Arrays) -> None:
    """Give an optimiser the state that :func:`optimizer_arrays` took; its learning rate stays."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        position, _, moment = name.partition("/")
        state.setdefault(int(position), {})[moment] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def copied(value: Tensor) -> NDArray[Any]:
    """A tensor's values, copied to numpy."""
    out: NDArray[Any] = value.detach().cpu().numpy().copy()
    return out


def taken(arrays: Arrays, name: str, shape: torch.Size | None = None) -> NDArray[Any]:
    """The array of that name.

    Raises:
        CheckpointError: there is none, or it has another shape.
    """
    if name not in arrays:
        raise CheckpointError(f"the checkpoint holds no {name!r}: it belongs to another model, or to an older fedtower")
    if shape is not None and tuple(arrays[name].shape) != tuple(shape):
        raise _other_shape(name, arrays[name].shape, shape)
    return arrays[name]


def save_sharded(folder: Path, states: Mapping[str, Any]) -> None:
    """Write the shards of all processes into ``folder``; every process calls it.

    Raises:
        OSError: what the disk said to any of them.
    """
    try:
        save(dict(states), checkpoint_id=folder)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def load_sharded(folder: Path, states: Mapping[str, Any], *, alone: bool) -> None:
    """Fill tensors, however they are sharded by now, from what :func:`save_sharded` wrote.

    ``alone`` is one process by itself; else every process calls it. The folder is checked against the checkpoint's
    manifest before: it is not to be read otherwise, because its index is a pickle.

    Raises:
        CheckpointError: the folder holds the tables of another model.
    """
    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, value in states.items():
        if name not in held:
            raise CheckpointError(f"the checkpoint's {folder.name} hold no {name!r}: they belong to another model")
        there = getattr(held[name], "size", None)
        if there is None or tuple(there) != tuple(value.size()):
            raise _other_shape(name, () if there is None else tuple(there), value.size())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what alone says
        load(dict(states), checkpoint_id=folder, no_dist=alone)


def _other_shape(name: str, there: tuple[int, ...], here: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {name!r} has shape {tuple(there)}, but this model has {tuple(here)}; was it written by "
        f"another recipe?"
    )
