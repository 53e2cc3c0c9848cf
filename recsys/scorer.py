"""ModelScorer: a trained model as evaluation and recommendation see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedtower.recsys.history import Moment, Population, Split, look_back
from fedtower.recsys.learned import Learned
from fedtower.recsys.step import pure

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

# Cases are computed so many at a time, the last tile padded: each case goes through kernels of the same shapes, and
# its bits do not depend on how many others are asked for.
TILE = 64


@dataclass(frozen=True)
class ModelScorer:
    """Scores by the parameters given: towers, the cloud's rows, and what the clients keep.

    ``moment`` says what a history may hold: see :func:`fedtower.recsys.history.look_back`.
    """

    learned: Learned
    population: Population
    split: Split
    history_length: int
    moment: Moment

    @cached_property
    def _catalogue(self) -> Tensor:
        """All item rows, (I, W)."""
        return self.learned.fetch(np.arange(self.population.num_items, dtype=np.int64))

    def vectors(self, clients: IntArray, cut: IntArray) -> FloatArray:
        """The user vector of each case, (M, D), from the events before its cut."""
        return np.concatenate([vectors[:count].numpy() for vectors, count in self._vectors(clients, cut)])

    def score(self, clients: IntArray, cut: IntArray, candidates: IntArray) -> FloatArray:
        """Scores (M, N) of the candidates (M, N), where -1 is padding and scores minus infinity."""
        out = np.empty(candidates.shape, dtype=np.float32)
        rate = vmap(pure(self.learned.declared.shared, "score"), in_dims=(None, 0, 0))
        start = 0
        for vectors, count in self._vectors(clients, cut):
            wanted = np.zeros((TILE, candidates.shape[1]), dtype=np.int64)
            wanted[:count] = np.maximum(candidates[start : start + count], 0)
            with torch.no_grad():
                scores = rate(self.learned.shared(), vectors[:, None], self._catalogue[torch.from_numpy(wanted)])
            out[start : start + count] = scores[:count, 0].numpy()
            start += count
        return np.where(candidates < 0, np.float32(-np.inf), out)

    def score_all(self, clients: IntArray, cut: IntArray) -> FloatArray:
        """Scores (M, I) of the whole catalogue."""
        rate = pure(self.learned.declared.shared, "score")
        with torch.no_grad():
            tiles = [
                rate(self.learned.shared(), vectors, self._catalogue)[:count].numpy()
                for vectors, count in self._vectors(clients, cut)
            ]
        return np.concatenate(tiles) if tiles else np.zeros((0, self.population.num_items), dtype=np.float32)

    def _vectors(self, clients: IntArray, cut: IntArray) -> Iterator[tuple[Tensor, int]]:
        """User vectors in tiles (TILE, D), and how many of each are real."""
        # vmap pairs the entries of two dictionaries by their order, not by their keys: both begin with the shared ones.
        axes = {**dict.fromkeys(self.learned.parameters), **dict.fromkeys(self.learned.declared.on_device, 0)}
        represent = vmap(pure(self.learned.declared.shared, "represent"), in_dims=(axes, 0, 0, 0))
        for start in range(0, len(clients), TILE):
            count = min(TILE, len(clients) - start)
            at = np.minimum(np.arange(start, start + TILE), len(clients) - 1)
            items, length = look_back(
                self.population, self.split, self.moment, clients[at], cut[at], self.history_length
            )
            user = torch.from_numpy(self.population.user_features(clients[at]))
            with torch.no_grad():
                yield (
                    represent(
                        {**self.learned.shared(), **self.learned.own(clients[at])},
                        self._catalogue[torch.from_numpy(items)],
                        torch.from_numpy(length)[:, None],
                        user,
                    )[:, 0],
                    count,
                )
