"""Synthetic: clients with taste, sessions and habits, generated on demand, so that a first run needs no download.

A long-tailed catalogue (Zipf-Mandelbrot) is divided into genres. A client has a group and a few favourite genres, which
its group sways and which change one at a time; it visits in sessions, each in one of those genres; so the last few
events say most about the next one. Activity is log-normal, clipped to 20 .. 2,300 events as in MovieLens 1M (mean 165,
median 96).

Every number is a hash of what it is for (a client, a position, an attempt), so a client has the same events whatever
block it is asked for in, and a million clients take no memory until they are asked for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.recsys.population import DataCard, Events, HeldOut, blocks, check_rows

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

FEWEST, MOST = 20, 2_300  # events a client: MovieLens 1M has 20 to 2,314
GROUPS = 8
GENRES = (
    *("Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama", "Family", "Fantasy"),
    *("History", "Horror", "Musical", "Mystery", "Noir", "Romance", "Science", "Sport", "Thriller", "Western"),
)
_ADJECTIVES = (
    *("Amber", "Ancient", "Bitter", "Blue", "Broken", "Burning", "Crimson", "Distant", "Empty", "Endless"),
    *("Fading", "Final", "Frozen", "Gentle", "Golden", "Green", "Hidden", "Hollow", "Iron", "Last"),
    *("Lonely", "Lost", "Lucky", "Midnight", "Narrow", "Painted", "Pale", "Quiet", "Red", "Restless"),
    *("Secret", "Seventh", "Silent", "Silver", "Sleeping", "Stolen", "Sudden", "Velvet", "Wandering", "Winter"),
)
_NOUNS = (
    *("Anchor", "Archive", "Bridge", "Canyon", "Castle", "Circle", "City", "Clock", "Coast", "Compass"),
    *("Crossing", "Engine", "Falcon", "Feather", "Forest", "Garden", "Harbour", "Horizon", "Island", "Journey"),
    *("Kingdom", "Lantern", "Letter", "Lighthouse", "Market", "Meadow", "Mirror", "Mountain", "Orchard", "Palace"),
    *("Promise", "Rain", "River", "Road", "Shadow", "Song", "Station", "Summer", "Tower", "Voyage"),
)

# The shape of taste: four favourites, the first the strongest; a favourite lasts twelve sessions of eight events on
# average; six in ten favourites are the group's; 30 % of events are led by popularity alone. With these an oracle that
# knows each session's genre reaches twice popularity's HR@10 (99 negatives, .83 against .40), as on MovieLens 1M.
_FAVOURITES, _FAVOURITE_SESSIONS, _SESSION_EVENTS = 4, 12, 8
_GROUP_GENRES, _GROUP_SHARE, _TASTE_SHARE = 3, 0.6, 0.7
# The flat head of the catalogue, as a share of it: a larger one makes popularity a weaker guide.
_HEAD = 0.01
_CHUNK = 256  # clients generated at once: their table of who has what is 256 x items
_CACHED_EVENTS = 4_000_000  # about 110 MB of recent blocks

_START = 1_577_836_800  # 2020-01-01
_SPAN = 3 * 365 * 86_400


@dataclass(frozen=True)
class Synthetic:
    """A seeded generator of clients; the run's seed is the seed."""

    users: int = field(default=1_000, metadata={"help": "how many clients, up to 1,000,000"})
    items: int = field(default=3_000, metadata={"help": "how many items, at least 200"})
    mean_events: float = field(default=165.0, metadata={"help": "mean number of events of a client, at least 21"})
    taste: float = field(default=1.0, metadata={"help": "0: everybody follows popularity, 1: mostly one's own taste"})

    def __post_init__(self) -> None:
        if not 1 <= self.users <= 1_000_000:
            raise ValueError(f"users must be 1 to 1,000,000, but is {self.users}")
        if self.items < 200:
            raise ValueError(
                f"items must be at least 200 (99 negatives come from what a user left), but is {self.items}"
            )
        if not 0.0 <= self.taste <= 1.0:
            raise ValueError(f"taste must be 0 to 1, but is {self.taste}")
        if not FEWEST < self.mean_events <= self.most_events / 2:
            raise ValueError(
                f"mean_events must be more than {FEWEST} and at most {self.most_events // 2} with {self.items} items "
                f"(a client has at most {self.most_events} events), but is {self.mean_events}"
            )

    @property
    def most_events(self) -> int:
        """Nobody has more events than this, nor more than half of the catalogue."""
        return min(MOST, self.items // 2)

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> SyntheticPopulation:
        """The population; nothing is generated yet but the catalogue."""
        return SyntheticPopulation(self, draws)


class SyntheticPopulation:
    """Clients whose events are generated when they are asked for."""

    def __init__(self, settings: Synthetic, draws: Draws) -> None:
        self.settings = settings
        self.draws = draws
        self.catalogue = Catalogue(settings.items, draws)
        self._mu = _log_normal_mu(settings.mean_events, FEWEST, settings.most_events)
        self._recent: OrderedDict[bytes, Events] = OrderedDict()

    @property
    def num_clients(self) -> int:
        return self.settings.users

    @property
    def num_items(self) -> int:
        return self.settings.items

    @property
    def num_user_features(self) -> int:
        return GROUPS

    @property
    def num_item_features(self) -> int:
        return len(GENRES)

    @cached_property
    def card(self) -> DataCard:
        """The card; its number of interactions is the exact sum of every client's activity."""
        return DataCard(
            "synthetic",
            users=self.num_clients,
            items=self.num_items,
            interactions=sum(int(self.activity(block).sum()) for block in blocks(self.num_clients, 1 << 16)),
            first_time=_START,
            last_time=_START + _SPAN,
            extra={
                "source": f"generated from seed {self.draws.seed}, taste {self.settings.taste:g}",
                "licence": "none needed",
                "user features": f"group ({GROUPS})",
                "item features": f"genres ({len(GENRES)})",
            },
        )

    def activity(self, clients: IntArray) -> IntArray:
        """How many events each of these clients has."""
        wanted = np.exp(self._mu + self.draws.normal("data/activity", clients))
        return np.clip(np.rint(wanted), FEWEST, self.settings.most_events).astype(np.int64)

    def events(self, clients: IntArray) -> Events:
        """All events of these clients, in time order."""
        clients = check_rows(clients, self.num_clients, "client")
        key = clients.tobytes()
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        made = _joined(clients, [self._generate(clients[at : at + _CHUNK]) for at in range(0, len(clients), _CHUNK)])
        self._recent[key] = made
        while sum(len(block.items) for block in self._recent.values()) > _CACHED_EVENTS:
            self._recent.popitem(last=False)
        return made

    def groups(self, clients: IntArray) -> IntArray:
        """The group of each client, ``(C,)``."""
        return self.draws.integers(GROUPS, "data/group", clients)

    def user_features(self, clients: IntArray) -> FloatArray:
        """The client's group, one-hot: ``(C,) -> (C, 8)``."""
        return np.eye(GROUPS, dtype=np.float32)[self.groups(check_rows(clients, self.num_clients, "client"))]

    def item_features(self, items: IntArray) -> FloatArray:
        """The item's genres, multi-hot: ``(n,) -> (n, 20)``."""
        return self.catalogue.genre_table[check_rows(items, self.num_items, "item")]

    def held_out(self, clients: IntArray) -> HeldOut | None:
        """Nothing: this data comes without a split of its own."""
        return None

    def client_index(self, user: str) -> int:
        """The client called ``u0``, ``u1``, ...; the number alone will do."""
        number = user.removeprefix("u")
        if not number.isascii() or not number.isdigit() or int(number) >= self.num_clients:
            raise DataError(f"there is no user {user!r}: the generated users are u0 to u{self.num_clients - 1}")
        return int(number)

    def user_name(self, client: int) -> str:
        """``u17`` for client 17."""
        return f"u{client}"

    def item_name(self, item: int) -> str:
        """``i17`` for item 17."""
        return f"i{item}"

    def item_title(self, item: int) -> str | None:
        """A made-up title with its genre."""
        return self.catalogue.title(item)

    def _generate(self, clients: IntArray) -> Events:
        draws, lengths = self.draws, self.activity(clients)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        owner = np.repeat(np.arange(len(clients), dtype=np.int64), lengths)
        place = np.arange(offsets[-1], dtype=np.int64) - offsets[:-1][owner]
        client = clients[owner]

        starts = (place == 0) | (draws.uniform("data/session", client, place) < 1 / _SESSION_EVENTS)
        genre = self.session_genres(client[starts], _counted_from_zero(starts, offsets, owner)[starts])
        genre = np.repeat(genre, np.diff(np.append(np.flatnonzero(starts), len(starts))))
        led = draws.uniform("data/led", client, place) < _TASTE_SHARE * self.settings.taste

        items = self._choose(client, place, owner, np.where(led, genre, len(GENRES)))
        liked = draws.integers(np.where(led, 3, 4), "data/rating", client, place)
        return Events(
            clients, offsets, items, self._times(clients, offsets, owner, place, starts), _ratings(liked, led)
        )

    def session_genres(self, clients: IntArray, sessions: IntArray) -> IntArray:
        """The genre of the given session of each client: one of the favourites that the client has by then."""
        draws = self.draws
        slot = (_FAVOURITES * draws.uniform("data/slot", clients, sessions) ** 1.5).astype(np.int64)
        # Shifted by slot, so that favourites are replaced one at a time.
        phase = (sessions + slot * (_FAVOURITE_SESSIONS // _FAVOURITES)) // _FAVOURITE_SESSIONS
        sway = draws.uniform("data/sway", clients, slot, phase) < _GROUP_SHARE
        chosen = draws.integers(_GROUP_GENRES, "data/of_group", clients, slot, phase)
        of_group = draws.integers(len(GENRES), "data/group_genre", self.groups(clients), chosen)
        return np.where(sway, of_group, draws.integers(len(GENRES), "data/favourite", clients, slot, phase))

    def _choose(self, client: IntArray, place: IntArray, owner: IntArray, shelf: IntArray) -> IntArray:
        """One item an event from its shelf, none twice for a client: a taken one is drawn again, attempt by attempt."""
        items = np.empty(len(client), dtype=np.int64)
        taken_by = np.full(int(owner[-1]) * self.num_items + self.num_items, len(client), dtype=np.int64)
        waiting = np.arange(len(client), dtype=np.int64)
        attempt = 0
        while len(waiting):
            at = self.draws.uniform("data/item", client[waiting], place[waiting], attempt)
            drawn = self.catalogue.draw(at, _shelf(shelf[waiting], attempt))
            key = owner[waiting] * self.num_items + drawn
            # The earlier event wins: written last to first, the first stays. What an earlier attempt took stays taken.
            free = taken_by[key] == len(client)
            taken_by[key[free][::-1]] = waiting[free][::-1]
            won = taken_by[key] == waiting
            items[waiting[won]] = drawn[won]
            waiting = waiting[~won]
            attempt += 1
        return items

    def _times(
        self, clients: IntArray, offsets: IntArray, owner: IntArray, place: IntArray, starts: NDArray[np.bool_]
    ) -> IntArray:
        """Seconds: sessions days apart, events within one minutes apart, all inside the client's own stay.

        In whole numbers throughout: a running sum of floats would depend on who else is in the block.
        """
        draws = self.draws
        joined = draws.integers(_SPAN * 7 // 10, "data/joined", clients)
        stay = (_SPAN - joined) // 20 + draws.integers((_SPAN - joined) * 19 // 20, "data/stay", clients)
        wait = draws.integers(np.where(starts, 600_000, 600), "data/wait", clients[owner], place) + 1
        passed = _counted_from_zero(wait, offsets, owner)
        whole = passed[offsets[1:] - 1] + 1
        return _START + joined[owner] + stay[owner] * passed // whole[owner]


class Catalogue:
    """Items with a popularity, a genre and a title. Rows are in random order: a row number says nothing."""

    def __init__(self, num_items: int, draws: Draws) -> None:
        self.num_items = num_items
        self.draws = draws
        self.by_rank = draws.permutation(num_items, "data/rank")  # the row of the most popular item, the next, ...
        # Every 20 neighbours in popularity are dealt to the 20 genres, so that genres are equally popular.
        rank = np.arange(num_items, dtype=np.int64)
        dealt = np.argsort(rank // len(GENRES) + draws.uniform("data/genre", rank), kind="stable")
        genre_of_rank = np.empty(num_items, dtype=np.int64)
        genre_of_rank[dealt] = rank % len(GENRES)
        self.genres = np.empty(num_items, dtype=np.int64)
        self.genres[self.by_rank] = genre_of_rank
        # Shelf g holds genre g, most popular first; the last shelf holds everything.
        shelves = [self.by_rank[genre_of_rank == g] for g in range(len(GENRES))]
        self.shelf_items = np.concatenate([*shelves, self.by_rank])
        self.shelf_sizes = np.array([*(len(shelf) for shelf in shelves), num_items], dtype=np.int64)
        self.shelf_starts = np.cumsum(self.shelf_sizes) - self.shelf_sizes

    def draw(self, at: NDArray[np.float64], shelf: IntArray) -> IntArray:
        r"""The items at these quantiles of their shelves' popularity; shelf -1 is everything, all equally popular.

        .. math:: p(r) \propto \log\frac{r + 1 + q}{r + q}, \quad r = 0 \ldots n-1, \; q = .01 n

        close to Zipf-Mandelbrot's :math:`1 / (r + q)`, and with an inverse that needs no table.
        """
        size = self.shelf_sizes[shelf]
        zipf = _HEAD * (np.power(1 + 1 / _HEAD, at) - 1)
        rank = (size * np.where(shelf < 0, at, zipf)).astype(np.int64)
        return np.asarray(self.shelf_items[self.shelf_starts[shelf] + np.minimum(rank, size - 1)])

    def popularity(self) -> NDArray[np.float64]:
        """The probability of every item when popularity alone leads, ``(I,)``."""
        edges = np.log1p(np.arange(self.num_items + 1) / (_HEAD * self.num_items)) / np.log1p(1 / _HEAD)
        chance = np.empty(self.num_items)
        chance[self.by_rank] = np.diff(edges)
        return chance

    @cached_property
    def genre_table(self) -> FloatArray:
        """The genres that the item is labelled with: mostly its own, and for a third of the items another one too."""
        rows = np.arange(self.num_items, dtype=np.int64)
        table = np.zeros((self.num_items, len(GENRES)), dtype=np.float32)
        labelled = self.draws.uniform("data/label", rows) < 0.95
        table[rows[labelled], self.genres[labelled]] = 1
        other = self.draws.integers(len(GENRES), "data/other", rows)
        more = (self.draws.uniform("data/more", rows) < 0.35) | ~labelled
        table[rows[more], other[more]] = 1
        return table

    @cached_property
    def _title_numbers(self) -> IntArray:
        return self.draws.permutation(self.num_items, "data/title")

    def title(self, item: int) -> str:
        """A made-up title, no two alike, with the item's genre."""
        edition, name = divmod(int(self._title_numbers[item]), len(_ADJECTIVES) * len(_NOUNS))
        adjective, noun = divmod(name, len(_NOUNS))
        numeral = f" {edition + 1}" if edition else ""
        return f"{_ADJECTIVES[adjective]} {_NOUNS[noun]}{numeral} ({GENRES[self.genres[item]]})"


def _shelf(shelf: IntArray, attempt: int) -> IntArray:
    """Where an attempt looks: on its shelf, then everywhere by popularity, then everywhere alike (half is free)."""
    if attempt < 12:
        return shelf
    return np.full_like(shelf, len(GENRES) if attempt < 20 else -1)


def _counted_from_zero(values: NDArray[np.int64] | NDArray[np.bool_], offsets: IntArray, owner: IntArray) -> IntArray:
    """Each client's running sum, starting at 0 with its first value."""
    running = np.cumsum(values, dtype=np.int64)
    return np.asarray(running - running[offsets[:-1]][owner])


def _ratings(liked: IntArray, led: NDArray[np.bool_]) -> FloatArray:
    """3 to 5 stars where taste led, 1 to 4 where popularity did."""
    return (liked + np.where(led, 3, 1)).astype(np.float32)


def _joined(clients: IntArray, parts: list[Events]) -> Events:
    """Blocks of neighbouring clients as one."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.zeros(1, dtype=np.int64), *(part.lengths for part in parts)])
    empty = np.zeros(0, dtype=np.int64)
    return Events(
        clients,
        np.cumsum(lengths),
        np.concatenate([empty, *(part.items for part in parts)]),
        np.concatenate([empty, *(part.times for part in parts)]),
        np.concatenate([empty.astype(np.float32), *(part.ratings for part in parts)]),
    )


def _log_normal_mu(mean: float, low: int, high: int) -> float:
    """The mu of a log-normal with sigma 1 whose mean is ``mean`` once clipped to ``low .. high``; by bisection."""

    def normal_cdf(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def clipped_mean(mu: float) -> float:
        a, b = math.log(low) - mu, math.log(high) - mu
        inside = math.exp(mu + 0.5) * (normal_cdf(b - 1) - normal_cdf(a - 1))
        return low * normal_cdf(a) + inside + high * (1 - normal_cdf(b))

    below, above = math.log(low) - 20, math.log(high) + 5
    for _ in range(80):
        middle = (below + above) / 2
        below, above = (middle, above) if clipped_mean(middle) < mean else (below, middle)
    return (below + above) / 2


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "synthetic",
        "fedtower.plugins.datasets.synthetic:Synthetic",
        summary="generated clients with taste, sessions and a long tail; needs no download",
    )
