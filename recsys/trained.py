"""Trained: a model with the data it was trained on, which is measured and recommends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.index_of_run import index_of, queries_of
from fedtower.recsys.own_model import is_own
from fedtower.recsys.retrieval import Index, candidates
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.tasks import Histories, Ranking
from fedtower.recsys.training import Setting, Training

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

_TILE = 128


@dataclass(frozen=True)
class Recommendation:
    """One item of a list: its raw id, its title where the data has one, and its score."""

    item: str
    title: str | None
    score: float


@dataclass(frozen=True)
class Trained:
    """A trained model with its data."""

    setting: Setting
    training: Training
    folder: RunFolder

    @cached_property
    def index(self) -> Index | None:
        """The saved index of this model; ``None`` of a model that cannot have one, or when it was not saved.

        Raises:
            CheckpointError: it is damaged.
        """
        setting = self.setting
        by = index_of(setting.recipe, setting.registry, setting.task, self.training.learned())
        return None if by is None else by.saved(self.folder.index, self.folder.latest_round())

    def evaluate(self, protocol: Ranking | None = None) -> Evaluation:
        """Measure on the test data, by the recipe's protocol or, of histories, by the one given (``sampled``,
        ``full``).

        Raises:
            RecipeError: a part of the model is on devices.
        """
        self._refuse_in_part()
        return self.setting.task.judge(self.training.learned(), "test", protocol)

    def recommend(self, user: str, k: int = 10, *, exact: bool = False) -> list[Recommendation]:
        """The top ``k`` items for a user (a raw id), without those she has touched; fewer when there are not so
        many.

        The run's index finds candidates, and the model scores those; ``exact``, or without an index, it scores all.

        Raises:
            RecipeError: the run was on labelled examples, which have no items to recommend, or a part of the model is
                on devices.
            CheckpointError: the run's index is damaged.
        """
        population = self._histories().population
        return [
            Recommendation(population.item_name(int(item)), population.item_title(int(item)), float(score))
            for item, score in zip(*self.best(user, k, exact=exact), strict=True)
        ]

    def best(self, user: str, k: int, *, exact: bool = False) -> tuple[IntArray, FloatArray]:
        """The items of :meth:`recommend` by number, and their scores, both ``(K,)`` with K at most ``k``."""
        self._refuse_in_part()
        task, learned = self._histories(), self.training.learned()
        client = np.array([task.population.client_index(user)])
        events = task.population.events(client)
        scorer = task.scorer(learned, "now")
        seen, among = np.unique(events.items), None
        if not exact and self.index is not None:
            query = queries_of(learned, scorer.vectors(client, events.lengths))[0]
            among = candidates(self.index, query, seen, k, task.population.num_items)
        if among is None:
            items = np.arange(task.population.num_items, dtype=np.int64)
            scores = scorer.score_all(client, events.lengths)[0]
            scores[seen] = -np.inf
        else:
            # In tiles of one shape, so that a score does not depend on how many others are asked for.
            items = np.pad(np.sort(among), (0, -len(among) % _TILE), constant_values=-1)
            tiles = items.reshape(-1, _TILE)
            scores = scorer.score(client.repeat(len(tiles)), events.lengths.repeat(len(tiles)), tiles).reshape(-1)
        order = np.argsort(-scores, kind="stable")[:k]
        order = order[np.isfinite(scores[order])]
        return items[order], scores[order]

    def _refuse_in_part(self) -> None:
        """Raise RecipeError where scores need what each device of a served run has trained and kept."""
        own = [name for name in self.training.learned().declared.on_device if is_own(name)]
        if own and self.setting.recipe.mode == "deployed":
            raise RecipeError(
                f"{', '.join(own)} of this model lives on the devices that trained it, and nobody here has it: what "
                f"they said of the model is in `fedtower report {self.folder.path}`"
            )

    def _histories(self) -> Histories:
        task = self.setting.task
        if not isinstance(task, Histories):
            raise RecipeError(f"the data {task.card.name!r} holds labelled examples: there are no items to recommend")
        return task
