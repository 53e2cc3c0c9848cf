"""Signs and a majority vote: every client sends one bit an entry, and the server steps where most of them point.

Bernstein et al., 2018, https://arxiv.org/abs/1802.04434, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Bytes, Encoded
from fedtower.core.packing import decoded, encoded, messages, pack, packed_bytes, unpack
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.sparse import decode_rows, encode_rows
from fedtower.core.transform import ROWS, visit_keys
from fedtower.core.updates import Rows, Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]
CODEC = "sign"


@dataclass(frozen=True)
class Sign:
    r"""What is sent is :math:`\operatorname{sign}(\Delta)`, and the total is ``step`` times the sign of the mean of
    those: zero where the vote is a draw. The aggregator weighs the votes.

    A zero votes by a coin, as one bit has no zero. An update that is not finite says so, for the server to refuse; so
    is a client that sends anything but signs, whose vote could weigh any amount.
    """

    step: float = field(metadata={"help": "how far the total moves every entry; times server.lr"})

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise RecipeError(f"sign's step must be positive, not {self.step}")

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        rounds, clients = visit_keys(updates)
        sent = {}
        for name, delta in updates.dense.items():
            flat = delta.reshape(len(delta), -1)
            coins = draws.bits(f"zero/{name}", rounds, clients, np.arange(flat.shape[1], dtype=np.int64))
            sent[name] = encoded(CODEC, delta.shape[1:], _signs(flat, coins))
        for table, part in updates.rows.items():
            owners, width = part.owners, part.row_deltas.shape[1]
            columns = part.row_ids[:, None] * width + np.arange(width)
            coins = draws.bits(f"zero/{ROWS}{table}", rounds[owners], clients[owners], columns)
            sent[ROWS + table] = encode_rows(CODEC, part, _signs(part.row_deltas, coins))
        return replace(updates, dense={}, rows={}, encoded={**updates.encoded, **sent}), state

    def decode(self, block: Updates) -> Updates:
        if block.dense or block.rows:
            raise UpdateError(
                f"{block.who()} sent {sorted([*block.dense, *block.rows])} as numbers, and votes are signs"
            )
        return decoded(block, CODEC, _delta_of, _rows_of)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        rows = {t: replace(part, row_deltas=self._stepped(part.row_deltas)) for t, part in total.rows.items()}
        return replace(total, dense={name: self._stepped(delta) for name, delta in total.dense.items()}, rows=rows)

    def _stepped(self, mean: FloatArray) -> FloatArray:
        return np.asarray(np.sign(mean) * np.float32(self.step), dtype=np.float32)


def _signs(flat: FloatArray, coins: NDArray[np.int64]) -> Bytes:
    """A line of (n, m) as a byte that says whether all of it is finite, and a bit an entry."""
    finite = np.asarray(np.isfinite(flat).all(axis=1, keepdims=True))
    positive = np.where(flat == 0, coins < 0, flat > 0)
    return np.concatenate([finite.astype(np.uint8), pack(positive.astype(np.uint8), 1)], axis=1)


def _signs_of(lines: Bytes, size: int) -> FloatArray:
    if np.any(lines[:, 0] > 1):
        raise UpdateError(f"signs begin with the byte 0 or 1, not {int(lines[:, 0].max())}")
    signs = unpack(lines[:, 1:], 1, size).astype(np.float32) * 2 - 1
    signs[lines[:, 0] == 0] = np.nan
    return signs


def _delta_of(part: Encoded) -> FloatArray:
    size = prod(part.shape)
    return _signs_of(messages(part, 1 + packed_bytes(size, 1)), size).reshape(-1, *part.shape)


def _rows_of(part: Encoded) -> Rows:
    width = prod(part.shape)
    offsets, ids, lines = decode_rows(part, 1 + packed_bytes(width, 1))
    return Rows(offsets, ids, _signs_of(lines, width))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "sign",
        "fedtower.plugins.transforms.sign:Sign",
        summary="one bit an entry, and a majority vote",
        capabilities={"example": {"step": 0.001}, "encodes": True},
    )
