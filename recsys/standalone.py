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
from fedtower.recsys.central import mean_loss
from fedtower.recsys.learned import Learned
from fedtower.recsys.losses import in_batch_softmax
from fedtower.recsys.models import SequenceTower, array
from fedtower.recsys.share import Share
from fedtower.recsys.step import pure
from fedtower.recsys.tables import optimizer_arrays, restore_optimizer
from fedtower.recsys.tasks import Labelled
from fedtower.recsys.training import NOTHING, Arrays, Attached, Setting, assemble, shared_parameters


class Standalone:
    """Trains by epochs. Of histories each user gives one batch of targets an epoch, ``users_per_batch`` of them a step;
    of labelled examples each is taken once, ``batch_size`` a step.

    The towers are stepped by Adam, the tables by ``rows.optimizer``; a user's own vector by plain gradient descent at
    ``local.lr``, as on her device.

    Under torchrun every process takes its share of each batch, and gradients are summed: the batch is the recipe's,
    whatever the number of processes.
    """

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        settings = recipe.standalone
        if recipe.local.loss == "in_batch_softmax" and settings.users_per_batch < 2:
            raise RecipeError(
                "local.loss = 'in_batch_softmax' needs standalone.users_per_batch of at least 2: others' items are "
                "its negatives"
            )
        if recipe.local.loss == "in_batch_softmax" and not setting.processes.is_alone:
            raise RecipeError(
                "local.loss = 'in_batch_softmax' ranks each target among those of the whole batch, which no process of "
                "a torchrun has: train it in one process, or set local.loss = 'sampled_softmax'"
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
        setting = self._setting
        while self._epoch < self._settings.epochs:
            setting.processes.order("epoch")
            report = self._one_epoch()
            setting.hooks.observe("round_finished", report=report)
            yield report
            if stopped(report, setting.hooks):
                return

    def follow(self) -> None:
        """Take part, as a process that does not lead, in what the leading one does until it is done."""
        help = {} if self._model.tables is None else self._model.tables.help
        self._setting.processes.serve({"epoch": self._one_epoch, **help})

    def _one_epoch(self) -> RoundReport:
        """Every example once."""
        setting, settings = self._setting, self._settings
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
        return RoundReport(
            round=epoch,
            total_rounds=settings.epochs,
            loss=loss / weight if weight else float("nan"),
            clients=clients,
            dropped=0,
            bytes_up=0,
            bytes_down=0,
            seconds=setting.clock() - started,
            examples=weight,
        )

    def _step(self, work: Work, scale: float) -> float:
        """One step on a batch: back through towers, rows and tables; the loss before it."""
        device, tables, processes = self._setting.recipe.device, self._model.tables, self._setting.processes
        share = Share.of(work, self._setting.task.batch_axis, processes)
        slots: dict[str, Tensor] = {}
        ids: dict[str, Tensor] = {}
        if tables is not None:
            needed, where = share.rows()
            tables.begin(scale)
            rows = tables.rows(self._model.declared.source, needed)
            slots = {name: rows[torch.from_numpy(places).to(device)] for name, places in where.items()}
            ids = {name: torch.from_numpy(needed[places]).to(device) for name, places in where.items()}
        inputs = {name: torch.from_numpy(values).to(device) for name, values in share.inputs().items()}
        stored = {name: torch.from_numpy(self._model.store.read(name, work.clients)) for name in self._on_device}
        users = torch.from_numpy(share.users)
        own = {name: value[users].to(device).requires_grad_() for name, value in stored.items()}
        loss = self._loss(own, slots, inputs, ids, total=float(work.inputs["weight"][:, 0].sum()))
        for group in self._adam.param_groups:
            group["lr"] = self._settings.lr * scale
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if tables is not None:
            tables.finish()
        reported = loss.detach()
        slopes = {name: _by_user(value.grad, users, stored[name]) for name, value in own.items()}
        trained = [value.grad for value in self._shared.values() if value.grad is not None]
        processes.sum([reported, *slopes.values(), *trained])
        self._adam.step()
        for name, value in stored.items():
            # The loss is a mean over users; a user's own gradient is her share of it times their number.
            stepped = value - self._setting.recipe.local.lr * scale * len(work) * slopes[name]
            self._model.store.write(name, work.clients, array(stepped))
        return float(reported)

    def _loss(
        self,
        own: dict[str, Tensor],
        slots: dict[str, Tensor],
        inputs: dict[str, Tensor],
        ids: dict[str, Tensor],
        total: float,
    ) -> Tensor:
        """The mean loss over all examples of the batch, of weight ``total``; of a share of it, its part of that."""
        name = self._setting.recipe.local.loss
        if name != "in_batch_softmax":
            return mean_loss(self._tower, name, self._shared, own, slots, inputs, total)
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


def _by_user(gradient: Tensor | None, users: Tensor, like: Tensor) -> Tensor:
    """The gradients of some users' values where everybody's are, (C, *shape)."""
    assert gradient is not None
    return torch.zeros_like(like).index_add_(0, users, gradient.cpu())
