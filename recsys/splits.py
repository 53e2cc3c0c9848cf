"""Split: which of a client's events are for training, which for validation, and which for the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, LeakError, RecipeError, nearest
from fedtower.recsys.population import Events, Population

BoolArray = NDArray[np.bool_]
RoleArray = NDArray[np.int8]

TRAIN, VALIDATION, TEST = 0, 1, 2
"""The roles of an event."""

SplitKind = Literal["leave_one_out", "leave_two_out", "time", "random", "ncf", "given"]
SPLITS: tuple[SplitKind, ...] = ("leave_one_out", "leave_two_out", "time", "random", "ncf", "given")

# A time split of a million generated clients asks this many of them where its quantile lies: the standard error of a
# quantile over so many clients is far below a day in a year.
_QUANTILE_CLIENTS = 20_000


@runtime_checkable
class Assigned(Protocol):
    """A population whose events came with their roles."""

    def roles(self, clients: NDArray[np.int64]) -> RoleArray:
        """The role of every event of these clients, (E,)."""
        ...


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
        if self.kind == "given":
            return _assigned(self.population).roles(events.clients)
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
    * ``given``: every event's role came with the data (``shards``).

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
    if kind == "given":
        _assigned(population)
    # One training event is enough where nothing has to come first.
    least = 2 + (validation and kind != "random") if min_events is None else min_events
    return Split(kind, validation, test_fraction, draws, least, population, edges)


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
    edges = np.quantile(times, [1 - held, 1 - test], method="higher")
    return float(edges[0]), float(edges[1])


def _assigned(population: Population) -> Assigned:
    if not isinstance(population, Assigned):
        raise DataError(
            f"data.split = 'given' needs data whose events came with their roles, which shards are, and "
            f"{population.card.name!r} is not; use 'leave_one_out'"
        )
    return population


def _no_given_split(population: Population) -> DataError:
    return DataError(
        f"data.split = 'ncf' needs test items and negatives that come with the data, and {population.card.name!r} has "
        "none; for movielens 1m put ncf.test.rating, ncf.test.negative and ncf_item_map.csv beside ratings.dat, "
        "or use 'leave_one_out'"
    )
