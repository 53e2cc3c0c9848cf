"""Public data: a part of a data set that is set apart as the cloud's own, so that those it is of are no clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.recsys.examples import ExampleCard, Examples, ExampleSet
from fedtower.recsys.population import DataCard, Events, HeldOut, Population, check_rows
from fedtower.recsys.splits import Assigned

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Card = TypeVar("Card", DataCard, ExampleCard)


def set_apart(num_clients: int, share: float, draws: Draws) -> tuple[IntArray, IntArray]:
    """The clients that stay, and those whose data is public, both in order: ``share`` of all, at least one of each.

    Raises:
        DataError: there are not two of them.
    """
    if num_clients < 2:
        raise DataError(
            f"rows.public.share sets users apart as the cloud's public data, but this data has {num_clients}: there "
            f"must be two or more, one of them to be a client"
        )
    count = min(max(round(share * num_clients), 1), num_clients - 1)
    order = draws.permutation(num_clients, "public data")
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True, eq=False)
class PartOfPopulation:
    """The clients ``members`` (C,) of a population as one of their own, numbered 0 .. C-1; items stay as they are."""

    whole: Population
    members: IntArray

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self.members)

    @property
    def num_items(self) -> int:
        """As many as the whole has."""
        return self.whole.num_items

    @property
    def num_user_features(self) -> int:
        """As many as the whole has."""
        return self.whole.num_user_features

    @property
    def num_item_features(self) -> int:
        """As many as the whole has."""
        return self.whole.num_item_features

    @property
    def card(self) -> DataCard:
        """The whole's, with a remark."""
        return _remarked(self.whole.card, self.whole.num_clients, len(self.members))

    def events(self, clients: IntArray) -> Events:
        """All events of these clients."""
        return replace(self.whole.events(self._of_whole(clients)), clients=clients)

    def user_features(self, clients: IntArray) -> FloatArray:
        """Their features."""
        return self.whole.user_features(self._of_whole(clients))

    def item_features(self, items: IntArray) -> FloatArray:
        """The items' features."""
        return self.whole.item_features(items)

    def held_out(self, clients: IntArray) -> HeldOut | None:
        """The test items and negatives that came with the data, if any did."""
        given = self.whole.held_out(self._of_whole(clients))
        return None if given is None else replace(given, clients=clients)

    def client_index(self, user: str) -> int:
        """The client whose raw id is ``user``; one that is not among them is a DataError."""
        member = self.whole.client_index(user)
        at = int(np.searchsorted(self.members, member))
        if at == len(self.members) or self.members[at] != member:
            raise DataError(
                f"the user {user!r} is no client of this run: rows.public.share set her data apart as the cloud's own; "
                f"choose another user"
            )
        return at

    def user_name(self, client: int) -> str:
        """A client's raw id."""
        return self.whole.user_name(int(self.members[client]))

    def item_name(self, item: int) -> str:
        """An item's raw id."""
        return self.whole.item_name(item)

    def item_title(self, item: int) -> str | None:
        """What a person would call the item."""
        return self.whole.item_title(item)

    def _of_whole(self, clients: IntArray) -> IntArray:
        return self.members[check_rows(clients, len(self.members), "client")]


class PartOfAssigned(PartOfPopulation):
    """Clients of a population whose events came with their roles."""

    def roles(self, clients: IntArray) -> NDArray[np.int8]:
        """The role of every event of these clients, (E,)."""
        assert isinstance(self.whole, Assigned)
        return self.whole.roles(self._of_whole(clients))


def part_of(whole: Population, members: IntArray) -> PartOfPopulation:
    """The clients ``members`` of a population, with their events' roles where these came with the data."""
    return (PartOfAssigned if isinstance(whole, Assigned) else PartOfPopulation)(whole, members)


@dataclass(frozen=True, eq=False)
class PartOfExamples:
    """The clients ``members`` (C,) of an example set, numbered 0 .. C-1; what is held out is the whole's."""

    whole: ExampleSet
    members: IntArray

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self.members)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The whole's."""
        return self.whole.dense_shape

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """The whole's."""
        return self.whole.cardinalities

    @property
    def num_classes(self) -> int:
        """The whole's."""
        return self.whole.num_classes

    @property
    def counted_over_everyone(self) -> bool:
        """The whole's."""
        return self.whole.counted_over_everyone

    @property
    def card(self) -> ExampleCard:
        """The whole's, with a remark."""
        return _remarked(self.whole.card, self.whole.num_clients, len(self.members))

    def examples(self, clients: IntArray) -> Examples:
        """The training examples of these clients."""
        clients = check_rows(clients, len(self.members), "client")
        return replace(self.whole.examples(self.members[clients]), clients=clients)

    def held_out(self, role: Literal["validation", "test"]) -> Examples:
        """The held-out examples of the whole, which belong to nobody who trains."""
        return self.whole.held_out(role)


def _remarked(card: Card, whole: int, part: int) -> Card:
    remark = f"{part:,} of the {whole:,} are clients; the others' data is the cloud's own (rows.public.share)"
    return replace(card, extra={**card.extra, "clients": remark})
