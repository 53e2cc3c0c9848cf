"""What every contestant of benchmarks/peers.py does: it trains a round when it is told to, and says when it is done.

A line of stdin is the number of a round, and a file for what the round's clients have learnt on average, or ``-``. This
file and its neighbours run in the peers' own environment: they know nothing of fedtower.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

Average = Mapping[str, NDArray[Any]]


def serve(train: Callable[[int], Average]) -> None:
    """Train rounds until stdin ends; ``train`` gives the mean delta by examples."""
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        number, path = line.split()
        average = train(int(number))
        if path != "-":
            arrays: dict[str, Any] = dict(average)
            np.savez(path, **arrays)
        print("done", file=answers, flush=True)


class Rounds:
    """The clients of each round with their batches in order, as they were drawn once for all contestants."""

    def __init__(self, path: str) -> None:
        with np.load(path) as held:
            arrays = dict(held)
        self.clients, self.offsets = arrays["clients"], arrays["offsets"]  # (R, C), (R * C + 1,)
        self.seen, self.chosen = arrays["seen"], arrays["chosen"]  # rows of vectors (E,), rows of items (E, 5)
        self.vectors, self.items = torch.from_numpy(arrays["vectors"]), torch.from_numpy(arrays["items"])
        self.lr, self.batch_size = float(arrays["lr"]), int(arrays["batch_size"])
        self.initial = {
            name.removeprefix("initial/"): torch.from_numpy(value)
            for name, value in arrays.items()
            if name.startswith("initial/")
        }

    def examples(self, place: int) -> tuple[Tensor, Tensor]:
        """The vectors (n, 64) and items (n, 5, 32) of one visit, ``place`` counted through all rounds."""
        here = slice(self.offsets[place], self.offsets[place + 1])
        return self.vectors[torch.from_numpy(self.seen[here])], self.items[torch.from_numpy(self.chosen[here])]


@cache
def rounds_of(path: str) -> Rounds:
    """The file, read once a process."""
    return Rounds(path)


class Tower(nn.Module):
    """The user tower 64-64-32, and the mean logistic loss of its products with five items, the first one chosen."""

    def __init__(self, initial: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)
        self.load_state_dict(dict(initial))

    def loss(self, vectors: Tensor, items: Tensor) -> Tensor:
        """The mean over the batch."""
        user = self.second(torch.relu(self.first(vectors)))
        scores = (items * user[:, None, :]).sum(dim=2)
        return (softplus(-scores[:, 0]) + softplus(scores[:, 1:]).sum(dim=1)).mean()


def prepared() -> str:
    """The data file, which is the program's first argument; one thread, as every contestant has."""
    torch.set_num_threads(1)
    return str(Path(sys.argv[1]).resolve())
