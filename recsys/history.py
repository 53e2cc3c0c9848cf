"""Histories: what a model may see of a client, which is never the target or anything after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.recsys.event_table import EventTable
from fedtower.recsys.population import DataCard, Dataset, Events, HeldOut, IntArray, Population, blocks, check_rows
from fedtower.recsys.splits import SPLITS, TEST, TRAIN, VALIDATION, Split, SplitParts, check_split, make_split

__all__ = [
    "SPLITS",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "DataCard",
    "Dataset",
    "EventTable",
    "Events",
    "HeldOut",
    "Histories",
    "Moment",
    "Population",
    "Split",
    "SplitParts",
    "blocks",
    "check_rows",
    "check_split",
    "histories",
    "look_back",
    "make_split",
]

BoolArray = NDArray[np.bool_]
Moment = Literal["validation", "test", "now"]

# Roles below this may be seen. When the test item is ranked, the validation item is in the past.
_BEFORE: dict[Moment, int] = {"validation": VALIDATION, "test": TEST, "now": TEST + 1}


@dataclass(frozen=True, eq=False)
class Histories:
    """The newest events before M targets, the newest first, padded to L.

    Shape:
        items ``(M, L)`` item rows, 0 where padded; mask ``(M, L)``, true where there is an event.
    """

    items: IntArray
    mask: BoolArray


def histories(events: Events, usable: BoolArray, owners: IntArray, cut: IntArray, length: int) -> Histories:
    """What a model may see of M targets: the newest ``length`` usable events among the first ``cut`` of each client.

    ``usable`` ``(E,)`` is true for training events. ``owners`` ``(M,)`` says which client of the block a target belongs
    to, ``cut`` ``(M,)`` how many of that client's events came before the target. The target itself and everything after
    it are beyond the cut, whatever ``usable`` says of them.

    >>> block = Events(np.array([7]), np.array([0, 4]), np.array([5, 6, 8, 9]), np.arange(4), np.ones(4, np.float32))
    >>> seen = histories(block, np.array([True, False, True, True]), np.array([0]), np.array([3]), length=3)
    >>> seen.items, seen.mask
    (array([[8, 5, 0]]), array([[ True,  True, False]]))
    """
    lengths = events.lengths[owners]
    if cut.size and bool(((cut < 0) | (cut > lengths)).any()):
        at = int(np.flatnonzero((cut < 0) | (cut > lengths))[0])
        raise ValueError(f"target {at} is cut at {cut[at]}, but its client has {lengths[at]} events")
    # before[e] usable events come before event e of the block, so a client's are before[cut] - before[first].
    before = np.concatenate([[0], np.cumsum(usable)]).astype(np.int64)
    chosen = events.items[usable]
    first = before[events.offsets[:-1][owners]]
    last = before[events.offsets[:-1][owners] + cut]
    at = last[:, None] - 1 - np.arange(length, dtype=np.int64)
    mask = at >= first[:, None]
    if not len(chosen):
        return Histories(np.zeros_like(at), mask)
    return Histories(np.where(mask, chosen[np.where(mask, at, 0)], 0), mask)


def look_back(
    population: Population, split: Split, moment: Moment, clients: IntArray, cut: IntArray, length: int
) -> tuple[IntArray, IntArray]:
    """The items that a model may look back on, oldest first, and how many of them are real.

    ``moment`` says what a history may hold: up to the validation item, up to the test item (the validation item is in
    the past by then), or everything (``now``: recommending). ``cut`` (M,) says how many events of each case's client
    come before the case.

    Shape:
        items ``(M, length)``, 0 where there is none; counts ``(M,)``
    """
    distinct, owners = np.unique(clients, return_inverse=True)
    events = population.events(distinct)
    usable = split.parts(events).role < _BEFORE[moment]
    seen = histories(events, usable, owners, cut, length)
    count = seen.mask.sum(axis=1).astype(np.int64)
    # The newest comes first there and last here: slot j holds the event that is count - 1 - j back.
    back = np.maximum(count[:, None] - 1 - np.arange(length), 0)
    return np.take_along_axis(seen.items, back, axis=1), count
