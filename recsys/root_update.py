"""RootUpdate: what the cloud makes of a plan from public data of its own, for aggregators that compare with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GridSum
from fedtower.core.client import ClientData, fetch
from fedtower.core.control import corrected
from fedtower.core.errors import DataError
from fedtower.core.plan import Plan
from fedtower.core.rows import RowStore
from fedtower.core.runtime import Runtime, Work
from fedtower.core.updates import Updates
from fedtower.recsys.models import Declared
from fedtower.recsys.tasks import Task

IntArray = NDArray[np.int64]

WIDTH = 256  # users at a time


@dataclass
class RootUpdate:
    """``root(plan)``: a block of one client, the mean update of the users whose data is public.

    Each of them makes the visit that the plan asks of clients. What they would keep on a device begins anew every time:
    nothing of it is kept.

    Args:
        task: The public data's.
        rows: Where their rows come from.
    """

    task: Task
    declared: Declared
    rows: RowStore | None
    runtime: Runtime
    _data: ClientData = field(init=False)

    def __post_init__(self) -> None:
        self._data = self.task.client_data()

    def __call__(self, plan: Plan) -> Updates:
        """The mean update.

        Raises:
            DataError: the public data holds nothing to train on.
        """
        total, weight = GridSum(), 0.0
        for start in range(0, self.task.num_clients, WIDTH):
            users = np.arange(start, min(start + WIDTH, self.task.num_clients), dtype=np.int64)
            work = self._work(plan, users)
            updates, states = self.runtime.train(plan, work)
            if plan.local.control != "none":
                updates, _ = corrected(plan, work.states, updates, states)
            total.add(updates, updates.weights)
            weight += float(updates.weights.sum())
        if not weight:
            raise DataError(
                f"the {self.task.num_clients} users that rows.public.share sets apart hold nothing to train on; set a "
                f"larger share apart, or choose others by another seed"
            )
        return total.total()

    def _work(self, plan: Plan, users: IntArray) -> Work:
        work = self._data.work(plan, users)
        own = {
            name: np.repeat(value[None], len(users), axis=0)
            for name, value in self.declared.device_parameters().items()
        }
        if self.rows is None:
            return replace(work, states=own)
        fetched = {source: fetch(self.rows, source, needed) for source, needed in work.row_ids.items()}
        return replace(work, states=own, rows=fetched)
