"""Standalone training: the same model, data and metrics, trained centrally in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedtower.core.checkpoint import Attachments, grouped
from fedtower.core.errors import RecipeError
from fedtower.core.round import RoundReport, stopped
from fedtower.core.runtime import Work
from fedtower.core.server import Schedule
from fedtower.recsys.central import common_rows, mean_loss
from fedtower.recsys.learned import Learned
from fedtower.recsys.losses import in_batch_softmax
from fedtower.recsys.models import SequenceTower, array
from fedtower.recsys.step import pure
from fedtower.recsys.tables import optimizer_arrays, restore_optimizer
from fedtower.recsys.tasks import Labelled
from fedtower.recsys.training import NOTHING, Arrays, Attached, Setting, assemble, shared_parameters


class Standalone:
    """Trains by epochs. Of histories each user gives one batch of targets an epoch, ``users_per_batch`` of them a step;
    of labelled examples each is taken once, ``batch_size`` a step.

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
        self._model = assemble(setting, row_lr=settings.row_lr, tower_lr=settings.lr)
        if isinstance(setting.task, Labelled) and self._model.declared.on_device:
            raise RecipeError(
                f"the parameters {', '.join(self._model.declared.on_device)} live on devices, one value for each "
                f"client, but a central step on labelled examples takes the examples of all clients at once; use "
                f"mode = 'simulated', or a model that keeps nothing on devices"
            )
        if not (recipe.local.loss == "in_batch_softmax" and isinstance(self._model.declared.shared, SequenceTower)):
            self._model.declared.shared.check_loss(recipe.local.loss)
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
            clients = 0
            loss = weight = 0.0
            for work in setting.task.central(epoch):
                clients += len(work)
                if work.examples.sum():
                    loss += self._step(work, scale) * float(work.examples.sum())
                    weight += float(work.examples.sum())
            self._epoch = epoch
            report = RoundReport(
                round=epoch,
                total_rounds=settings.epochs,
                loss=loss / weight if weight else float("nan"),
                clients=clients,
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
        device, tables = self._setting.recipe.device, self._model.tables
        slots: dict[str, Tensor] = {}
        ids: dict[str, Tensor] = {}
        if tables is not None:
            needed, where = common_rows(work)
            tables.begin(scale)
            rows = tables.rows(self._model.declared.source, needed)
            slots = {name: rows[torch.from_numpy(places).to(device)] for name, places in where.items()}
            ids = {name: torch.from_numpy(needed[places]).to(device) for name, places in where.items()}
        inputs = {name: torch.from_numpy(np.array(values[:, 0])).to(device) for name, values in work.inputs.items()}
        own = {
            name: torch.from_numpy(self._model.store.read(name, work.clients)).to(device).requires_grad_()
            for name in self._on_device
        }
        loss = self._loss(own, slots, inputs, ids)
        for group in self._adam.param_groups:
            group["lr"] = self._settings.lr * scale
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if tables is not None:
            tables.finish()
        self._adam.step()
        for name, value in own.items():
            assert value.grad is not None
            # The loss is a mean over users; a user's own gradient is her share of it times their number.
            stepped = value.detach() - self._setting.recipe.local.lr * scale * len(work) * value.grad
            self._model.store.write(name, work.clients, array(stepped))
        return float(loss.detach())

    def _loss(
        self, own: dict[str, Tensor], slots: dict[str, Tensor], inputs: dict[str, Tensor], ids: dict[str, Tensor]
    ) -> Tensor:
        """The mean loss over all examples of the batch."""
        name = self._setting.recipe.local.loss
        if name != "in_batch_softmax":
            return mean_loss(self._tower, name, self._shared, own, slots, inputs)
        # vmap pairs the entries of two dictionaries by their order: both begin with the shared ones.
        axes = {**dict.fromkeys(self._shared), **dict.fromkeys(own, 0)}
        return self._in_batch(axes, {**self._shared, **own}, slots, inputs, ids["history"])

    def _in_batch(
        self,
        axes: dict[str, int | None],
        parameters: dict[str, Tensor],
        slots: dict[str, Tensor],
        inputs: dict[str, Tensor],
        history: Tensor,
    ) -> Tensor:
        """Every target among the targets of the whole batch; ``history`` (U, T) are the items of the slots."""
        rows, target = slots["history"], inputs["target"]
        represent = vmap(pure(self._tower, "represent"), in_dims=(axes, 0, 0, 0))
        vectors = represent(parameters, rows, target, inputs["user"])
        chosen = torch.gather(rows, 1, target[..., None].expand(-1, -1, rows.shape[2]))
        items = torch.gather(history, 1, target)
        real = inputs["weight"] > 0
        scores = pure(self._tower, "score")(self._shared, vectors[real], chosen[real])
        return in_batch_softmax(scores, items[real]).mean()

    def learned(self) -> Learned:
        """The model as it stands."""
        return self._model.learned({name: array(value) for name, value in self._shared.items()})

    def snapshot(self) -> Arrays:
        """Towers, tables, optimisers, and what users keep."""
        arrays: dict[str, NDArray[Any]] = {"round": np.asarray(self._epoch, dtype=np.int64)}
        arrays |= {f"parameters/{name}": array(value) for name, value in self._shared.items()}
        arrays |= self._model.snapshot()
        arrays |= {f"adam/{name}": value for name, value in optimizer_arrays(self._adam).items()}
        return arrays

    def attachments(self) -> Attachments:
        """What the tables and the clients write themselves."""
        return self._model.attachments()

    def restore(self, arrays: Arrays, attached: Attached = NOTHING) -> None:
        """Continue from a snapshot and what was attached to it."""
        self._epoch = int(arrays["round"].item())
        self._model.restore(arrays, attached)
        held = shared_parameters(arrays, {name: array(value) for name, value in self._shared.items()})
        with torch.no_grad():
            for name, value in self._shared.items():
                value.copy_(torch.from_numpy(held[name]))
        restore_optimizer(self._adam, grouped(arrays, "adam"))
