"""Low rank: a matrix as two thin ones, found by a step of the power iteration that goes on from visit to visit.

After Vogels et al., 2019, https://arxiv.org/abs/1905.13727 (PowerSGD), algorithms 1 and 2. There all workers average
the left factor before they make the right one, which needs two exchanges a round; here each client factorises what is
its own, in one, and the server multiplies and averages: a total's rank may be all clients' ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Encoded
from fedtower.core.packing import as_bytes, as_floats, decoded, encoded, messages
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.transform import visit_keys
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    r"""Of :math:`M = r + \Delta`, a matrix (n, m), the factors :math:`P` (n, rank), orthonormal columns of :math:`M Q`,
    and :math:`Q \leftarrow M^\top P` (m, rank); :math:`Q` and the residual :math:`r \leftarrow M - P Q^\top` stay on
    the client.

    A convolution is a matrix of a line for each channel out. What two factors would make no smaller (vectors, small
    matrices) is sent as it is, and so are rows of tables: a block of few rows is of a low rank already.
    """

    rank: int = field(default=2, metadata={"help": "columns of each factor"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"low_rank's rank must be at least 1, not {self.rank}")

    @property
    def codec(self) -> str:
        """What the bytes are called."""
        return f"low_rank{self.rank}"

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        kept: dict[str, tuple[int, ...]] = {}
        for name, value in plan.parameters.items():
            if self._pays(value.shape):
                kept |= {f"residual/{name}": value.shape, f"right/{name}": (_matrix(value.shape)[1], self.rank)}
        return kept

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        rounds, clients = visit_keys(updates)
        sent, kept = {}, {}
        for name in [name for name, delta in updates.dense.items() if self._pays(delta.shape[1:])]:
            shape = updates.dense[name].shape[1:]
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is for the server to refuse
                whole = (
                    (updates.dense[name] + state[f"residual/{name}"]).reshape(-1, *_matrix(shape)).astype(np.float64)
                )
                right = state[f"right/{name}"].astype(np.float64)
                fresh = draws.normal(f"right/{name}", rounds, clients, np.arange(right[0].size if len(right) else 0))
                unused = ~np.any(right, axis=(1, 2), keepdims=True)
                left = _orthonormal(whole @ np.where(unused, fresh.reshape(right.shape), right))
                right = np.swapaxes(whole, 1, 2) @ left
                factors = [_flat(left), _flat(right)]
                back = factors[0].reshape(left.shape) @ np.swapaxes(factors[1].reshape(right.shape), 1, 2)
                kept[f"residual/{name}"] = (whole - back).astype(np.float32).reshape(-1, *shape)
            kept[f"right/{name}"] = factors[1].reshape(right.shape)
            sent[name] = encoded(self.codec, shape, as_bytes(np.concatenate(factors, axis=1)))
        plain = {name: delta for name, delta in updates.dense.items() if name not in sent}
        return replace(updates, dense=plain, encoded={**updates.encoded, **sent}), kept

    def decode(self, block: Updates) -> Updates:
        return decoded(block, self.codec, self._delta_of)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total

    def _pays(self, shape: tuple[int, ...]) -> bool:
        lines, columns = _matrix(shape)
        return (lines + columns) * self.rank < lines * columns

    def _delta_of(self, part: Encoded) -> FloatArray:
        lines, columns = _matrix(part.shape)
        factors = as_floats(messages(part, 4 * (lines + columns) * self.rank))
        left = factors[:, : lines * self.rank].reshape(-1, lines, self.rank)
        right = factors[:, lines * self.rank :].reshape(-1, columns, self.rank)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(left @ np.swapaxes(right, 1, 2), dtype=np.float32).reshape(-1, *part.shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter's lines and columns.

    >>> _matrix((16, 6, 5, 5)), _matrix((84,)), _matrix(())
    ((16, 150), (84, 1), (1, 1))
    """
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns that span those of (C, n, k); where they are fewer than k dimensions, some others too."""
    spanning: NDArray[np.float64] = np.linalg.qr(columns).Q
    return spanning


def _flat(values: NDArray[np.float64]) -> FloatArray:
    return np.asarray(values.reshape(len(values), -1), dtype=np.float32)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "low_rank",
        "fedtower.plugins.transforms.low_rank:LowRank",
        summary="a matrix as two thin ones, and what they miss remembered",
        capabilities={"example": {"rank": 1}, "encodes": True, "stateful": True},
    )
