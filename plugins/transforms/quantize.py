"""Quantisation: every number in 8, 4, 2 or 1 bit, and a scale for each bucket of them.

QSGD (:mod:`fedtower.core.buckets`). 2 bits are the three values of TernGrad (Wen et al.,
2017, https://arxiv.org/abs/1705.07878). After a sparsifier, the values that it sends are quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.buckets import Buckets
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Encoded
from fedtower.core.packing import as_bytes, as_floats, decoded, encoded, messages, pack, packed_bytes, unpack
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.sparse import decode_rows, encode_rows, parted
from fedtower.core.transform import ROWS, visit_keys
from fedtower.core.updates import Rows, Updates

States = Mapping[str, NDArray[np.float32]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Quantize:
    r"""Each entry as :math:`s\,q / L` with a whole :math:`|q| \le L = 2^{b-1} - 1`, where :math:`s` is the largest of
    its bucket without signs: of 512 entries of a parameter in order, or of one row of a table. With one bit it is
    :math:`\pm s`. Of what a sparsifier before it sends the places stay as they are, and the values are the entries.

    ``stochastic`` rounds up with the probability that makes the mean exact. ``nearest`` is off by half a step at most;
    with one bit its :math:`s` is the mean without signs, which is then nearest (Seide et al., 2014).
    """

    bits: Literal[8, 4, 2, 1] = field(default=8, metadata={"help": "of each number"})
    rounding: Literal["stochastic", "nearest"] = field(
        default="stochastic", metadata={"help": "right on average, or as near as can be"}
    )

    @property
    def codec(self) -> str:
        """What the bytes are called."""
        return f"quantize{self.bits}"

    @property
    def buckets(self) -> Buckets:
        """What makes bits of numbers."""
        return Buckets(self.bits, nearest=self.rounding == "nearest")

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        rounds, clients = visit_keys(updates)
        sent = {}
        for name, delta in updates.dense.items():
            flat = delta.reshape(len(delta), -1)
            lots = self._lots(draws, name, rounds, clients, np.arange(flat.shape[1], dtype=np.int64))
            sent[name] = encoded(self.codec, delta.shape[1:], self.buckets.encode(flat, lots))
        for table, part in updates.rows.items():
            owners = part.owners
            columns = part.row_ids[:, None] * part.row_deltas.shape[1] + np.arange(part.row_deltas.shape[1])
            lots = self._lots(draws, ROWS + table, rounds[owners], clients[owners], columns)
            sent[ROWS + table] = self._rows(part, lots)
        for name, encoded_before in updates.encoded.items():  # by a sparsifier: nothing else may stand before this
            sent[name] = self._sparse(name, encoded_before, draws, rounds, clients)
        return replace(updates, dense={}, rows={}, encoded=sent), state

    def decode(self, block: Updates) -> Updates:
        outer = f"{self.codec} of "
        encoded_before = {
            name: self._sparse_of(part, part.codec.removeprefix(outer)) if part.codec.startswith(outer) else part
            for name, part in block.encoded.items()
        }
        return decoded(replace(block, encoded=encoded_before), self.codec, self._delta_of, self._rows_of)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total

    def _lots(self, draws: Draws, name: str, *key: NDArray[np.int64]) -> NDArray[np.float64] | float:
        return draws.uniform(f"rounding/{name}", *key) if self.rounding == "stochastic" else 0.5

    def _delta_of(self, part: Encoded) -> FloatArray:
        size = prod(part.shape)
        data = messages(part, self.buckets.length(size))
        return self.buckets.decode(data, size).reshape(len(data), *part.shape)

    def _rows(self, part: Rows, lots: NDArray[np.float64] | float) -> Encoded:
        scales = self.buckets.scales(part.row_deltas, part.row_deltas.shape[1])[:, None]
        codes = self.buckets.codes(part.row_deltas, np.broadcast_to(scales, part.row_deltas.shape), lots)
        return encode_rows(self.codec, part, np.concatenate([as_bytes(scales), pack(codes, self.bits)], axis=1))

    def _rows_of(self, part: Encoded) -> Rows:
        width = prod(part.shape)
        offsets, ids, data = decode_rows(part, 4 + packed_bytes(width, self.bits))
        scales = np.broadcast_to(as_floats(data[:, :4]), (len(ids), width))
        return Rows(offsets, ids, self.buckets.values(unpack(data[:, 4:], self.bits, width), scales))

    def _sparse(
        self, name: str, part: Encoded, draws: Draws, rounds: NDArray[np.int64], clients: NDArray[np.int64]
    ) -> Encoded:
        """The same message with its values quantised, each drawn for the place where it stands."""
        heads, places, values = parted(part)
        lots = [
            self._lots(draws, name, rounds[client], clients[client], where[None]) for client, where in enumerate(places)
        ]
        lines = [
            head + self.buckets.encode(as_floats(data[None]), lot).tobytes()
            for head, data, lot in zip(heads, values, lots, strict=True)
        ]
        return Encoded.of(f"{self.codec} of {part.codec}", part.shape, lines)

    def _sparse_of(self, part: Encoded, codec: str) -> Encoded:
        """The message as ``codec`` made it, with the values that were meant."""
        heads, places, quantised = parted(part)
        lines = [
            head + as_bytes(self._delta_of(Encoded.of(self.codec, (len(where),), [data.tobytes()]))).tobytes()
            for head, where, data in zip(heads, places, quantised, strict=True)
        ]
        return Encoded.of(codec, part.shape, lines)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "quantize",
        "fedtower.plugins.transforms.quantize:Quantize",
        summary="every number of an update in 8, 4, 2 or 1 bit",
        capabilities={"encodes": True, "unbiased": True, "takes_values": True},
    )
