"""PublicRows: the cloud's part trained on public data of the cloud's own, while the towers stand still."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.errors import DataError, RecipeError
from fedtower.core.plan import LocalSettings, PublicSettings
from fedtower.core.runtime import Work
from fedtower.core.store import ClientStore
from fedtower.recsys.central import common_rows, mean_loss
from fedtower.recsys.models import Declared, array
from fedtower.recsys.own_model import is_own
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import Labelled, Task

FloatArray = NDArray[np.float32]
Parameters = Mapping[str, FloatArray]


class PublicRows:
    """Steps on public data, numbered through all rounds: which batch a step takes depends on its number alone.

    A step goes back from the mean loss of a batch, through the rows, into the tables and the cloud's tower, which their
    own optimisers step at the rates of ``[rows]``. The shared parameters are those of the round and do not move. What a
    user of the public data would keep on her device (``on_device``) the cloud keeps for her, stepped at ``local.lr``.

    Args:
        task: The public data's.

    Raises:
        RecipeError: the model has no rows, or has parameters that live on devices and the data pools their clients.
        DataError: there is nothing to train on.
    """

    def __init__(
        self, task: Task, declared: Declared, tables: CloudTables | None, local: LocalSettings, settings: PublicSettings
    ) -> None:
        if tables is None:
            raise RecipeError(
                "public data trains the rows of the cloud's tables, and this model has none; leave out rows.train = "
                '"public" and rows.public.warmup, or choose a model with tables'
            )
        # There is no round, so there is no drift, and nothing that a copy would be pulled to.
        self._own = [name for name in declared.on_device if is_own(name)]
        if self._own and isinstance(task, Labelled):
            raise RecipeError(
                f"the parameters {', '.join(self._own)} live on devices, one value for each client, but a "
                f"step on public labelled examples takes the examples of all of them at once; set rows.train = "
                f'"device_updates" and leave out rows.public.warmup'
            )
        if not task.central_steps:
            raise DataError(
                f"the {task.num_clients} silos that rows.public.share sets apart as public data hold no examples to "
                f"train on; set a larger share apart, or choose others by another seed"
            )
        self._task, self._declared, self._tables = task, declared, tables
        self._local, self._settings = local, settings
        self._device = tables.device
        self.store = ClientStore(task.num_clients)
        for name in self._own:
            self.store.declare(name, declared.device_parameters()[name])
        self._steps: Iterator[Work] = iter(())
        self._next = -1  # the number of the step that comes out of _steps next

    @property
    def generation(self) -> int:
        """That of the tables it trains."""
        return self._tables.generation

    def warm_up(self, parameters: Parameters, lr_scale: float) -> None:
        """The steps before the first round."""
        self._take(0, self._settings.warmup, parameters, lr_scale)

    def train(self, round: int, parameters: Parameters, lr_scale: float) -> None:
        """The steps of this round."""
        steps = self._settings.steps
        self._take(self._settings.warmup + (round - 1) * steps, steps, parameters, lr_scale)

    def _take(self, first: int, steps: int, parameters: Parameters, lr_scale: float) -> None:
        if self._next != first:
            self._steps = stream(self._task, first)
        for _, work in zip(range(steps), self._steps, strict=False):
            if work.examples.sum():
                self._step(work, parameters, lr_scale)
        self._next = first + steps

    def _step(self, work: Work, parameters: Parameters, lr_scale: float) -> None:
        needed, where = common_rows(work)
        self._tables.begin(lr_scale)
        rows = self._tables.rows(self._declared.source, needed)
        slots = {name: rows[self._tensor(places)] for name, places in where.items()}
        inputs = {name: self._tensor(np.array(values[:, 0])) for name, values in work.inputs.items()}
        shared = {name: self._tensor(value) for name, value in parameters.items()}
        own = {name: self._tensor(self.store.read(name, work.clients)) for name in self._own}
        for value in own.values():
            value.requires_grad_()
        loss = mean_loss(self._declared.shared, self._local.loss, shared, own, slots, inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        self._tables.finish()
        for name, value in own.items():
            assert value.grad is not None
            # The loss is a mean over users; a user's own gradient is her share of it times their number.
            stepped = value.detach() - self._local.lr * lr_scale * len(work) * value.grad
            self.store.write(name, work.clients, array(stepped))

    def _tensor(self, value: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(value).to(self._device)


def stream(task: Task, first: int) -> Iterator[Work]:
    """The steps of a task's central training, epoch after epoch without end, from the step numbered ``first`` on."""
    before, start = divmod(first, task.central_steps)
    for epoch in count(before + 1):
        yield from task.central(epoch, start)
        start = 0
