"""A small model and a block of work for it, for the promises of models and runtimes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import localise
from fedtower.core.runtime import Work
from fedtower.recsys.models import CloudTower, Declared, Schema, SequenceTower, Table, linear

SCHEMA = Schema(num_items=40, num_user_features=3, num_item_features=5, history_length=6)
BATCH, NEGATIVES, SLOTS = 4, 9, 10


class PlainItems(CloudTower):
    """The rows of the one table, as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        return rows


class MeanUser(SequenceTower):
    """A linear map of the mean of the history, plus the user's features and a vector of her own."""

    def __init__(self, width: int, num_features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.history = linear(width, width, generator)
        self.features = linear(num_features, width, generator)
        self.own = torch.nn.Parameter(torch.zeros(width))

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        before = (torch.arange(history.shape[0])[None, :] < target[:, None]).to(history.dtype)
        mean = (before @ history) / before.sum(dim=1, keepdim=True).clamp(min=1.0)
        vectors: Tensor = self.history(mean) + self.features(user)[None, :] + self.own[None, :]
        return vectors

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        scores: Tensor = vectors @ rows.T
        return scores


def small_model(seed: int = 1) -> Declared:
    """A two-tower model of 8 dimensions with shared, cloud and device parameters."""
    generator = torch.Generator().manual_seed(seed)
    return Declared(
        tables=(Table("item", SCHEMA.num_items, 8, 0.1),),
        cloud=PlainItems(8),
        shared=MeanUser(8, SCHEMA.num_user_features, generator),
        on_device=("own",),
    )


def small_plan(model: Declared, *, train_rows: bool = True, row_lr: float | None = None) -> Plan:
    """What a cohort is sent to train ``model`` for up to three steps."""
    local = LocalSettings(
        steps=3, batch_size=BATCH, lr=0.1, row_lr=row_lr, negatives=NEGATIVES, history_length=SCHEMA.history_length
    )
    return Plan(1, model.parameters(), local, train_rows=train_rows)


def small_work(model: Declared, clients: int = 5, seed: int = 1) -> Work:
    """The visits of ``clients`` clients: 0 to 3 steps, some of them not full."""
    draws, ids = Draws(seed), np.arange(clients, dtype=np.int64)
    steps = draws.integers(4, "steps", ids)
    steps[0] = 3
    at = np.arange(3, dtype=np.int64)[None, :, None]
    items = draws.integers(
        SCHEMA.num_items, "items", ids[:, None, None], at, np.arange(SLOTS + NEGATIVES, dtype=np.int64)[None, None, :]
    )
    target = draws.integers(SLOTS, "target", ids[:, None, None], at, np.arange(BATCH, dtype=np.int64)[None, None, :])
    weight = (draws.uniform("weight", ids[:, None, None], at, np.arange(BATCH)[None, None, :]) < 0.8).astype(np.float32)
    weight[:, :, 0] = 1.0
    weight *= at < steps[:, None, None]
    user = draws.normal("user", ids[:, None], np.arange(SCHEMA.num_user_features)[None, :]).astype(np.float32)
    needed, where = localise(items.reshape(clients, -1))
    where = where.reshape(items.shape)
    rows = draws.normal("rows", needed.ids[:, None], np.arange(model.cloud.width)[None, :])
    return Work(
        clients=ids,
        steps=steps,
        examples=weight.sum(axis=(1, 2)).astype(np.int64),
        inputs={"target": target, "weight": weight, "user": np.repeat(user[:, None, :], 3, axis=1)},
        slots={"history": where[..., :SLOTS], "negatives": where[..., SLOTS:]},
        row_ids={"item": needed},
        rows={"item": rows.astype(np.float32)},
        states={
            name: draws.normal("state", ids[:, None], np.arange(value.size)[None, :])
            .reshape(clients, *value.shape)
            .astype(np.float32)
            for name, value in model.device_parameters().items()
        },
    )
