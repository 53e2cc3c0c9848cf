"""Small models and blocks of work for them, for the promises of models and runtimes.

There are three: of histories, with parameters in all three places; of clicks, with categories; and of images, with
convolutions and without any rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import localise
from fedtower.core.runtime import Work
from fedtower.recsys.examples import Examples, batches_of
from fedtower.recsys.models import (
    Declared,
    ExampleSchema,
    ExampleTower,
    PlainRows,
    Schema,
    SequenceTower,
    Table,
    convolution,
    linear,
)

SCHEMA = Schema(num_items=40, num_user_features=3, num_item_features=5, history_length=6)
CLICKS = ExampleSchema(dense=(3,), cardinalities=(5, 9, 4), num_classes=0)
IMAGES = ExampleSchema(dense=(12, 12), cardinalities=(), num_classes=4)
BATCH, NEGATIVES, SLOTS, STEPS = 4, 9, 10, 3


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


class ClickTower(ExampleTower):
    """A hidden layer on numbers and rows, and a bias of the client's own."""

    def __init__(self, schema: ExampleSchema, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = linear(schema.num_dense + len(schema.cardinalities) * width, 6, generator)
        self.out = linear(6, 1, generator)
        self.own = torch.nn.Parameter(torch.zeros(()))

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        seen = torch.cat([inputs["dense"], slots["category"].flatten(1)], dim=1)
        logits: Tensor = self.out(torch.tanh(self.hidden(seen)))[:, 0] + self.own
        return logits


class ImageTower(ExampleTower):
    """A convolution, averages, and a linear map."""

    def __init__(self, schema: ExampleSchema, generator: torch.Generator) -> None:
        super().__init__()
        self.maps = convolution(1, 2, 5, generator, padding=2)
        self.out = linear(2 * 6 * 6, schema.num_classes, generator)

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.out(avg_pool2d(torch.relu(self.maps(inputs["dense"][:, None])), 2).flatten(1))
        return logits


@dataclass(frozen=True)
class Case:
    """A small model, and what its clients train on."""

    name: str
    loss: str
    model: Declared
    make_work: Callable[[Declared, int, int], Work]

    def plan(self, *, train_rows: bool = True, **local: Any) -> Plan:
        """What a cohort is sent to train the model for up to three steps."""
        settings: dict[str, Any] = {
            "steps": STEPS,
            "batch_size": BATCH,
            "lr": 0.1,
            "negatives": NEGATIVES,
            "history_length": SCHEMA.history_length,
            "loss": self.loss,
        }
        return Plan(1, self.model.parameters(), LocalSettings(**(settings | local)), train_rows=train_rows)

    def work(self, clients: int = 5, seed: int = 1) -> Work:
        """The visits of ``clients`` clients: 0 to 3 steps, some of them not full."""
        return self.make_work(self.model, clients, seed)


def cases(seed: int = 1) -> dict[str, Case]:
    """The three cases by name."""
    generator = torch.Generator().manual_seed(seed)
    histories = Declared(
        tables=(Table("item", SCHEMA.num_items, 8, 0.1),),
        cloud=PlainRows(8),
        shared=MeanUser(8, SCHEMA.num_user_features, generator),
        on_device=("own",),
    )
    clicks = Declared(
        tables=(Table("category", CLICKS.num_rows, 4, 0.1),),
        cloud=PlainRows(4),
        shared=ClickTower(CLICKS, 4, generator),
        on_device=("own",),
        source="category",
    )
    images = Declared(shared=ImageTower(IMAGES, generator))
    made = (
        Case("histories", "sampled_softmax", histories, history_work),
        Case("clicks", "bce", clicks, click_work),
        Case("images", "cross_entropy", images, image_work),
    )
    return {case.name: case for case in made}


def history_work(model: Declared, clients: int, seed: int) -> Work:
    """Stretches of histories, with targets and negatives in them."""
    draws, ids = Draws(seed), np.arange(clients, dtype=np.int64)
    steps, weight = _weights(draws, ids)
    at = np.arange(STEPS, dtype=np.int64)[None, :, None]
    items = draws.integers(
        SCHEMA.num_items, "items", ids[:, None, None], at, np.arange(SLOTS + NEGATIVES, dtype=np.int64)[None, None, :]
    )
    target = draws.integers(SLOTS, "target", ids[:, None, None], at, np.arange(BATCH, dtype=np.int64)[None, None, :])
    user = draws.normal("user", ids[:, None], np.arange(SCHEMA.num_user_features)[None, :]).astype(np.float32)
    needed, where = localise(items.reshape(clients, -1))
    where = where.reshape(items.shape)
    return Work(
        clients=ids,
        steps=steps,
        examples=weight.sum(axis=(1, 2)).astype(np.int64),
        inputs={"target": target, "weight": weight, "user": np.repeat(user[:, None, :], STEPS, axis=1)},
        slots={"history": where[..., :SLOTS], "negatives": where[..., SLOTS:]},
        row_ids={"item": needed},
        rows={"item": _rows(draws, needed.ids, model)},
        states=_states(draws, ids, model),
    )


def click_work(model: Declared, clients: int, seed: int) -> Work:
    """Batches of rows of a table, as a client's data makes them."""
    return _example_work(CLICKS, model, clients, seed)


def image_work(model: Declared, clients: int, seed: int) -> Work:
    """Batches of images."""
    return _example_work(IMAGES, model, clients, seed)


def _example_work(schema: ExampleSchema, model: Declared, clients: int, seed: int) -> Work:
    draws, ids = Draws(seed), np.arange(clients, dtype=np.int64)
    steps, weight = _weights(draws, ids)
    place = np.arange(clients * STEPS * BATCH, dtype=np.int64)
    dense = draws.normal("dense", place[:, None], np.arange(schema.num_dense)[None, :]).astype(np.float32)
    first = np.concatenate([[0], np.cumsum(schema.cardinalities)])[: len(schema.cardinalities)].astype(np.int64)
    fields = np.arange(len(schema.cardinalities), dtype=np.int64)
    sizes = np.asarray(schema.cardinalities or [1], dtype=np.int64)[None, : len(fields)]
    held = Examples(
        ids,
        np.arange(clients + 1, dtype=np.int64) * STEPS * BATCH,
        dense.reshape(-1, *schema.dense),
        draws.integers(sizes, "category", place[:, None], fields[None, :]) + first,
        draws.integers(schema.num_classes or 2, "label", place).astype(np.float32),
    )
    at = np.where(weight > 0, place.reshape(clients, STEPS, BATCH), -1)
    work = batches_of(held, at, steps, bool(schema.cardinalities))
    rows = {source: _rows(draws, needed.ids, model) for source, needed in work.row_ids.items()}
    states = _states(draws, ids, model)
    return Work(ids, steps, work.examples, work.inputs, work.slots, work.row_ids, rows, states)


def _weights(draws: Draws, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """How many steps each client takes, (C,), and which examples of its batches are real, (C, S, B)."""
    steps = draws.integers(STEPS + 1, "steps", ids)
    steps[0] = STEPS
    at = np.arange(STEPS, dtype=np.int64)[None, :, None]
    drawn = draws.uniform("weight", ids[:, None, None], at, np.arange(BATCH, dtype=np.int64)[None, None, :])
    weight = (drawn < 0.8).astype(np.float32)
    weight[:, :, 0] = 1.0
    return steps, weight * (at < steps[:, None, None])


def _rows(draws: Draws, ids: NDArray[np.int64], model: Declared) -> NDArray[np.float32]:
    return draws.normal("rows", ids[:, None], np.arange(model.cloud.width)[None, :]).astype(np.float32)


def _states(draws: Draws, ids: NDArray[np.int64], model: Declared) -> dict[str, NDArray[np.float32]]:
    return {
        name: draws.normal("state", ids[:, None], np.arange(value.size)[None, :])
        .reshape(len(ids), *value.shape)
        .astype(np.float32)
        for name, value in model.device_parameters().items()
    }
