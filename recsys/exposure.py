"""Exposure: how often users are shown an item that attackers promote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtower.recsys.evaluation import Cases, Role, Scorer, case_batches
from fedtower.recsys.metrics import check_scores
from fedtower.recsys.population import Population
from fedtower.recsys.splits import Split

if TYPE_CHECKING:
    from fedtower.core.recipe import EvaluationSettings

IntArray = NDArray[np.int64]


def exposure(
    scorer: Scorer,
    population: Population,
    split: Split,
    role: Role,
    settings: EvaluationSettings,
    clients: IntArray,
    item: int,
) -> dict[str, float]:
    """ER@K for each K of the settings: of those of ``clients`` who never touched ``item``, the share that has it among
    the first K of all items that they did not touch; not a number where all of them have touched it.

    Zhang et al., 2022, https://arxiv.org/abs/2110.10926 (PipAttack). Lists are made at the moment of the cases of
    ``role``, one a case; ties count against the item.
    """
    batches = case_batches(population, split, clients, role, settings.batch_size)
    places = [_places(scorer, population, batch, item) for batch in batches]
    place = np.concatenate([np.zeros(0, dtype=np.int64), *places])
    return {f"ER@{k}": float(np.mean(place < k)) if len(place) else float("nan") for k in settings.k}


def _places(scorer: Scorer, population: Population, cases: Cases, item: int) -> IntArray:
    """For each case of a client who never touched the item, how many untouched others are scored at least as high."""
    scores = np.array(scorer.score_all(cases.clients, cases.cut), dtype=np.float32)
    check_scores(scores[:, item], scores)
    distinct, at = np.unique(cases.clients, return_inverse=True)
    events = population.events(distinct)
    touched = np.zeros((len(distinct), population.num_items), dtype=bool)
    touched[events.owners, events.items] = True
    scores[touched[at]] = -np.inf
    strange = scores[~touched[at, item]]
    return np.asarray((strange >= strange[:, item, None]).sum(axis=1) - 1, dtype=np.int64)
