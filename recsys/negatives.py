"""Drawing items that the user did not choose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.recsys.history import Events

IntArray = NDArray[np.int64]

# A client that has touched half of the catalogue is refused so often once in 2**32 draws; then what is left to it is
# listed, which costs a pass over the catalogue.
_ATTEMPTS = 32


def uniform_negatives(events: Events, num_items: int, steps: int, count: int, draws: Draws, round: int) -> IntArray:
    """Items drawn uniformly, with replacement, from those that each client never touched, held-out items included.

    Keyed by (round, client, step, position): the same negatives whatever block the client is visited in.

    Shape:
        C clients -> (C, steps, count)

    Raises:
        DataError: a client that has touched every item.
    """
    touched = np.sort(events.owners * num_items + events.items)
    clients = events.clients[:, None, None]
    step = np.arange(steps, dtype=np.int64)[None, :, None]
    position = np.arange(count, dtype=np.int64)[None, None, :]
    base = np.arange(len(events), dtype=np.int64)[:, None, None] * num_items

    chosen = draws.integers(num_items, "negatives", round, clients, step, position, 0)
    c, s, n = np.nonzero(_contains(touched, base + chosen))
    for attempt in range(1, _ATTEMPTS):
        if not len(c):
            return chosen
        again = draws.integers(num_items, "negatives", round, events.clients[c], s, n, attempt)
        chosen[c, s, n] = again
        refused = _contains(touched, c * num_items + again)
        c, s, n = c[refused], s[refused], n[refused]
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


def _contains(ordered: IntArray, keys: IntArray) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(keys.shape, dtype=bool)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)] == keys)
