"""Population: all the clients of a data set, and their events as jagged arrays in time order.

Needs only numpy: devices live here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Events:
    """The events of C clients, each client's oldest first; ties in time keep the order of the source.

    Shape:
        clients ``(C,)``, offsets ``(C+1,)``, items, times, ratings ``(E,)``: client ``clients[c]`` has the events
        ``offsets[c] .. offsets[c+1]-1``. Items are item rows. A rating is 1 where the data has none.
    """

    clients: IntArray
    offsets: IntArray
    items: IntArray
    times: IntArray
    ratings: FloatArray

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def lengths(self) -> IntArray:
        """How many events each client has, ``(C,)``."""
        return np.diff(self.offsets)

    @cached_property
    def owners(self) -> IntArray:
        """The position 0 .. C-1 in ``clients`` of every event's client, ``(E,)``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @cached_property
    def positions(self) -> IntArray:
        """The place of every event in its client's list, 0 for the oldest, ``(E,)``."""
        return np.arange(len(self.items), dtype=np.int64) - self.offsets[:-1][self.owners]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Test items, and negatives to rank them against, that came with the data.

    Shape:
        clients, items ``(C,)``, negatives ``(C, N)``: item rows, and -1 where a client was given none.
    """

    clients: IntArray
    items: IntArray
    negatives: IntArray


@dataclass(frozen=True)
class DataCard:
    """What a reader wants to know of a data set before its figures. Times are Unix seconds, or absent."""

    name: str
    users: int
    items: int
    interactions: int
    first_time: int | None = None
    last_time: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """The share of all user-item pairs that were seen."""
        return self.interactions / (self.users * self.items) if self.users and self.items else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values, times as ISO 8601 dates."""
        return {
            "name": self.name,
            "users": self.users,
            "items": self.items,
            "interactions": self.interactions,
            "density": self.density,
            "first_time": _date(self.first_time),
            "last_time": _date(self.last_time),
            "extra": dict(self.extra),
        }


class Population(Protocol):
    """All that training and evaluation ask of a data set. Clients and items are 0 .. n-1; features are multi-hot."""

    @property
    def num_clients(self) -> int: ...
    @property
    def num_items(self) -> int: ...
    @property
    def num_user_features(self) -> int: ...
    @property
    def num_item_features(self) -> int: ...
    @property
    def card(self) -> DataCard: ...

    def events(self, clients: IntArray) -> Events:
        """All events of these clients, no item twice for one client."""

    def user_features(self, clients: IntArray) -> FloatArray:
        """``(C,) -> (C, num_user_features)``."""

    def item_features(self, items: IntArray) -> FloatArray:
        """``(n,) -> (n, num_item_features)``."""

    def held_out(self, clients: IntArray) -> HeldOut | None:
        """The test items and negatives that came with the data, if any did."""

    def client_index(self, user: str) -> int:
        """The client whose raw id is ``user``; an unknown one is a DataError."""

    def user_name(self, client: int) -> str:
        """A client's raw id."""

    def item_name(self, item: int) -> str:
        """An item's raw id."""

    def item_title(self, item: int) -> str | None:
        """What a person would call the item, where the data says."""


class Dataset(Protocol):
    """The seam that a data set plugin fills: a frozen dataclass of settings that loads a population."""

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> Population:
        """The population; ``progress`` is told, in a few words, what takes long."""


def blocks(num_clients: int, size: int) -> Iterator[IntArray]:
    """All clients, in blocks of ``size``."""
    for start in range(0, num_clients, size):
        yield np.arange(start, min(start + size, num_clients), dtype=np.int64)


def check_rows(rows: IntArray, limit: int, noun: str) -> IntArray:
    """``rows`` as int64, refused unless they are 0 .. limit-1: a negative index would silently wrap around."""
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= limit):
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise IndexError(f"there is no {noun} {wrong}: this data has the {noun}s 0 to {limit - 1}")
    return rows


def _date(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
