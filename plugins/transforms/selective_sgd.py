"""Selective SGD: a client shares a part of its gradient, the largest entries or random ones, each cut to a range.

Shokri and Shmatikov, 2015, https://doi.org/10.1145/2810103.2813687, section 5 and figure 5, without its noise. Their
download of a part of the parameters is ``[download]`` with the part ``selective``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.sparse import decode_dense, encode, largest, largest_rows, num_kept
from fedtower.core.transform import visit_keys
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]
CODEC = "selective_sgd"


@dataclass(frozen=True)
class SelectiveSGD:
    r"""A part of each client's delta, chosen over all dense parameters as one vector; the rest is lost.

    ``largest``: the share ``upload`` that is largest without signs. ``threshold``: a random such share of what is above
    ``threshold`` (all, if that is fewer). ``random``: a random such share. What is sent is cut to
    :math:`[-\text{bound}, \text{bound}]`.
    """

    upload: float = field(default=0.1, metadata={"help": "theta_u: the share of the entries that is sent"})
    select: Literal["largest", "threshold", "random"] = field(
        default="largest", metadata={"help": "which entries: the largest, random ones above threshold, or any"}
    )
    threshold: float = field(default=0.0, metadata={"help": "tau: with threshold, only entries above it are sent"})
    bound: float | None = field(
        default=None, metadata={"help": "gamma: entries are cut to this range; none: to no range"}
    )
    rows: float = field(default=1.0, metadata={"help": "the share of a client's rows (the longest) that is sent"})

    def __post_init__(self) -> None:
        for name in ("upload", "rows"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"selective_sgd's {name} must be above 0 and at most 1, not {getattr(self, name)}")
        if self.bound is not None and not self.bound > 0:
            raise RecipeError(f"selective_sgd's bound must be positive, not {self.bound}; leave it out to cut nothing")
        if (self.select == "threshold") != (self.threshold > 0):
            raise RecipeError(
                f'selective_sgd needs a threshold above 0 with select = "threshold", and none with another; it is '
                f"{self.threshold} with {self.select!r}"
            )

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        rows = {table: largest_rows(part, self.rows) for table, part in updates.rows.items()}
        if not updates.dense:
            return replace(updates, rows=rows), state
        flat = {name: delta.reshape(len(delta), -1) for name, delta in updates.dense.items()}
        whole = np.concatenate(list(flat.values()), axis=1)
        mask = self._chosen(whole, updates, draws)
        values = whole
        if self.bound is not None:  # what is not finite is not cut: it is for the server to refuse
            values = np.where(np.isfinite(whole), np.clip(whole, -self.bound, self.bound), whole)
        sent, start = {}, 0
        for name, delta in flat.items():
            entries = slice(start, start := start + delta.shape[1])
            sent[name] = encode(CODEC, updates.dense[name].shape[1:], values[:, entries], mask[:, entries])
        return replace(updates, dense={}, rows=rows, encoded={**updates.encoded, **sent}), state

    def decode(self, block: Updates) -> Updates:
        return decode_dense(block, CODEC)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total

    def _chosen(self, whole: FloatArray, updates: Updates, draws: Draws) -> NDArray[np.bool_]:
        count = num_kept(whole.shape[1], self.upload)
        if self.select == "largest":
            return largest(whole, count)
        # The largest of positive draws are a random choice; what may not be chosen has none.
        lots = 1.0 - draws.uniform("selected", *visit_keys(updates), np.arange(whole.shape[1], dtype=np.int64))
        allowed = ~(np.abs(whole) <= self.threshold) if self.select == "threshold" else np.ones(whole.shape, dtype=bool)
        lots[~allowed] = 0.0
        return largest(lots, count) & allowed


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "selective_sgd",
        "fedtower.plugins.transforms.selective_sgd:SelectiveSGD",
        summary="a part of the update is shared: the largest, those above a threshold, or random ones",
        capabilities={"encodes": True, "sparse": True, "sends_values": True},
    )
