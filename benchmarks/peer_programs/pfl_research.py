"""pfl-research (https://github.com/apple/pfl-research): its simulated backend, federated averaging, torch's SGD.

With RANK and WORLD_SIZE set, one of several processes of torch.distributed, as its documentation starts them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel

from benchmarks.peer_programs.answering import Average, Tower, prepared, rounds_of, serve


class Module(Tower):
    """The tower: pfl-research wants a way to judge a model, which these rounds never use."""

    def metrics(self, vectors: torch.Tensor, items: torch.Tensor, eval: bool = False) -> dict[str, float]:
        return {}


class InTurn:
    """A sampler of users that gives the visits of the rounds one after another."""

    def __init__(self, count: int) -> None:
        self._places: Iterator[int] = itertools.cycle(range(count))

    def __call__(self) -> int:
        return next(self._places)


def main() -> None:
    """Wait for rounds."""
    rounds = rounds_of(prepared())
    model = PyTorchModel(Module(rounds.initial), torch.optim.SGD, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    # Visits are dealt out by their sizes, which is what pfl-research recommends for clients of different sizes.
    data = FederatedDataset(
        lambda place: PyTorchTensorDataset(rounds.examples(place), user_id=str(place)),
        InTurn(rounds.clients.size),
        user_id_to_weight=dict(enumerate(np.diff(rounds.offsets).tolist())),
    )
    backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
    cohort, algorithm = rounds.clients.shape[1], FederatedAveraging()
    local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=rounds.lr, local_batch_size=rounds.batch_size)
    params = NNAlgorithmParams(
        central_num_iterations=len(rounds.clients), evaluation_frequency=0, train_cohort_size=cohort, val_cohort_size=0
    )

    def train(number: int) -> Average:
        context = CentralContext(
            current_central_iteration=number,
            do_evaluation=False,
            cohort_size=cohort,
            population=Population.TRAIN,
            model_train_params=local,
            algorithm_params=params,
            seed=number,
        )
        statistics, _ = backend.gather_results(model, algorithm, central_context=context)
        statistics.average()
        return {name: value.numpy() for name, value in statistics.items()}

    serve(train)
    os._exit(0)  # its sampling process does not end by itself


if __name__ == "__main__":
    main()
