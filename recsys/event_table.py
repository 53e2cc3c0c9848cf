"""EventTable: a population in memory, every client's events one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.population import DataCard, Events, FloatArray, HeldOut, IntArray, check_rows
from fedtower.recsys.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class EventTable:
    """A population in memory: every client's events one after another, ``offsets`` saying where each begins."""

    card: DataCard
    users: Vocabulary
    item_ids: Vocabulary
    log: Events
    user_table: FloatArray
    item_table: FloatArray
    titles: tuple[str | None, ...] = ()
    given: HeldOut | None = None

    @classmethod
    def build(
        cls,
        name: str,
        *,
        users: Vocabulary,
        items: Vocabulary,
        client_rows: IntArray,
        item_rows: IntArray,
        times: IntArray,
        ratings: FloatArray | None = None,
        times_are_ranks: bool = False,
        user_table: FloatArray | None = None,
        item_table: FloatArray | None = None,
        titles: tuple[str | None, ...] = (),
        given: HeldOut | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> EventTable:
        """A table of interactions ``(E,)`` in any order.

        Each client's events are put in time order, ties in the order given; of an item that a client touched twice only
        the last event stays. ``times_are_ranks`` says that times order one client's events and mean nothing else.
        """
        if not len(client_rows):
            raise DataError(f"the data set {name!r} has no interactions; is its file empty, or a filter too strict?")
        order = _in_time_order(client_rows, times)
        client_rows, item_rows, times = client_rows[order], item_rows[order], times[order]
        ratings = np.ones(len(order), np.float32) if ratings is None else ratings[order].astype(np.float32, copy=False)
        keep = _last_of_each_pair(client_rows, item_rows, len(items))
        dropped = len(keep) - int(keep.sum())
        if dropped:
            client_rows, item_rows, times, ratings = client_rows[keep], item_rows[keep], times[keep], ratings[keep]
        counts = np.bincount(client_rows, minlength=len(users))
        told = dict(extra or {})
        if dropped:
            told["duplicates"] = f"{dropped:,} repeated user-item pairs left out, the last one of each kept"
        if times_are_ranks:
            told["times"] = "positions in each user's history, so there is no time span"
        card = DataCard(
            name,
            users=len(users),
            items=len(items),
            interactions=len(item_rows),
            first_time=None if times_are_ranks else int(times.min()),
            last_time=None if times_are_ranks else int(times.max()),
            extra=told,
        )
        return cls(
            card,
            users,
            items,
            log=Events(
                clients=np.arange(len(users), dtype=np.int64),
                offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                items=item_rows.astype(np.int64, copy=False),
                times=times.astype(np.int64, copy=False),
                ratings=ratings,
            ),
            user_table=np.zeros((len(users), 0), np.float32) if user_table is None else user_table,
            item_table=np.zeros((len(items), 0), np.float32) if item_table is None else item_table,
            titles=titles,
            given=given,
        )

    @property
    def num_clients(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_user_features(self) -> int:
        return int(self.user_table.shape[1])

    @property
    def num_item_features(self) -> int:
        return int(self.item_table.shape[1])

    def events(self, clients: IntArray) -> Events:
        """All events of these clients, in time order."""
        clients = check_rows(clients, self.num_clients, "client")
        starts = self.log.offsets[clients]
        offsets = np.concatenate([[0], np.cumsum(self.log.offsets[clients + 1] - starts)]).astype(np.int64)
        at = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], np.diff(offsets))
        return Events(clients, offsets, self.log.items[at], self.log.times[at], self.log.ratings[at])

    def user_features(self, clients: IntArray) -> FloatArray:
        """``(C,) -> (C, num_user_features)``."""
        return self.user_table[check_rows(clients, self.num_clients, "client")]

    def item_features(self, items: IntArray) -> FloatArray:
        """``(n,) -> (n, num_item_features)``."""
        return self.item_table[check_rows(items, self.num_items, "item")]

    def held_out(self, clients: IntArray) -> HeldOut | None:
        """The test items and negatives that came with the data, if any did."""
        if self.given is None:
            return None
        clients = check_rows(clients, self.num_clients, "client")
        return HeldOut(clients, self.given.items[clients], self.given.negatives[clients])

    def client_index(self, user: str) -> int:
        """The client whose raw id is ``user``."""
        return self.users.row(user)

    def user_name(self, client: int) -> str:
        """A client's raw id."""
        return self.users.name(client)

    def item_name(self, item: int) -> str:
        """An item's raw id."""
        return self.item_ids.name(item)

    def item_title(self, item: int) -> str | None:
        """An item's title, where the data has one."""
        return self.titles[item] if self.titles else None


def _in_time_order(client_rows: IntArray, times: IntArray) -> IntArray:
    """Sorts by client, then by time; stable, so that ties keep the order of the file."""
    since = times - times.min()
    span = int(since.max()) + 1
    if span * (int(client_rows.max()) + 1) >= 2**63:
        return np.lexsort((times, client_rows))
    # One key instead of two: 25 million rows in 3 s instead of 20.
    return np.argsort(client_rows * span + since, kind="stable")


def _last_of_each_pair(client_rows: IntArray, item_rows: IntArray, num_items: int) -> NDArray[np.bool_]:
    """Which rows are the last of their (client, item) pair."""
    keys = client_rows * num_items + item_rows
    order = np.argsort(keys, kind="stable")
    last = np.ones(len(keys), dtype=np.bool_)
    last[order[:-1]] = keys[order[1:]] != keys[order[:-1]]
    return last
