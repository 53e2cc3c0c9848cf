"""Standalone training: the same model, data and metrics, trained centrally in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedtower.core.checkpoint import grouped
from fedtower.core.errors import RecipeError
from fedtower.core.plan import Plan
from fedtower.core.round import RoundReport, stopped
from fedtower.core.runtime import Work
from fedtower.core.server import Schedule
from fedtower.recsys.losses import LOSSES, in_batch_softmax
from fedtower.recsys.models import array
from fedtower.recsys.scorer import ModelScorer
from fedtower.recsys.step import make_scores, pure
from fedtower.recsys.tables import optimizer_arrays, restore_optimizer
from fedtower.recsys.training import Arrays, Setting, assemble

IntArray = NDArray[np.int64]


class Standalone:
    """Trains by epochs: each user gives one batch of targets an epoch, ``users_per_batch`` of them make a step.

    The towers are stepped by Adam, the tables by ``rows.optimizer``; a user's own vector by plain gradient descent at
    ``local.lr``, as on her device.
    """

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        settings = recipe.standalone
        if recipe.local.loss == "in_batch_softmax" and settings.users_per_batch < 2:
            raise RecipeError(
                "local.loss = 'in_batch_softmax' needs standalone.users_per_batch of at least 2: others' items are "
                "its negatives"
            )
        self._setting = setting
        self._settings = settings
        self._local = replace(
            recipe.local,
            steps=1,
            epochs=None,
            negatives=1 if recipe.local.loss == "in_batch_softmax" else recipe.local.negatives,
        )
        self._model = assemble(setting, row_lr=settings.row_lr, tower_lr=settings.lr)
        self._tower = self._model.declared.shared.to(recipe.device)
        self._on_device = self._model.declared.on_device
        self._shared = {name: value for name, value in self._tower.named_parameters() if name not in self._on_device}
        self._adam = torch.optim.Adam(self._shared.values(), lr=settings.lr)
        self._schedule = Schedule(settings.decay, settings.decay_to, settings.epochs)
        self._epoch = 0

    def rounds(self) -> Iterator[RoundReport]:
        """Train, one epoch an item."""
        setting, settings = self._setting, self._settings
        while self._epoch < settings.epochs:
            epoch, started = self._epoch + 1, setting.clock()
            scale = self._schedule(epoch)
            order = setting.draws.permutation(setting.population.num_clients, "epoch", epoch)
            loss = weight = 0.0
            for start in range(0, len(order), settings.users_per_batch):
                users = np.sort(order[start : start + settings.users_per_batch])
                work = self._model.data.work(Plan(epoch, {}, self._local), users)
                if work.examples.sum():
                    loss += self._step(work, scale) * float(work.examples.sum())
                    weight += float(work.examples.sum())
            self._epoch = epoch
            report = RoundReport(
                round=epoch,
                total_rounds=settings.epochs,
                loss=loss / weight if weight else float("nan"),
                clients=len(order),
                dropped=0,
                bytes_up=0,
                bytes_down=0,
                seconds=setting.clock() - started,
            )
            setting.hooks.observe("round_finished", report=report)
            yield report
            if stopped(report, setting.hooks):
                return

    def _step(self, work: Work, scale: float) -> float:
        """One step on a batch of users: back through towers, rows and tables; the loss before it."""
        device = self._setting.recipe.device
        items, where = _common_rows(work)
        self._model.tables.begin(scale)
        rows = self._model.tables.rows("item", items)
        slots = {name: rows[torch.from_numpy(places).to(device)] for name, places in where.items()}
        inputs = {name: torch.from_numpy(np.array(values[:, 0])).to(device) for name, values in work.inputs.items()}
        own = {
            name: torch.from_numpy(self._model.store.read(name, work.clients)).to(device).requires_grad_()
            for name in self._on_device
        }
        loss = self._loss(own, slots, inputs, torch.from_numpy(items[where["history"]]).to(device))

        for group in self._adam.param_groups:
            group["lr"] = self._settings.lr * scale
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._model.tables.finish()
        self._adam.step()
        for name, value in own.items():
            assert value.grad is not None
            # The loss is a mean over users; a user's own gradient is her share of it times their number.
            stepped = value.detach() - self._setting.recipe.local.lr * scale * len(work) * value.grad
            self._model.store.write(name, work.clients, array(stepped))
        return float(loss.detach())

    def _loss(
        self, own: dict[str, Tensor], slots: dict[str, Tensor], inputs: dict[str, Tensor], history: Tensor
    ) -> Tensor:
        """The mean loss over all examples of the batch."""
        axes = dict.fromkeys(self._shared) | dict.fromkeys(own, 0)
        parameters = {**self._shared, **own}
        weight, name = inputs["weight"], self._local.loss
        if name in LOSSES:
            positive, negative = vmap(make_scores(self._tower), in_dims=(axes, 0, 0))(parameters, slots, inputs)
            losses = LOSSES[name](positive.flatten(), negative.flatten(0, 1))
            return (losses * weight.flatten()).sum() / weight.sum()
        rows, target = slots["history"], inputs["target"]
        represent = vmap(pure(self._tower, "represent"), in_dims=(axes, 0, 0, 0))
        vectors = represent(parameters, rows, target, inputs["user"])
        chosen = torch.gather(rows, 1, target[..., None].expand(-1, -1, rows.shape[2]))
        items = torch.gather(history, 1, target)
        real = weight > 0
        scores = pure(self._tower, "score")(self._shared, vectors[real], chosen[real])
        return in_batch_softmax(scores, items[real]).mean()

    def scorer(self, moment: str) -> ModelScorer:
        """The model as it stands."""
        return self._model.scorer(self._setting, {name: array(value) for name, value in self._shared.items()}, moment)

    def snapshot(self) -> Arrays:
        """Towers, tables, optimisers, and what users keep."""
        arrays: dict[str, NDArray[Any]] = {"round": np.asarray(self._epoch, dtype=np.int64)}
        arrays |= {f"parameters/{name}": array(value) for name, value in self._shared.items()}
        arrays |= {f"tables/{name}": value for name, value in self._model.tables.snapshot().items()}
        arrays |= {f"clients/{name}": value for name, value in self._model.store.snapshot().items()}
        arrays |= {f"adam/{name}": value for name, value in optimizer_arrays(self._adam).items()}
        return arrays

    def restore(self, arrays: Arrays) -> None:
        """Continue from a snapshot."""
        self._epoch = int(arrays["round"].item())
        self._model.tables.restore(grouped(arrays, "tables"))
        self._model.store.restore(grouped(arrays, "clients"))
        with torch.no_grad():
            for name, value in self._shared.items():
                value.copy_(torch.from_numpy(np.array(arrays[f"parameters/{name}"])))
        restore_optimizer(self._adam, grouped(arrays, "adam"))


def _common_rows(work: Work) -> tuple[IntArray, dict[str, IntArray]]:
    """The distinct items of a whole batch, (n,), and each slot's place among them, (U, slots)."""
    needed = work.row_ids["item"]
    items, inverse = np.unique(needed.ids, return_inverse=True)
    first = needed.offsets[:-1, None]
    return items, {name: inverse[first + places[:, 0]] for name, places in work.slots.items()}
