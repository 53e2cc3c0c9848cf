"""Personal: the model as each client has it for itself, and what that is worth.

A federated model that is judged as it is sent out misses what a device makes of it before it uses it: parameters that
live there, and shared ones and rows that it tunes for itself (fine-tuning: Cheng et al., 2021,
https://arxiv.org/abs/2108.07313; personal item vectors: Zhang et al., 2023, https://www.ijcai.org/proceedings/2023/507),
or a copy of its own that it has trained all along (:mod:`fedtower.recsys.ditto`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedtower.recsys.history import look_back
from fedtower.recsys.learned import Learned
from fedtower.recsys.own_model import Personal, own_view
from fedtower.recsys.scorer import TILE, ModelScorer
from fedtower.recsys.step import pure

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def kept(learned: Learned, clients: IntArray) -> Personal:
    """The models that ``clients`` keep beside the shared one (:mod:`fedtower.recsys.ditto`), as they are."""
    copies = own_view({name: learned.store.read(name, clients) for name in learned.declared.on_device})
    fixed = {
        name: np.repeat(value[None], len(clients), axis=0)
        for name, value in learned.parameters.items()
        if name not in copies
    }
    none, width = np.zeros(len(clients) + 1, dtype=np.int64), learned.declared.cloud.width
    return Personal(clients, {**fixed, **copies}, none, none[:0], np.zeros((0, width), dtype=np.float32))


@dataclass(frozen=True)
class PersonalScorer(ModelScorer):
    """Scores of each client by its own model; a client's do not depend on who else is asked for."""

    tuned: Callable[[IntArray], Personal]

    def vectors(self, clients: IntArray, cut: IntArray) -> FloatArray:
        """The user vector of each case, (M, D)."""
        return np.concatenate([vectors[:count].numpy() for vectors, _, _, count in self._tiles(clients, cut)])

    def score(self, clients: IntArray, cut: IntArray, candidates: IntArray) -> FloatArray:
        """Scores (M, N) of the candidates (M, N), where -1 is padding and scores minus infinity."""
        out = np.empty(candidates.shape, dtype=np.float32)
        start = 0
        for vectors, personal, places, count in self._tiles(clients, cut):
            wanted = np.zeros((TILE, candidates.shape[1]), dtype=np.int64)
            wanted[:count] = np.maximum(candidates[start : start + count], 0)
            out[start : start + count] = self._rated(vectors, personal, places, wanted)[:count]
            start += count
        return np.where(candidates < 0, np.float32(-np.inf), out)

    def score_all(self, clients: IntArray, cut: IntArray) -> FloatArray:
        """Scores (M, I) of the whole catalogue."""
        everything = np.broadcast_to(np.arange(len(self._catalogue), dtype=np.int64), (TILE, len(self._catalogue)))
        rated = [
            self._rated(vectors, personal, places, everything)[:count]
            for vectors, personal, places, count in self._tiles(clients, cut)
        ]
        return np.concatenate(rated) if rated else np.zeros((0, len(self._catalogue)), dtype=np.float32)

    def _rated(self, vectors: Tensor, personal: Personal, places: IntArray, items: IntArray) -> FloatArray:
        """Scores (TILE, n) of ``items`` (TILE, n)."""
        rate = vmap(pure(self.learned.declared.shared, "score"))
        with torch.no_grad():
            scores: Tensor = rate(_at(personal, places), vectors[:, None], self._rows(personal, places, items))
        return scores[:, 0].numpy()

    def _tiles(self, clients: IntArray, cut: IntArray) -> Iterator[tuple[Tensor, Personal, IntArray, int]]:
        """User vectors in tiles (TILE, D), whose models they are and where those stand, and how many are real."""
        if not len(clients):
            return
        represent = vmap(pure(self.learned.declared.shared, "represent"))
        personal = self.tuned(np.unique(clients))
        for start in range(0, len(clients), TILE):
            count = min(TILE, len(clients) - start)
            at = np.minimum(np.arange(start, start + TILE), len(clients) - 1)
            items, length = look_back(
                self.population, self.split, self.moment, clients[at], cut[at], self.history_length
            )
            places = np.searchsorted(personal.clients, clients[at])
            user = torch.from_numpy(self.population.user_features(clients[at]))
            with torch.no_grad():
                vectors = represent(
                    _at(personal, places),
                    self._rows(personal, places, items),
                    torch.from_numpy(length)[:, None],
                    user,
                )[:, 0]
            yield vectors, personal, places, count

    def _rows(self, personal: Personal, places: IntArray, items: IntArray) -> Tensor:
        """The rows of ``items`` (M, n) as the clients at ``places`` have them, (M, n, W)."""
        rows = self._catalogue.numpy()[items]
        return torch.from_numpy(personal.overlay(places, items, rows))


def _at(personal: Personal, places: IntArray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[places]) for name, values in personal.parameters.items()}
