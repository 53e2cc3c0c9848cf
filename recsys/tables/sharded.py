"""Sharded: the same tables spread over the processes of a torchrun, by TorchRec's DistributedModelParallel.

Every process asks for rows of its own, in step with the others; their gradients meet where the row is, and are summed
there before its one step. So what is trained is what one process trains, within rounding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.plan import RowSettings
from fedtower.recsys.models import Table
from fedtower.recsys.processes import Processes
from fedtower.recsys.tables.quiet import hush_torch, quietly
from fedtower.recsys.tables.states import Arrays, load_sharded, save_sharded, taken

with quietly():
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torchrec.distributed import comm_ops
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import BoundsCheckMode, ShardingPlan
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

IntArray = NDArray[np.int64]


class Sharded:
    """Tables of which each process holds some rows (``row_wise``), or some tables whole (``table_wise``)."""

    def __init__(self, tables: tuple[Table, ...], settings: RowSettings, lr: float, processes: Processes) -> None:
        hush_torch()
        self._names = [table.name for table in tables]
        self._width = sum(table.dim for table in tables)
        self._processes = processes
        self._model = _distributed(_declared(tables, settings, lr), self._names, settings.sharding, processes)
        self._optimizer = self._model.fused_optimizer

    def fill(self, name: str, start: int, values: Tensor) -> None:
        """Set the rows of a table from ``start`` on, as far as they are here."""
        _fill(self._states()[f"table/{name}"], start, values)

    def lookup(self, ids: IntArray) -> Tensor:
        """The rows of this process's ``ids`` of all tables side by side, (n, sum of dims); every process calls it, with
        as many or as few ids as it likes, and goes backward.
        """
        size = self._processes.most(len(ids))
        if not size:
            return torch.zeros(0, self._width, requires_grad=True)
        # The collection wants as many bags of everyone: those too many stay empty.
        lengths = torch.zeros(size, dtype=torch.int64)
        lengths[: len(ids)] = 1
        out: Tensor = self._model(
            KeyedJaggedTensor(
                keys=self._names,
                values=torch.from_numpy(np.ascontiguousarray(ids)).repeat(len(self._names)),
                lengths=lengths.repeat(len(self._names)),
            )
        ).values()
        return out[: len(ids)]

    def set_lr(self, lr: float) -> None:
        """The learning rate of lookups to come: they take it along."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Nothing: the tables are saved by all processes together."""
        return {}

    def save(self, folder: Path) -> None:
        """Write every process's part into ``folder``; every process calls it."""
        save_sharded(folder, self._states())

    def restore(self, arrays: Arrays, folder: Path | None) -> None:
        """Continue from a ``folder`` that any number of processes wrote, or from the snapshot of one."""
        states = self._states()
        if folder is not None:
            load_sharded(folder, states, alone=False)
            return
        for name, value in states.items():
            _fill(value, 0, torch.from_numpy(np.array(taken(arrays, name, value.size()))))

    def _states(self) -> dict[str, ShardedTensor]:
        """Tables and moments, under the names that they have in the snapshot of one process."""
        weights = self._model.state_dict()
        states = {f"table/{name}": weights[f"embedding_bags.{name}.weight"] for name in self._names}
        for held in self._optimizer.state_dict()["state"].values():
            for name, value in held.items():
                states[f"fused/{name.removesuffix('.momentum1')}.weight.momentum_1"] = value
        return states


def _declared(tables: tuple[Table, ...], settings: RowSettings, lr: float) -> EmbeddingBagCollection:
    """The tables without memory of their own, and the optimiser that will step them on the way back."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name, embedding_dim=table.dim, num_embeddings=table.num_rows, feature_names=[table.name]
            )
            for table in tables
        ],
        device=torch.device("meta"),
    )
    if settings.optimizer == "rowwise_adagrad":
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": lr, "eps": settings.eps})
    else:
        apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": lr})
    return collection


def _distributed(
    collection: EmbeddingBagCollection, names: list[str], sharding: str, processes: Processes
) -> DistributedModelParallel:
    """The collection spread over the processes.

    The plan is written here and not searched: the stock planner offers row-wise on GPUs alone, and may choose
    data-parallel tables, which ignore the optimiser of the backward pass.
    """
    # A row's gradient is the sum over the processes, as their batch is one.
    comm_ops.set_gradient_division(False)
    sharder = EmbeddingBagCollectionSharder(fused_params={"bounds_check_mode": BoundsCheckMode.FATAL})
    ways = {
        name: row_wise() if sharding == "row_wise" else table_wise(rank=place % processes.count)
        for place, name in enumerate(names)
    }
    plan = construct_module_sharding_plan(
        collection,
        ways,
        sharder=sharder,
        world_size=processes.count,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", processes.count)),
        device_type="cpu",
    )
    return DistributedModelParallel(
        collection,
        device=torch.device("cpu"),
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
        init_data_parallel=False,
    )


def _fill(into: ShardedTensor, start: int, values: Tensor) -> None:
    """Copy what of the rows ``start ...`` is on this process."""
    for shard in into.local_shards():
        first = shard.metadata.shard_offsets[0]
        begin, end = max(first, start), min(first + shard.metadata.shard_sizes[0], start + len(values))
        if begin < end:
            shard.tensor.detach()[begin - first : end - first].copy_(values[begin - start : end - start])
