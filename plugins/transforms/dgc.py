"""Deep Gradient Compression: a thousandth is sent, and momentum, clipping and a warm-up make it enough.

Lin et al., 2018, https://arxiv.org/abs/1712.01887, algorithm 4 and section 3; a client's delta stands for its gradient.
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
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]
CODEC = "dgc"


@dataclass(frozen=True)
class DGC:
    r"""Per client and parameter :math:`u \leftarrow m u + \Delta,\ v \leftarrow v + u`; the largest of :math:`|v|` are
    sent, and there :math:`u` and :math:`v` become zero (momentum factor masking).

    The momentum is here, so the server's optimiser should have none. What is sent of a delta adds up to between 1 and
    :math:`1 / (1 - m)` of it, the more the later it is sent. The density falls from 25 % exponentially over
    ``warmup_rounds`` rounds, where the paper has epochs. The paper takes the largest of each parameter, which are few
    of a small convolution; ``among = "all"`` takes those of all parameters as one vector. Rows have no memory: a device
    has no room for a table.
    """

    density: float = field(default=0.001, metadata={"help": "the share of entries sent after the warm-up"})
    momentum: float = field(default=0.9, metadata={"help": "m, the share of the last step that is kept; 0: none"})
    clip_norm: float | None = field(
        default=None, metadata={"help": "longest (L2, of all dense deltas) that a delta is taken at; none: any length"}
    )
    warmup_rounds: int = field(default=0, metadata={"help": "rounds over which the density falls from 25 %"})
    among: Literal["each", "all"] = field(
        default="each", metadata={"help": "the largest of each parameter, or of all parameters as one vector"}
    )
    rows: float = field(default=1.0, metadata={"help": "the share of a client's rows (the longest) that is sent"})

    def __post_init__(self) -> None:
        for name in ("density", "rows"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"dgc's {name} must be above 0 and at most 1, not {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"dgc's momentum must be at least 0 and below 1, not {self.momentum}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise RecipeError(f"dgc's clip_norm must be positive, not {self.clip_norm}; leave it out to clip nothing")
        if self.warmup_rounds < 0:
            raise RecipeError(f"dgc's warmup_rounds must be at least 0, not {self.warmup_rounds}")

    def density_of(self, round: int) -> float:
        """The share of entries sent in a round, from 1 on.

        >>> [round(DGC(density=0.001, warmup_rounds=4).density_of(r), 4) for r in (1, 2, 3, 4, 5, 6)]
        [0.25, 0.0629, 0.0158, 0.004, 0.001, 0.001]
        """
        if round > self.warmup_rounds or self.density >= 0.25:
            return self.density
        return float(0.25 * (self.density / 0.25) ** ((round - 1) / self.warmup_rounds))

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        names = ("momentum", "velocity")
        return {f"{kept}/{name}": value.shape for name, value in plan.parameters.items() for kept in names}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        momenta, velocities = {}, {}
        for name, delta in self._clipped(updates).items():
            momenta[name] = np.float32(self.momentum) * state[f"momentum/{name}"] + delta
            velocities[name] = state[f"velocity/{name}"] + momenta[name]
        sent, kept = {}, {}
        for name, mask in self._chosen(velocities, self._densities(updates)).items():
            velocity = velocities[name]
            sent[name] = encode(CODEC, velocity.shape[1:], velocity.reshape(mask.shape), mask)
            masked = mask.reshape(velocity.shape)
            kept[f"momentum/{name}"] = np.where(masked, np.float32(0), momenta[name])
            kept[f"velocity/{name}"] = np.where(masked, np.float32(0), velocity)
        rows = {table: largest_rows(part, self.rows) for table, part in updates.rows.items()}
        return replace(updates, dense={}, rows=rows, encoded={**updates.encoded, **sent}), kept

    def decode(self, block: Updates) -> Updates:
        return decode_dense(block, CODEC)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total

    def _densities(self, updates: Updates) -> NDArray[np.float64]:
        rounds = np.full(len(updates), self.warmup_rounds + 1) if updates.rounds is None else updates.rounds
        return np.array([self.density_of(round) for round in rounds.tolist()])

    def _chosen(
        self, velocities: Mapping[str, FloatArray], densities: NDArray[np.float64]
    ) -> Mapping[str, NDArray[np.bool_]]:
        """Where the entries are that are sent, (C, n) of each parameter."""
        flat = {name: velocity.reshape(len(velocity), -1) for name, velocity in velocities.items()}
        if self.among == "each" or not flat:
            return {name: _largest_of(each, densities) for name, each in flat.items()}
        whole = _largest_of(np.concatenate(list(flat.values()), axis=1), densities)
        ends = np.cumsum([each.shape[1] for each in flat.values()])[:-1]
        return dict(zip(flat, np.split(whole, ends, axis=1), strict=True))

    def _clipped(self, updates: Updates) -> Mapping[str, FloatArray]:
        """The deltas, none longer than ``clip_norm``: of one client, before they enter what it has accumulated."""
        if self.clip_norm is None or not updates.dense:
            return updates.dense
        flat = {name: delta.reshape(len(updates), -1) for name, delta in updates.dense.items()}
        length = np.sqrt(sum(np.square(delta, dtype=np.float64).sum(axis=1) for delta in flat.values()))
        factor = np.ones(len(updates))
        long = np.isfinite(length) & (length > self.clip_norm)  # what is not finite is for the server to refuse
        factor[long] = self.clip_norm / length[long]
        return {
            name: (flat[name] * factor[:, None]).astype(np.float32).reshape(delta.shape)
            for name, delta in updates.dense.items()
        }


def _largest_of(flat: FloatArray, densities: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the largest of each line are; lines of one density, which those of one round are, are looked at at once."""
    mask = np.zeros(flat.shape, dtype=bool)
    for density in np.unique(densities).tolist():
        lines = densities == density
        mask[lines] = largest(flat[lines], num_kept(flat.shape[1], density))
    return mask


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "dgc",
        "fedtower.plugins.transforms.dgc:DGC",
        summary="Deep Gradient Compression: a thousandth is sent, with momentum correction and a warm-up",
        capabilities={"encodes": True, "sparse": True, "sends_values": True, "stateful": True},
    )
