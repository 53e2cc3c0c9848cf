"""The plain runtime: one client after another, one step after another. Every faster runtime has to agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import step_rows
from fedtower.core.runtime import Work, as_updates
from fedtower.core.updates import Updates
from fedtower.recsys.models import Declared
from fedtower.recsys.step import Step, Tensors, make_step

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TorchLoop:
    """Runs the step in a Python loop."""

    def open(self, model: Declared, local: LocalSettings) -> Loop:
        """The runtime for one model and one kind of visit."""
        return Loop(make_step(model.shared, local, model.on_device))


@dataclass(frozen=True)
class Loop:
    """``torch_loop`` with a model in it."""

    step: Step

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """The updates of the clients of ``work``, and what their device parameters have become."""
        rows = {source: values.copy() for source, values in work.rows.items()}
        after = {
            name: np.empty((len(work), *value.shape), dtype=np.float32)
            for name, value in [*plan.parameters.items(), *((name, values[0]) for name, values in work.states.items())]
        }
        losses = np.zeros(len(work))
        shared = {name: torch.from_numpy(value) for name, value in plan.parameters.items()}
        for client in range(len(work)):
            parameters: Tensors = shared | {
                name: torch.from_numpy(np.asarray(values[client])) for name, values in work.states.items()
            }
            mine = {source: slice(*needed.offsets[client : client + 2]) for source, needed in work.row_ids.items()}
            state: Tensors = self.step.init(parameters)
            for at in range(int(work.steps[client])):
                inputs = {name: torch.from_numpy(np.array(values[client, at])) for name, values in work.inputs.items()}
                places = {name: values[client, at] for name, values in work.slots.items()}
                held = {name: rows[source][mine[source]] for source in rows for name in places}
                slots = {name: torch.from_numpy(held[name][where]) for name, where in places.items()}
                parameters, state, slopes, loss = self.step(parameters, state, slots, inputs, plan.local.lr)
                losses[client] += float(loss) / work.steps[client]
                for source in rows if plan.train_rows else ():
                    rows[source][mine[source]] = _stepped(
                        rows[source][mine[source]], places, slopes, plan.local.rows_lr
                    )
            for name, value in parameters.items():
                after[name][client] = value.numpy()
        return as_updates(plan, work, after, rows, losses), {name: after[name] for name in work.states}


def _stepped(rows: FloatArray, places: Mapping[str, IntArray], slopes: Tensors, lr: float) -> FloatArray:
    """One client's rows after the gradients of all its slots."""
    where = np.concatenate([each.reshape(-1) for each in places.values()])
    flat = np.concatenate([slopes[name].numpy().reshape(-1, rows.shape[1]) for name in places])
    return step_rows(rows, where, flat, lr)
