"""Fused: tables in one process, stepped inside the backward pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.plan import RowSettings
from fedtower.recsys.models import Table
from fedtower.recsys.tables.quiet import quietly
from fedtower.recsys.tables.states import Arrays, copied, load_sharded, taken

with quietly():
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

IntArray = NDArray[np.int64]


class Fused:
    """TorchRec's fused collection: rowwise Adagrad with an explicit epsilon, or SGD."""

    def __init__(self, tables: tuple[Table, ...], settings: RowSettings, lr: float, device: torch.device) -> None:
        adagrad = settings.optimizer == "rowwise_adagrad"
        self._names = [table.name for table in tables]
        self._width = sum(table.dim for table in tables)
        self._device = device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._collection = FusedEmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=table.name,
                        embedding_dim=table.dim,
                        num_embeddings=table.num_rows,
                        feature_names=[table.name],
                    )
                    for table in tables
                ],
                optimizer_type=RowWiseAdagrad if adagrad else torch.optim.SGD,
                optimizer_kwargs={"lr": lr, **({"eps": settings.eps} if adagrad else {})},
                device=device,
            )
        self._optimizer = self._collection.fused_optimizer()

    def fill(self, name: str, start: int, values: Tensor) -> None:
        """Set the rows of a table from ``start`` on."""
        self._weights()[name][start : start + len(values)].copy_(values)

    def lookup(self, ids: IntArray) -> Tensor:
        """The rows of ``ids`` of all tables side by side, (n, sum of dims); going backward steps them."""
        if not len(ids):  # the collection refuses to look for nothing
            return torch.zeros(0, self._width, device=self._device, requires_grad=True)
        where = torch.from_numpy(np.ascontiguousarray(ids))
        out: Tensor = self._collection(
            KeyedJaggedTensor(
                keys=self._names,
                values=where.repeat(len(self._names)).to(self._device),
                lengths=torch.ones(len(ids) * len(self._names), dtype=torch.int64, device=self._device),
            )
        ).values()
        return out

    def set_lr(self, lr: float) -> None:
        """The learning rate of lookups to come: they take it along."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()  # the fused kernels read the learning rate here; nothing else is stepped

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """The tables and the moments of their optimiser."""
        return {name: copied(value) for name, value in self._states().items()}

    def restore(self, arrays: Arrays, folder: Path | None) -> None:
        """Continue from a snapshot, or from the ``folder`` of a checkpoint that many processes wrote."""
        states = self._states()
        if folder is not None:
            load_sharded(folder, states, alone=True)
            return
        for name, value in states.items():
            value.copy_(torch.from_numpy(np.array(taken(arrays, name, value.shape))))

    def _states(self) -> dict[str, Tensor]:
        weights = {f"table/{name}": value for name, value in self._weights().items()}
        return {**weights, **{f"fused/{name}": value for name, value in self._moments().items()}}

    def _weights(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("embedding_bags.").removesuffix(".weight"): value.detach()
            for name, value in self._collection.state_dict().items()
        }

    def _moments(self) -> dict[str, Tensor]:
        states = self._optimizer.state_dict()["state"]
        return {key: value for state in states.values() for key, value in state.items() if isinstance(value, Tensor)}
