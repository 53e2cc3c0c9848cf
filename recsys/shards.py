"""Shard: what one client holds, in a file of its own; and the file of what every shard of a folder has in common.

A folder of shards is what a deployed federation's devices are given, one file each, to stand for what phones hold by
themselves. Files are safetensors (numpy and the safetensors library read them); the array ``about`` (uint8) is JSON:
``format`` 1, ``kind``, ``name``, and in a shard ``client`` (its number, 0 .. n-1) and ``user`` (its raw id).

``client-000003.safetensors`` of histories holds ``items``, ``times`` (E,) int64, ``ratings`` (E,) float32, ``role``
(E,) uint8 (0 training, 1 validation, 2 test), ``user`` (F,) float32, and ``negatives`` (N,) int64 if the data came with
some; ``about`` has ``items``, how many there are. Of labelled examples it holds ``dense``, ``categories``, ``labels``
of the three roles as ``training/dense`` and so on; ``about`` has ``cardinalities`` and ``classes``.

``population.safetensors`` holds what is public: of histories ``item_features`` (I, F) and in ``about`` the raw ids and
titles of the items; of both how many ``clients`` there are. It is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import DataError
from fedtower.core.folders import make_folder
from fedtower.recsys.bundle import BundleError, read_tensors, write_tensors
from fedtower.recsys.examples import ExampleCard, Examples, ExampleSet
from fedtower.recsys.population import DataCard, Events, HeldOut, Population
from fedtower.recsys.splits import TEST, TRAIN, VALIDATION, Split
from fedtower.recsys.vocabulary import Vocabulary

Array = NDArray[Any]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

FORMAT = 1
POPULATION = "population.safetensors"
_PARTS: Mapping[str, int] = {"training": TRAIN, "validation": VALIDATION, "test": TEST}


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's file: what it is about, and its arrays."""

    about: Mapping[str, Any]
    arrays: Mapping[str, Array]

    @property
    def client(self) -> int:
        """The client's number."""
        return int(self.about["client"])


def write_shards(
    folder: Path, data: Population | ExampleSet, split: Split | None, clients: IntArray, told: Callable[[int], None]
) -> None:
    """Write the clients' files, numbered 0 .. n-1 in the order given, and the population's; ``told`` counts along.

    Raises:
        DataError: the folder holds something already.
        StorageError: the disk is full, or not ours to write.
    """
    with storage_errors(folder):
        make_folder(folder)
        if any(folder.iterdir()):
            raise DataError(f"{folder} is not empty; name a folder that is not there yet")
        if isinstance(data, ExampleSet):
            public, shards = _public_examples(data, len(clients)), _example_shards(data, clients)
        else:
            assert split is not None
            public, shards = _public_histories(data, len(clients)), _history_shards(data, split, clients)
        for number, shard in enumerate(shards):
            _write(folder / f"client-{number:06d}.safetensors", shard)
            told(number + 1)
        _write(folder / POPULATION, public)


def read_shard(path: Path) -> Shard:
    """The shard of a file, checked: shapes, ids and roles.

    Raises:
        DataError: the file is none, is damaged, or holds what does not fit together.
    """
    shard = _read(path)
    try:
        _check(shard)
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(path, error) from error
    return shard


def read_folder(folder: Path) -> tuple[Shard, list[Shard]]:
    """The population's file of a folder, and its shards in the order of their clients.

    Raises:
        DataError: a file is missing or damaged, or belongs to another folder.
    """
    public = _read(folder / POPULATION)
    try:
        count, name, kind = int(public.about["clients"]), str(public.about["name"]), public.about["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(folder / POPULATION, error) from error
    shards = []
    for number in range(count):
        path = folder / f"client-{number:06d}.safetensors"
        shard = read_shard(path)
        if (shard.client, shard.about["name"], shard.about["kind"]) != (number, name, kind):
            raise DataError(
                f"{path} is of client {shard.client} of {shard.about['name']!r}, and in this folder it should be of "
                f"client {number} of {name!r}; write the shards again"
            )
        shards.append(shard)
    return public, shards


@dataclass(frozen=True, eq=False)
class ShardedHistories:
    """The histories of some shards as a :class:`~fedtower.recsys.population.Population`: of a whole folder, or of the
    one shard that a device has. Clients keep their numbers.
    """

    shards: tuple[Shard, ...]
    item_ids: Vocabulary | None = None
    item_table: FloatArray | None = None
    titles: tuple[str | None, ...] = ()

    @classmethod
    def of_folder(cls, public: Shard, shards: list[Shard]) -> ShardedHistories:
        """A whole folder, with what is public of the items."""
        ids = Vocabulary(np.array(public.about["item_ids"]), "item")
        return cls(tuple(shards), ids, public.arrays["item_features"], tuple(public.about["titles"]))

    @property
    def num_clients(self) -> int:
        """One more than the highest client's number here."""
        return self.shards[-1].client + 1

    @property
    def num_items(self) -> int:
        """How many items the catalogue has."""
        return int(self.shards[0].about["items"])

    @property
    def num_user_features(self) -> int:
        """The width of a user's features."""
        return len(self.shards[0].arrays["user"])

    @property
    def num_item_features(self) -> int:
        """The width of an item's features; a device has none of them."""
        return 0 if self.item_table is None else int(self.item_table.shape[1])

    @property
    def card(self) -> DataCard:
        """The data card."""
        count = sum(len(shard.arrays["items"]) for shard in self.shards)
        name = str(self.shards[0].about["name"])
        return DataCard(name, len(self.shards), self.num_items, count, extra={"kept in": "one file a client"})

    def events(self, clients: IntArray) -> Events:
        """All events of these clients, in time order."""
        items, times, ratings = (self._gathered(clients, name) for name in ("items", "times", "ratings"))
        lengths = [len(self._of(client).arrays["items"]) for client in clients.tolist()]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Events(np.asarray(clients, dtype=np.int64), offsets, items, times, ratings)

    def roles(self, clients: IntArray) -> NDArray[np.int8]:
        """The role that each of these events was given when the shards were written, (E,)."""
        return self._gathered(clients, "role").astype(np.int8)

    def user_features(self, clients: IntArray) -> FloatArray:
        """``(C,) -> (C, num_user_features)``."""
        return self._gathered(clients, "user").reshape(len(clients), self.num_user_features)

    def item_features(self, items: IntArray) -> FloatArray:
        """``(n,) -> (n, num_item_features)``."""
        table = np.zeros((self.num_items, 0), np.float32) if self.item_table is None else self.item_table
        return np.asarray(table[items])

    def held_out(self, clients: IntArray) -> HeldOut | None:
        """The test items and negatives that came with the data, if any did."""
        if "negatives" not in self.shards[0].arrays:
            return None
        chosen = [self._of(client) for client in clients.tolist()]
        width = len(self.shards[0].arrays["negatives"])
        negatives = [shard.arrays["negatives"] for shard in chosen]
        return HeldOut(
            np.asarray(clients, dtype=np.int64),
            np.array([int(shard.about["given"]) for shard in chosen], dtype=np.int64),
            np.stack(negatives) if negatives else np.zeros((0, width), dtype=np.int64),
        )

    def client_index(self, user: str) -> int:
        """The client whose raw id is ``user``."""
        ids = Vocabulary(np.array([str(shard.about["user"]) for shard in self.shards]), "user")
        return self.shards[ids.row(user)].client

    def user_name(self, client: int) -> str:
        """A client's raw id."""
        return str(self._of(client).about["user"])

    def item_name(self, item: int) -> str:
        """An item's raw id, or on a device its row."""
        return str(item) if self.item_ids is None else self.item_ids.name(item)

    def item_title(self, item: int) -> str | None:
        """An item's title, where it is known."""
        return self.titles[item] if self.titles else None

    def _of(self, client: int) -> Shard:
        return _shard_of(self.shards, client)

    def _gathered(self, clients: IntArray, name: str) -> Array:
        held = [self._of(client).arrays[name] for client in clients.tolist()]
        return np.concatenate([self.shards[0].arrays[name][:0], *held])


@dataclass(frozen=True, eq=False)
class ShardedExamples:
    """The labelled examples of some shards as an :class:`~fedtower.recsys.examples.ExampleSet`; clients keep their
    numbers.
    """

    shards: tuple[Shard, ...]
    counted_over_everyone: bool = False

    @property
    def num_clients(self) -> int:
        """One more than the highest client's number here."""
        return self.shards[-1].client + 1

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of one example's dense part."""
        return tuple(self.shards[0].arrays["training/dense"].shape[1:])

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """How many categories each field has."""
        return tuple(int(each) for each in self.shards[0].about["cardinalities"])

    @property
    def num_classes(self) -> int:
        """How many classes a label may be of; 0: it is 0 or 1."""
        return int(self.shards[0].about["classes"])

    @property
    def card(self) -> ExampleCard:
        """The data card."""
        training, validation, test = (
            sum(len(shard.arrays[f"{part}/labels"]) for shard in self.shards) for part in _PARTS
        )
        name, extra = str(self.shards[0].about["name"]), {"kept in": "one file a client"}
        return ExampleCard(name, len(self.shards), training, validation, test, extra)

    def examples(self, clients: IntArray) -> Examples:
        """The training examples of these clients."""
        return self._examples([_shard_of(self.shards, client) for client in clients.tolist()], clients, "training")

    def held_out(self, role: Literal["validation", "test"]) -> Examples:
        """The held-out examples of all shards, as one client's."""
        clients = np.array([shard.client for shard in self.shards], dtype=np.int64)
        held = self._examples(list(self.shards), clients, role)
        offsets = np.array([0, len(held.labels)], dtype=np.int64)
        return Examples(np.zeros(1, dtype=np.int64), offsets, held.dense, held.categories, held.labels)

    def held_out_by(self, client: int, role: Literal["validation", "test"]) -> Examples:
        """The held-out examples of one shard."""
        return self._examples([_shard_of(self.shards, client)], np.array([client], dtype=np.int64), role)

    def _examples(self, shards: list[Shard], clients: IntArray, part: str) -> Examples:
        columns = {
            name: np.concatenate(
                [self.shards[0].arrays[f"{part}/{name}"][:0], *(shard.arrays[f"{part}/{name}"] for shard in shards)]
            )
            for name in ("dense", "categories", "labels")
        }
        lengths = [len(shard.arrays[f"{part}/labels"]) for shard in shards]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Examples(
            np.asarray(clients, dtype=np.int64), offsets, columns["dense"], columns["categories"], columns["labels"]
        )


def opened(public: Shard | None, shards: list[Shard]) -> ShardedHistories | ShardedExamples:
    """The data of a folder, or (without ``public``) of the shard that a device has."""
    if not shards:
        raise DataError("there is no shard here; `fedtower data shard RECIPE DIR` writes some")
    if shards[0].about["kind"] == "examples":
        return ShardedExamples(tuple(shards))
    return ShardedHistories(tuple(shards)) if public is None else ShardedHistories.of_folder(public, shards)


def _shard_of(shards: tuple[Shard, ...], client: int) -> Shard:
    """Shards of a folder stand at their clients' places; a device has one."""
    at = client if len(shards) > 1 else 0
    if not 0 <= at < len(shards) or shards[at].client != client:
        held = f"clients 0 to {len(shards) - 1}" if len(shards) > 1 else f"client {shards[0].client}"
        raise IndexError(f"there is no client {client} here: these are the shards of {held}")
    return shards[at]


def _public_histories(data: Population, clients: int) -> Shard:
    everything = np.arange(data.num_items, dtype=np.int64)
    titles = [data.item_title(item) for item in range(data.num_items)]
    about = {
        "kind": "histories",
        "name": data.card.name,
        "clients": clients,
        "item_ids": [data.item_name(item) for item in range(data.num_items)],
        "titles": titles if any(title is not None for title in titles) else [],
    }
    return Shard(about, {"item_features": data.item_features(everything)})


def _history_shards(data: Population, split: Split, clients: IntArray) -> Iterator[Shard]:
    for number, client in enumerate(clients.tolist()):
        one = np.array([client], dtype=np.int64)
        events, given = data.events(one), data.held_out(one) if split.kind == "ncf" else None
        about = {
            "kind": "histories",
            "name": data.card.name,
            "client": number,
            "user": data.user_name(client),
            "items": data.num_items,
        }
        arrays: dict[str, Array] = {
            "items": events.items,
            "times": events.times,
            "ratings": events.ratings,
            "role": split.parts(events).role.astype(np.uint8),
            "user": data.user_features(one)[0],
        }
        if given is not None:
            about["given"] = int(given.items[0])
            arrays["negatives"] = given.negatives[0]
        yield Shard(about, arrays)


def _public_examples(data: ExampleSet, clients: int) -> Shard:
    if data.counted_over_everyone:
        raise DataError(
            "this data numbers its categories by a vocabulary that was counted over the rows of all clients, which no "
            "device could have; let it hash them (of criteo: -o data.categories=hashed)"
        )
    return Shard({"kind": "examples", "name": data.card.name, "clients": clients}, {})


def _example_shards(data: ExampleSet, clients: IntArray) -> Iterator[Shard]:
    """Held-out examples, which are nobody's, are dealt out in their order: all devices together judge all of them."""
    held = {role: data.held_out(role) for role in ("validation", "test")}
    edges = {role: np.linspace(0, len(part.labels), len(clients) + 1).astype(np.int64) for role, part in held.items()}
    for number, client in enumerate(clients.tolist()):
        training = data.examples(np.array([client], dtype=np.int64))
        arrays = _columns("training", training, slice(None))
        for role, part in held.items():
            arrays |= _columns(role, part, slice(int(edges[role][number]), int(edges[role][number + 1])))
        about = {
            "kind": "examples",
            "name": data.card.name,
            "client": number,
            "user": str(client),
            "cardinalities": list(data.cardinalities),
            "classes": data.num_classes,
        }
        yield Shard(about, arrays)


def _columns(part: str, held: Examples, where: slice) -> dict[str, Array]:
    return {
        f"{part}/dense": held.dense[where],
        f"{part}/categories": held.categories[where],
        f"{part}/labels": held.labels[where],
    }


def _write(path: Path, shard: Shard) -> None:
    about = json.dumps({"format": FORMAT, **shard.about}, ensure_ascii=False).encode()
    write_tensors(path, {**shard.arrays, "about": np.frombuffer(about, dtype=np.uint8)})


def _read(path: Path) -> Shard:
    try:
        arrays = read_tensors(path.read_bytes(), str(path))
        about = json.loads(arrays.pop("about").tobytes())
        if not isinstance(about, dict) or about["format"] != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, and this fedtower reads {FORMAT}")
        if about["kind"] not in ("histories", "examples"):
            raise ValueError(f"its kind is {about['kind']!r}")
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError, BundleError) as error:
        raise _unfit(path, error) from error
    return Shard(about, arrays)


def _unfit(path: Path, error: Exception) -> DataError:
    missing = "it is not whole: there is no " if isinstance(error, KeyError) else ""
    return DataError(
        f"{path} is not a shard that can be used: {missing}{error}; `fedtower data shard RECIPE DIR` writes them"
    )


def _check(shard: Shard) -> None:
    """Raise ValueError, or KeyError, for what does not fit together."""
    about, arrays = shard.about, shard.arrays
    if not 0 <= int(about["client"]) < 2**31 or not isinstance(about["user"], str):
        raise ValueError(f"its client is {about['client']!r} and its user {about['user']!r}")
    if about["kind"] == "examples":
        cardinalities = [int(each) for each in about["cardinalities"]]
        for part in _PARTS:
            _fits(arrays, f"{part}/labels", np.float32, (None,))
            count = len(arrays[f"{part}/labels"])
            _fits(arrays, f"{part}/dense", np.float32, (count, *[None] * (arrays[f"{part}/dense"].ndim - 1)))
            _fits(arrays, f"{part}/categories", np.int64, (count, len(cardinalities)))
            _within(arrays[f"{part}/categories"], sum(cardinalities), f"{part}/categories")
            _within(arrays[f"{part}/labels"], max(int(about["classes"]), 2), f"{part}/labels")
        return
    _fits(arrays, "items", np.int64, (None,))
    count = len(arrays["items"])
    for name, kind in (("times", np.int64), ("ratings", np.float32), ("role", np.uint8)):
        _fits(arrays, name, kind, (count,))
    _fits(arrays, "user", np.float32, (None,))
    _within(arrays["items"], int(about["items"]), "items")
    _within(arrays["role"], len(_PARTS), "role")
    if np.any(np.diff(arrays["times"]) < 0):
        raise ValueError("its events are not in the order of their times")
    if len(np.unique(arrays["items"])) != count:
        raise ValueError("an item is there twice")
    if "negatives" in arrays:
        _fits(arrays, "negatives", np.int64, (None,))
        _within(arrays["negatives"], int(about["items"]), "negatives", low=-1)
        _within(np.array([int(about["given"])]), int(about["items"]), "given", low=-1)


def _fits(arrays: Mapping[str, Array], name: str, kind: type, shape: tuple[int | None, ...]) -> None:
    held = arrays[name]
    same = held.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, held.shape, strict=True))
    if held.dtype != kind or not same:
        wanted = tuple("any" if each is None else each for each in shape)
        raise ValueError(f"{name!r} should be {np.dtype(kind).name} {wanted}, and is {held.dtype.name} {held.shape}")


def _within(values: Array, limit: int, name: str, low: int = 0) -> None:
    if values.size and not (values.min() >= low and values.max() < limit):  # also of NaN
        raise ValueError(
            f"{name!r} should go from {low} to {limit - 1}, and goes from {values.min()} to {values.max()}"
        )
