"""A run's index: built from its items' vectors when the training ends, judged against all items scored, and saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from fedtower.core.errors import RecipeError
from fedtower.core.recipe import Part, Recipe
from fedtower.core.registry import Registry
from fedtower.recsys.evaluation import Cases, make_cases
from fedtower.recsys.learned import Learned
from fedtower.recsys.models import InnerProduct
from fedtower.recsys.retrieval import Index, IndexBuilder, exact_search, recall
from fedtower.recsys.step import pure
from fedtower.recsys.tasks import Histories, Task

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

RECALL_AT = 10
MOST_QUERIES = 1_000
"""Of the users with a test item, so many are looked up to judge an index: the standard error of recall is below .01."""

_ADVICE = (
    "It is the index of the run's items: `fedtower recommend RUN --exact` does without it, and `fedtower resume RUN` "
    "builds it again from the last checkpoint."
)


@dataclass(frozen=True)
class IndexFigures:
    """What an index costs and finds: ``recall`` is the share of the ``at`` best items of all that are in its list."""

    name: str
    items: int
    recall: float
    at: int
    queries: int
    build_seconds: float
    microseconds_a_query: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """What is logged."""
        return asdict(self)


@dataclass(frozen=True)
class RunIndex:
    """What a run's index is built by: the part of the recipe that says so, or ``exact``."""

    name: str
    builder: IndexBuilder

    def build(self, task: Histories, learned: Learned, clock: Callable[[], float]) -> tuple[Index, IndexFigures]:
        """The index of all items, and its figures; the queries are the users of test items, as they are just before."""
        keys = keys_of(learned, task.schema.num_items)
        ids = np.arange(len(keys), dtype=np.int64)
        began = clock()
        index = self.builder.build(keys, ids, task.draws)
        built = clock()
        asked, at = _test_queries(task, learned), min(RECALL_AT, len(keys))
        truth = exact_search(keys, asked, at)[0]
        asking = clock()
        found, _ = index.search(asked, at)
        answered = clock()
        figures = IndexFigures(
            name=self.name,
            items=len(keys),
            recall=recall(found, truth),
            at=at,
            queries=len(asked),
            build_seconds=round(built - began, 6),
            microseconds_a_query=round(1e6 * (answered - asking) / max(len(asked), 1), 3),
            bytes=sum(array.nbytes for array in index.snapshot().values()),
        )
        return index, figures

    def save(self, folder: Path, round: int, index: Index) -> None:
        """Write the index of this round's model, whole or not at all; that of an earlier round is removed."""
        write_checkpoint(folder, round, index.snapshot(), keep=1)

    def saved(self, folder: Path, round: int) -> Index | None:
        """The index of this round's model; ``None`` when there is none, as of a run that was interrupted.

        Raises:
            CheckpointError: it is damaged, or was built by another part.
        """
        if round not in list_checkpoints(folder):
            return None
        return self.builder.restore(read_checkpoint(folder, round, _ADVICE))


def index_of(recipe: Recipe, registry: Registry, task: Task, learned: Learned) -> RunIndex | None:
    """What builds the index of this run: the recipe's ``[index]``; else ``exact`` where the model can have one.

    Raises:
        RecipeError: the recipe asks for an index, and the model's scores are no inner products.
    """
    able = isinstance(task, Histories) and isinstance(learned.declared.shared, InnerProduct)
    if recipe.index is not None and not able:
        raise RecipeError(
            f"index.name = {recipe.index.name!r} cannot be built: an index finds the largest inner product of a user's "
            f"vector and an item's, and the scores of the model {recipe.model.name!r} are none (it has no "
            f"queries() and keys()); leave [index] out, or choose another model.name, such as dssm"
        )
    if not able:
        return None
    part = recipe.index or Part("exact")
    return RunIndex(part.name, registry.make("index", part, path="index"))


def keys_of(learned: Learned, num_items: int) -> FloatArray:
    """What an index holds of each item, ``(I, E)``."""
    rows = learned.fetch(np.arange(num_items, dtype=np.int64))
    with torch.no_grad():
        keys: FloatArray = pure(learned.declared.shared, "keys")(learned.shared(), rows).numpy()
    return keys


def queries_of(learned: Learned, vectors: FloatArray) -> FloatArray:
    """User vectors ``(B, D)`` as an index is asked with them, ``(B, E)``."""
    with torch.no_grad():
        asked: FloatArray = pure(learned.declared.shared, "queries")(
            learned.shared(), torch.from_numpy(vectors)
        ).numpy()
    return asked


def _test_queries(task: Histories, learned: Learned) -> FloatArray:
    """The users of test items, in a random order until there are :data:`MOST_QUERIES`, as they are before each."""
    order = task.draws.permutation(task.num_clients, "index/queries")[: 2 * MOST_QUERIES]
    cases: Cases = make_cases(task.population, task.split, np.sort(order), "test")
    vectors = task.scorer(learned, "test").vectors(cases.clients[:MOST_QUERIES], cases.cut[:MOST_QUERIES])
    return queries_of(learned, vectors)
