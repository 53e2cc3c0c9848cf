"""Labels told: a model's logits of held-out examples, and what clients with models of their own make of them.

Held-out examples belong to nobody who trains. Where every client has a model of its own, each is judged on those of the
classes that it trains on, as often as it has them: the distribution of its own data, as in the experiments of FedPer
(Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818) and FedRep (Collins et al., 2021,
https://arxiv.org/abs/2102.07078), whose clients hold examples out themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.control import is_variate
from fedtower.recsys import metrics
from fedtower.recsys.ditto import PERSONAL
from fedtower.recsys.evaluation import Evaluation, Role
from fedtower.recsys.examples import Examples, ExampleSet
from fedtower.recsys.learned import Learned
from fedtower.recsys.step import pure

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Tensors = Mapping[str, Tensor]


def logits_of(learned: Learned, parameters: Tensors, held: Examples, at: IntArray, batch_size: int) -> FloatArray:
    """The logits of the examples ``at`` (E,), (E,) or (E, K), the same whatever the batch size."""
    logits = pure(learned.declared.shared, "logits")
    out = []
    with torch.no_grad():
        for start in range(0, len(at), batch_size):
            part = at[start : start + batch_size]
            slots = {}
            if held.categories.shape[1]:
                ids, inverse = np.unique(held.categories[part], return_inverse=True)
                slots = {"category": learned.fetch(ids)[torch.from_numpy(inverse.reshape(held.categories[part].shape))]}
            inputs = {"dense": torch.from_numpy(held.dense[part]), "label": torch.from_numpy(held.labels[part])}
            out.append(logits(parameters, slots, inputs).numpy())
    return np.concatenate(out)


def has_own(learned: Learned) -> bool:
    """Whether clients are to be judged with models that differ."""
    mine = [name for name in learned.declared.on_device if not is_variate(name) and not name.startswith(PERSONAL)]
    return bool(mine) or learned.tuned is not None


def by_own_classes(learned: Learned, examples: ExampleSet, role: Role, batch_size: int) -> Evaluation:
    """The mean over clients of each one's figures, on held-out examples of the classes that it trains on.

    A class counts by its share of the client's own examples, and every client alike that has some.

    An example is a case once for every client that it is shown to.
    """
    held = examples.held_out(role)
    of_class = [np.flatnonzero(held.labels == label) for label in range(examples.num_classes)]
    there = np.array([len(at) > 0 for at in of_class])
    figures, cases = [], 0
    for client in range(examples.num_clients):
        mine = examples.examples(np.array([client])).labels.astype(np.int64)
        shares = np.where(there, np.bincount(mine, minlength=examples.num_classes), 0.0)
        classes = np.flatnonzero(shares)
        if not len(classes):
            continue
        at = np.concatenate([of_class[label] for label in classes])
        told = logits_of(learned, _model_of(learned, client), held, at, batch_size)
        labels = held.labels[at].astype(np.int64)
        each = [metrics.of_classes(told[labels == label], labels[labels == label]) for label in classes]
        weights = shares[classes] / shares.sum()
        figures.append({name: float(np.dot(weights, [one[name] for one in each])) for name in each[0]})
        cases += len(at)
    means = {name: float(np.mean([one[name] for one in figures])) for name in figures[0]} if figures else {}
    return Evaluation(role, "held-out examples of each client's classes", means, cases=cases, users=len(figures))


def _model_of(learned: Learned, client: int) -> dict[str, Tensor]:
    """The parameters with which a client judges."""
    who = np.array([client], dtype=np.int64)
    if learned.tuned is not None:
        return {name: torch.from_numpy(value[0]) for name, value in learned.tuned(who).parameters.items()}
    return {**learned.shared(), **{name: value[0] for name, value in learned.own(who).items()}}
