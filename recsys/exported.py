"""ExportedRuntime: a simulation that trains as devices do, from a bundle that it exports of the model it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Work
from fedtower.core.updates import Updates
from fedtower.recsys.device import DeviceRuntime, Format
from fedtower.recsys.export import cached_bundle
from fedtower.recsys.graphs import Visit
from fedtower.recsys.models import Declared


@dataclass(frozen=True)
class ExportedRuntime:
    """What a visit looks like is known when the first one comes; the export waits for it."""

    model: Declared
    local: LocalSettings
    format: Format
    _opened: dict[Visit, DeviceRuntime] = field(default_factory=dict, repr=False)

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, NDArray[np.float32]]]:
        """The updates of the clients of ``work``, and what their device parameters have become.

        Raises:
            ExportError: the model cannot be exported.
            InputError: the plan or the data does not fit the graph.
            EngineError: the engine failed or died.
        """
        # An engine is fed whole arrays: what is looked up here would be looked up in a table that it does not have.
        work = replace(work, inputs={name: np.asarray(value) for name, value in work.inputs.items()})
        visit = Visit.of(self.model, work, self.model.cloud.width)
        if visit not in self._opened:
            bundle = cached_bundle(self.model, self.local, visit, self.format.suffix)
            self._opened[visit] = DeviceRuntime(bundle, self.local, self.format)
        return self._opened[visit].train(plan, work)
