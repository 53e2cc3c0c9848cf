"""Drawing items that the user did not choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.recsys.history import Events

IntArray = NDArray[np.int64]

# A client that has touched half of the catalogue is refused so often once in 2**32 draws; then what is left to it is
# listed, which costs a pass over the catalogue.
_ATTEMPTS = 32
# Further attempts that one call draws: little is refused four times more, and a call has a price.
_AT_ONCE = 4
# A look at a table of bits costs a tenth of a search among sorted keys, as long as the table stays in the cache.
_LARGEST_TABLE = 1 << 23


def uniform_negatives(events: Events, num_items: int, steps: int, count: int, draws: Draws, round: int) -> IntArray:
    """Items drawn uniformly, with replacement, from those that are in none of a client's ``events``.

    Given all of them, no negative is a held-out item; given the training events alone, one may be. Keyed by (round,
    client, step, position): the same negatives whatever block the client is visited in.

    Shape:
        C clients -> (C, steps, count)

    Raises:
        DataError: a client that has touched every item.
    """
    refused = _Touched.of(events, num_items)
    clients = events.clients[:, None, None]
    step = np.arange(steps, dtype=np.int64)[None, :, None]
    position = np.arange(count, dtype=np.int64)[None, None, :]
    owner = np.arange(len(events), dtype=np.int64)[:, None, None]

    chosen = draws.integers(num_items, "negatives", round, clients, step, position, 0)
    c, s, n = np.nonzero(refused.holds(owner, chosen))
    for first in range(1, _ATTEMPTS, _AT_ONCE):
        if not len(c):
            return chosen
        attempts = np.arange(first, min(first + _AT_ONCE, _ATTEMPTS), dtype=np.int64)
        again = draws.integers(
            num_items, "negatives", round, events.clients[c][:, None], s[:, None], n[:, None], attempts
        )
        bad = refused.holds(c[:, None], again)
        # The first that is not refused; that of the last attempt, which is refused too, where all of them are.
        chosen[c, s, n] = again[np.arange(len(c)), np.where(bad.all(axis=1), len(attempts) - 1, bad.argmin(axis=1))]
        left = bad.all(axis=1)
        c, s, n = c[left], s[left], n[left]
    for client in np.unique(c):
        mine = c == client
        left = np.setdiff1d(np.arange(num_items, dtype=np.int64), events.items[events.owners == client])
        if not len(left):
            raise DataError(
                f"client {events.clients[client]} has touched all of the {num_items} items, so there are no negatives "
                f"for it; leave such clients out of the data, or use a larger catalogue"
            )
        where = draws.integers(len(left), "negatives", round, events.clients[c[mine]], s[mine], n[mine], _ATTEMPTS)
        chosen[c[mine], s[mine], n[mine]] = left[where]
    return chosen


@dataclass(frozen=True)
class _Touched:
    """The items of each client of a block, as a table of bits if that is small, or else as sorted keys."""

    num_items: int
    table: NDArray[np.bool_] | None  # (C * num_items,)
    keys: IntArray

    @staticmethod
    def of(events: Events, num_items: int) -> _Touched:
        keys = events.owners * num_items + events.items
        if len(events) * num_items > _LARGEST_TABLE:
            return _Touched(num_items, None, np.sort(keys))
        table = np.zeros(len(events) * num_items, dtype=bool)
        table[keys] = True
        return _Touched(num_items, table, keys)

    def holds(self, owners: IntArray, items: IntArray) -> NDArray[np.bool_]:
        """Whether each owner has touched the item; both broadcast."""
        wanted = owners * self.num_items + items
        if self.table is not None:
            return np.asarray(self.table[wanted])
        if not len(self.keys):
            return np.zeros(wanted.shape, dtype=bool)
        return np.asarray(self.keys[np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)] == wanted)
