"""CloudTables: the tables and towers that stay in the cloud, TorchRec underneath, seen by everyone else as rows by
id.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.checkpoint import grouped
from fedtower.core.errors import CheckpointError, UpdateError
from fedtower.core.plan import RowSettings
from fedtower.recsys.models import Declared

with warnings.catch_warnings():
    # torchrec and fbgemm raise deprecation warnings of their own at import, log through the root logger, and install a
    # handler there.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    _handlers = list(logging.root.handlers)
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    logging.root.handlers[:] = _handlers

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Features = Callable[[IntArray], FloatArray]

_FETCH = 1 << 18  # rows at a time, so that fetching a whole catalogue needs no second copy of it


class RowOutOfRange(UpdateError):
    """An id that a table does not have. The kernels would silently train row 0 instead."""


class CloudTables:
    """The :class:`~fedtower.core.rows.RowStore` of one source of rows: tables, the tower on them, and their
    optimisers.

    The tables are stepped inside the backward pass (fused rowwise Adagrad or SGD, explicit epsilon), the tower by Adam.
    """

    def __init__(
        self,
        declared: Declared,
        features: Features,
        settings: RowSettings,
        generator: torch.Generator,
        *,
        device: str = "cpu",
        row_lr: float | None = None,
        tower_lr: float | None = None,
    ) -> None:
        tables = declared.tables
        tower = declared.cloud
        self._tables = tables
        self._num_bytes = declared.table_bytes
        self._source = declared.source
        self._features = features
        self._device = torch.device(device)
        self._num_rows = tables[0].num_rows
        self._row_lr = settings.lr if row_lr is None else row_lr
        self._tower_lr = settings.tower_lr if tower_lr is None else tower_lr
        self._generation = 0
        adagrad = settings.optimizer == "rowwise_adagrad"
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
                optimizer_kwargs={"lr": self._row_lr, **({"eps": settings.eps} if adagrad else {})},
                device=self._device,
            )
        self._optimizer = self._collection.fused_optimizer()
        for table in tables:
            values = torch.empty(table.num_rows, table.dim).normal_(0.0, table.scale, generator=generator)
            self._weights()[table.name].copy_(values)
        self.tower = tower.to(self._device)
        parameters = [value for value in tower.parameters() if value.numel()]
        self._adam = torch.optim.Adam(parameters, lr=self._tower_lr) if parameters else None

    @property
    def generation(self) -> int:
        """How many times the tables have been stepped."""
        return self._generation

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._device

    @property
    def num_bytes(self) -> int:
        """The size of all tables: what shipping them to a device would cost."""
        return self._num_bytes

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids`` as the tower computes them, (n, W)."""
        out = np.empty((len(ids), self.tower.width), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, len(ids), _FETCH):
                out[start : start + _FETCH] = self.rows(source, ids[start : start + _FETCH]).cpu().numpy()
        return out

    def rows(self, source: str, ids: IntArray) -> Tensor:
        """The rows of ``ids`` with their history of computation, (n, W): going backward through them steps the tables.

        Raises:
            RowOutOfRange: an id below 0 or beyond the table.
        """
        if source != self._source:
            raise RowOutOfRange(f"there are no rows of {source!r} here; this model keeps rows of {self._source!r}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self._num_rows):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise RowOutOfRange(f"row ids of {source!r} go from 0 to {self._num_rows - 1}, but {wrong} was asked for")
        where = torch.from_numpy(np.ascontiguousarray(ids))
        held = self._collection(
            KeyedJaggedTensor(
                keys=[table.name for table in self._tables],
                values=where.repeat(len(self._tables)).to(self._device),
                lengths=torch.ones(len(ids) * len(self._tables), dtype=torch.int64, device=self._device),
            )
        ).values()
        out: Tensor = self.tower(held, torch.from_numpy(self._features(ids)).to(self._device))
        return out

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        """Step tables and tower along row deltas: minus a delta is the gradient of the row, and goes back through the
        tower.
        """
        self.begin(lr_scale)
        for source, (ids, delta) in deltas.items():
            if len(ids):
                self.rows(source, ids).backward(torch.from_numpy(-delta).to(self._device))  # type: ignore[no-untyped-call]
        self.finish()

    def begin(self, lr_scale: float) -> None:
        """Set the learning rates of the step to come, before its :meth:`rows`: they take the tables' rate along."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._row_lr * lr_scale
        self._optimizer.step()  # the fused kernels read the learning rate here; nothing else is stepped
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = self._tower_lr * lr_scale
            self._adam.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Step the tower; the tables were stepped on the way back."""
        if self._adam is not None:
            self._adam.step()
        self._generation += 1

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Tables, tower, and the state of both optimisers."""
        arrays: dict[str, NDArray[Any]] = {"generation": np.asarray(self._generation, dtype=np.int64)}
        arrays |= {f"table/{name}": _copy(value) for name, value in self._weights().items()}
        arrays |= {f"fused/{name}": _copy(value) for name, value in self._moments().items()}
        arrays |= {f"tower/{name}": _copy(value) for name, value in self.tower.state_dict().items()}
        if self._adam is not None:
            arrays |= {f"adam/{name}": value for name, value in optimizer_arrays(self._adam).items()}
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a snapshot, bit for bit."""
        self._generation = int(_take(arrays, "generation").item())
        for name, value in self._weights().items():
            _fill(value, arrays, f"table/{name}")
        for name, value in self._moments().items():
            _fill(value, arrays, f"fused/{name}")
        with torch.no_grad():
            for name, value in self.tower.state_dict().items():
                _fill(value, arrays, f"tower/{name}")
        if self._adam is not None:
            restore_optimizer(self._adam, grouped(arrays, "adam"))

    def _weights(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("embedding_bags.").removesuffix(".weight"): value.detach()
            for name, value in self._collection.state_dict().items()
        }

    def _moments(self) -> dict[str, Tensor]:
        states = self._optimizer.state_dict()["state"]
        return {key: value for state in states.values() for key, value in state.items() if isinstance(value, Tensor)}


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, NDArray[Any]]:
    """The state of a torch optimiser as arrays, named ``position/moment``."""
    states = optimizer.state_dict()["state"]
    return {f"{position}/{name}": _copy(value) for position, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give an optimiser the state that :func:`optimizer_arrays` took; its learning rate stays."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        position, _, moment = name.partition("/")
        state.setdefault(int(position), {})[moment] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _copy(value: Tensor) -> NDArray[Any]:
    out: NDArray[Any] = value.detach().cpu().numpy().copy()
    return out


def _fill(value: Tensor, arrays: Mapping[str, NDArray[Any]], name: str) -> None:
    array = _take(arrays, name)
    if tuple(array.shape) != tuple(value.shape):
        raise CheckpointError(
            f"the checkpoint's {name!r} has shape {array.shape}, but this model has {tuple(value.shape)}; was it "
            f"written by another recipe?"
        )
    value.copy_(torch.from_numpy(np.array(array)))


def _take(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in arrays:
        raise CheckpointError(f"the checkpoint holds no {name!r}: it belongs to another model, or to an older fedtower")
    return arrays[name]
