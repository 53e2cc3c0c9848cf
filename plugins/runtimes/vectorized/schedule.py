"""Who is in which lane when: known before the first step, because it is known how many steps everybody has."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """T turns of K lanes: in each turn every lane makes one step of one client, and a client stays in its lane.

    Shape:
        ``client`` (T, K), the place in the block, or that of anybody where the lane is idle; ``step`` (T, K), which of
        the client's steps; ``busy`` (T, K), false where the lane is idle.
    """

    client: IntArray
    step: IntArray
    busy: NDArray[np.bool_]
    last: NDArray[np.bool_]  # (T, K), true where it is the client's last step

    @staticmethod
    def of(clients: IntArray, steps: IntArray, lanes: int) -> Schedule:
        """A lane takes the next client when its own is done, clients with most steps first, so that ragged clients
        leave few lanes idle.

        >>> Schedule.of(np.array([4, 5, 6]), np.array([1, 3, 1]), lanes=2).client
        array([[5, 4],
               [5, 6],
               [5, 4]])
        """
        order = np.argsort(-steps, kind="stable")
        free = [(0, lane) for lane in range(lanes)]
        begin, lane = np.zeros(len(clients), dtype=np.int64), np.zeros(len(clients), dtype=np.int64)
        for place in order.tolist():
            begin[place], lane[place] = free[0]
            heapq.heapreplace(free, (int(begin[place] + steps[place]), int(lane[place])))
        shape = (int((begin + steps).max(initial=0)), lanes)
        client, step = np.full(shape, clients[0] if len(clients) else 0), np.zeros(shape, dtype=np.int64)
        busy, last = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        within = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps)
        turn, where = np.repeat(begin, steps) + within, np.repeat(lane, steps)
        client[turn, where], step[turn, where], busy[turn, where] = np.repeat(clients, steps), within, True
        last[begin + steps - 1, lane] = True
        return Schedule(client, step, busy, last)

    def __len__(self) -> int:
        return len(self.client)
