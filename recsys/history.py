"""Events: what clients touched, in time order; which of it is held out; and the histories that a model may see.

Everything here is blocks of C clients over jagged arrays, needs only numpy, and runs on a device too. Three words:
a *population* is all the clients of a data set, a *split* gives every event its role (training, validation, test), and
a *history* is the newest training events before a target, never the target or anything after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, LeakError, RecipeError, nearest
from fedtower.recsys.vocabulary import Vocabulary

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
RoleArray = NDArray[np.int8]

TRAIN, VALIDATION, TEST = 0, 1, 2
"""The roles of an event."""

SplitKind = Literal["leave_one_out", "leave_two_out", "time", "random", "ncf"]
SPLITS: tuple[SplitKind, ...] = ("leave_one_out", "leave_two_out", "time", "random", "ncf")

# A time split of a million generated clients asks this many of them where its quantile lies: the standard error of a
# quantile over so many clients is far below a day in a year.
_QUANTILE_CLIENTS = 20_000


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
        order = np.lexsort((times, client_rows))  # stable: ties keep the order of the file
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


@dataclass(frozen=True, eq=False)
class SplitParts:
    """The role of every event of a block, ``(E,)``: 0 training, 1 validation, 2 test."""

    role: RoleArray

    def where(self, role: int) -> BoolArray:
        """Which events have this role, ``(E,)``."""
        return np.asarray(self.role == role)


@dataclass(frozen=True)
class Split:
    """A rule that gives every event its role, whatever block the event is asked for in; `make_split` makes one."""

    kind: SplitKind
    validation: bool
    test_fraction: float
    draws: Draws
    min_events: int
    population: Population
    edges: tuple[float, float] = (np.inf, np.inf)

    def parts(self, events: Events) -> SplitParts:
        """The role of every event.

        Raises:
            LeakError: a held-out item is also among the training events of its client.
        """
        parts = SplitParts(self._roles(events))
        check_split(events, parts)
        return parts

    def _roles(self, events: Events) -> RoleArray:
        if self.kind == "time":
            return self._by_thresholds(events.times > self.edges[0], events.times > self.edges[1])
        if self.kind == "random":
            at = self.draws.uniform("split", events.clients[events.owners], events.items)
            held = 2 * self.test_fraction if self.validation else self.test_fraction
            role = self._by_thresholds(at < held, at < self.test_fraction)
            return np.where(events.lengths[events.owners] >= self.min_events, role, np.int8(TRAIN))
        if self.kind == "ncf":
            return self._as_given(events)
        return _last_of_each(events, self.validation, self.min_events)

    @staticmethod
    def _by_thresholds(held: BoolArray, test: BoolArray) -> RoleArray:
        return np.where(test, TEST, np.where(held, VALIDATION, TRAIN)).astype(np.int8)

    def _as_given(self, events: Events) -> RoleArray:
        given = self.population.held_out(events.clients)
        if given is None:
            raise _no_given_split(self.population)
        test = events.items == given.items[events.owners]
        missing = (given.items >= 0) & (np.bincount(events.owners[test], minlength=len(events)) == 0)
        if missing.any():
            at = int(np.flatnonzero(missing)[0])
            raise DataError(
                f"the given test item of user {self.population.user_name(int(events.clients[at]))} "
                f"(item {self.population.item_name(int(given.items[at]))}) is not among that user's events; "
                "the split's files belong to other ratings"
            )
        role = np.where(test, TEST, TRAIN).astype(np.int8)
        if self.validation:
            left = np.bincount(events.owners[~test], minlength=len(events))
            # The newest event that is not the test item: the largest position among the others.
            newest = np.full(len(events), -1, dtype=np.int64)
            np.maximum.at(newest, events.owners[~test], events.positions[~test])
            enough = (left >= self.min_events - 1) & (given.items >= 0)
            role[(events.positions == newest[events.owners]) & enough[events.owners]] = VALIDATION
        return role


def make_split(
    kind: str,
    population: Population,
    *,
    validation: bool,
    test_fraction: float = 0.2,
    draws: Draws,
    min_events: int | None = None,
) -> Split:
    """The split of a recipe.

    * ``leave_one_out``: a client's last event is test; with ``validation`` the one before it is validation.
    * ``leave_two_out``: the last event is test and the one before it validation, always.
    * ``time``: events after a global quantile of time are test: the newest ``test_fraction``; with ``validation`` the
      same share before them is validation.
    * ``random``: each event is test with probability ``test_fraction``, and validation with the same.
    * ``ncf``: the test item is the one that came with the data; with ``validation`` the newest other one is validation.

    A client with fewer than ``min_events`` events keeps them all in training and has no test case: by default as many
    as are held out, and one more. (Not by time, where keeping later events in training would be a leak.)

    Raises:
        RecipeError: an unknown kind, or a fraction that leaves nothing to train on.
        DataError: the data has no clock (``time``), or came without a split of its own (``ncf``).
    """
    if kind not in SPLITS:
        raise RecipeError(f"data.split = {kind!r} is not a split{nearest(kind, SPLITS)}; there are {', '.join(SPLITS)}")
    validation = validation or kind == "leave_two_out"
    if kind in ("time", "random") and not 0 < test_fraction * (1 + validation) < 1:
        raise RecipeError(
            f"data.test_fraction = {test_fraction} leaves nothing to train on or nothing to test; expected more than 0 "
            f"and less than {1 / (1 + validation)}{', as validation takes as much again' if validation else ''}"
        )
    edges = (np.inf, np.inf)
    if kind == "time":
        edges = _time_edges(population, test_fraction * (1 + validation), test_fraction, draws)
    if kind == "ncf" and population.held_out(np.zeros(0, dtype=np.int64)) is None:
        raise _no_given_split(population)
    # One training event is enough where nothing has to come first.
    least = 2 + (validation and kind != "random") if min_events is None else min_events
    return Split(kind, validation, test_fraction, draws, least, population, edges)


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


def check_split(events: Events, parts: SplitParts) -> None:
    """Refuse a block in which a client's held-out item is there again in training, or is held out twice.

    Raises:
        LeakError: naming the first such client and item.
    """
    held = parts.role != TRAIN
    if not held.any():
        return
    width = int(events.items.max()) + 1
    keys = events.owners * width + events.items
    held_keys = np.sort(keys[held])
    twice = held_keys[1:][held_keys[1:] == held_keys[:-1]]
    at = np.minimum(np.searchsorted(held_keys, keys), len(held_keys) - 1)
    leaked = keys[(held_keys[at] == keys) & ~held]
    if leaked.size or twice.size:
        owner, item = divmod(int((leaked if leaked.size else twice)[0]), width)
        raise LeakError(
            f"item row {item} is held out for client {events.clients[owner]} and is there again among that client's "
            f"{'training' if leaked.size else 'held-out'} events; a data set must list an item once for each user "
            "(keep the last time), or every figure of the run would be too good"
        )


def check_leak(targets: IntArray, seen: IntArray, what: str, mask: BoolArray | None = None) -> None:
    """Refuse targets ``(M,)`` that are among what a model is shown for them, ``(M, n)``: a history, or negatives.

    >>> check_leak(np.array([3]), np.array([[1, 3]]), "negatives")
    Traceback (most recent call last):
    fedtower.core.errors.LeakError: item row 3 is a target and is also in its own negatives (case 0); ...
    """
    hit = seen == targets[:, None]
    if mask is not None:
        hit &= mask
    if hit.any():
        case = int(np.flatnonzero(hit.any(axis=1))[0])
        raise LeakError(
            f"item row {targets[case]} is a target and is also in its own {what} (case {case}); "
            "a model must be shown only what came before, and negatives that the user never touched"
        )


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


def _last_of_each(events: Events, validation: bool, min_events: int) -> RoleArray:
    """Leave-one-out and leave-two-out."""
    lengths = events.lengths
    role = np.zeros(len(events.items), dtype=np.int8)
    last = events.offsets[1:][lengths >= max(min_events, 1 + validation)] - 1
    role[last] = TEST
    if validation:
        role[last - 1] = VALIDATION
    return role


def _time_edges(population: Population, held: float, test: float, draws: Draws) -> tuple[float, float]:
    """The times after which events are validation, and test: quantiles over the events of at most 20,000 clients."""
    if population.card.first_time is None:
        raise DataError(
            f"data.split = 'time' needs real times, but the times of {population.card.name!r} only order each user's "
            "own events; use 'leave_one_out' or 'leave_two_out'"
        )
    clients = np.arange(population.num_clients, dtype=np.int64)
    if len(clients) > _QUANTILE_CLIENTS:
        clients = np.sort(draws.permutation(len(clients), "split/clients")[:_QUANTILE_CLIENTS])
    times = population.events(clients).times
    # An edge is a time that occurs: events in the same second are on the same side of it.
    edges = np.quantile(times, [1 - held, 1 - test], method="lower")
    return float(edges[0]), float(edges[1])


def _no_given_split(population: Population) -> DataError:
    return DataError(
        f"data.split = 'ncf' needs test items and negatives that come with the data, and {population.card.name!r} has "
        "none; for movielens 1m put ncf.test.rating, ncf.test.negative and ncf_item_map.csv beside ratings.dat, "
        "or use 'leave_one_out'"
    )


def _last_of_each_pair(client_rows: IntArray, item_rows: IntArray, num_items: int) -> BoolArray:
    """Which rows are the last of their (client, item) pair."""
    keys = client_rows * num_items + item_rows
    order = np.argsort(keys, kind="stable")
    last = np.ones(len(keys), dtype=np.bool_)
    last[order[:-1]] = keys[order[1:]] != keys[order[:-1]]
    return last


def _date(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
