"""Labels told: a model's logits of held-out examples, and what clients with models of their own make of them.

Held-out examples belong to nobody who trains, but where data lies in shards: devices judge those that they were dealt.
Where every client has a model of its own, each is judged on those of the classes that it trains on, as often as it has
them: the distribution of its own data, as in the experiments of FedPer (Arivazhagan et al., 2019,
https://arxiv.org/abs/1912.00818) and FedRep (Collins et al., 2021, https://arxiv.org/abs/2102.07078), whose clients
hold examples out themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.recsys import metrics
from fedtower.recsys.evaluation import Evaluation, Role
from fedtower.recsys.examples import Examples, ExampleSet, HeldOutByClients
from fedtower.recsys.learned import Learned
from fedtower.recsys.own_model import is_own
from fedtower.recsys.step import pure

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Tensors = Mapping[str, Tensor]

OF_OWN_CLASSES = "held-out examples of each client's classes"


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
    return any(map(is_own, learned.declared.on_device)) or learned.tuned is not None


def by_own_classes(learned: Learned, examples: ExampleSet, role: Role, batch_size: int) -> Evaluation:
    """The mean over clients of each one's figures, on held-out examples of the classes that it trains on: of its own
    ones, where clients hold examples out themselves.

    A class counts by its share of the client's own examples, and every client alike that has some.

    An example is a case once for every client that it is shown to.
    """
    of_all = examples.held_out(role)
    figures, cases = [], 0
    for client in range(examples.num_clients):
        held = examples.held_out_by(client, role) if isinstance(examples, HeldOutByClients) else of_all
        known = examples.examples(np.array([client])).labels
        at = np.flatnonzero(np.isin(held.labels, known))
        if not len(at):
            continue
        told = logits_of(learned, _model_of(learned, client), held, at, batch_size)
        figures.append(metrics.of_known_classes(told, held.labels[at], known))
        cases += len(at)
    means = {name: float(np.mean([one[name] for one in figures])) for name in figures[0]} if figures else {}
    return Evaluation(role, OF_OWN_CLASSES, means, cases=cases, users=len(figures))


def _model_of(learned: Learned, client: int) -> dict[str, Tensor]:
    """The parameters with which a client judges."""
    who = np.array([client], dtype=np.int64)
    if learned.tuned is not None:
        return {name: torch.from_numpy(value[0]) for name, value in learned.tuned(who).parameters.items()}
    return {**learned.shared(), **{name: value[0] for name, value in learned.own(who).items()}}
