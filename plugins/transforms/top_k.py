"""Top-k with error feedback: the largest entries are sent, and what was not is remembered and added the next time.

Stich et al., 2018, https://arxiv.org/abs/1809.07599, algorithm 1; Aji and Heafield, 2017, https://arxiv.org/abs/1704.05021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.sparse import decode_dense, encode, largest, largest_rows, num_kept
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
CODEC = "top_k"


@dataclass(frozen=True)
class TopK:
    r"""Of each parameter the share ``density`` of the entries of :math:`r + \Delta` that are largest without their
    signs (at least one), where the residual :math:`r` is what the same client has not sent so far.

    Rows have no residual: a device has no room for a table. Those with the longest deltas are sent, whole.
    """

    density: float = field(metadata={"help": "the share of each parameter's entries that is sent"})
    rows: float = field(default=1.0, metadata={"help": "the share of a client's rows that is sent"})
    feedback: bool = field(default=True, metadata={"help": "remember what was not sent; without, it is lost"})

    def __post_init__(self) -> None:
        for name in ("density", "rows"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"top_k's {name} must be above 0 and at most 1, not {getattr(self, name)}")

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {name: value.shape for name, value in plan.parameters.items()} if self.feedback else {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        sent, kept = {}, {}
        for name, delta in updates.dense.items():
            whole = delta + state[name] if self.feedback else delta
            flat = whole.reshape(len(whole), -1)
            mask = largest(flat, num_kept(flat.shape[1], self.density))
            sent[name] = encode(CODEC, delta.shape[1:], flat, mask)
            kept[name] = np.where(mask, np.float32(0), flat).reshape(delta.shape)
        rows = {table: largest_rows(part, self.rows) for table, part in updates.rows.items()}
        updates = replace(updates, dense={}, rows=rows, encoded={**updates.encoded, **sent})
        return updates, kept if self.feedback else state

    def decode(self, block: Updates) -> Updates:
        return decode_dense(block, CODEC)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "top_k",
        "fedtower.plugins.transforms.top_k:TopK",
        summary="the largest entries are sent, the others remembered",
        capabilities={
            "example": {"density": 0.01},
            "encodes": True,
            "sparse": True,
            "sends_values": True,
            "stateful": True,
        },
    )
