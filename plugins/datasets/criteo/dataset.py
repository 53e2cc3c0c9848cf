"""The Criteo data set: its settings, how its columns become features, and who its clients are.

Criteo Labs, 2014, "Display Advertising Challenge", https://www.kaggle.com/c/criteo-display-ad-challenge.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws, absorb
from fedtower.core.errors import DataError, RecipeError, nearest
from fedtower.plugins.datasets.criteo.reader import CATEGORIES, MISSING, Lines, read
from fedtower.recsys.archive import cache_folder
from fedtower.recsys.examples import ExampleCard, Examples, ExampleTable
from fedtower.recsys.layout import find_file

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

FILES = ("train.txt", "train.tsv", "train_head80k_decoded.tsv", "train_head10k.tsv")
"""What the file is called: in the challenge's archive, and in the extracts of its head."""


@dataclass(frozen=True)
class Criteo:
    """The first lines of the training file, in time order: ``train_rows``, then ``validation_rows``, then
    ``test_rows`` of them.

    A category's row 0 is for missing values. ``hashed``: the others are shared by a hash that every device can compute
    for itself. ``counted``: row 1 is for rare and new values, and each value that training rows have often has one of
    its own; whoever counts has seen everybody's rows, so this is for standalone training only.
    """

    path: Path | None = field(
        default=None,
        metadata={"help": "the file, plain or .gz, or its folder; else $FEDTOWER_DATA/criteo, else the user's cache"},
    )
    train_rows: int = field(default=64_000, metadata={"help": "the first so many lines are for training"})
    validation_rows: int = field(default=8_000, metadata={"help": "so many lines after them to tune on"})
    test_rows: int = field(default=8_000, metadata={"help": "so many lines after those to judge on"})
    categories: Literal["hashed", "counted"] = field(
        default="hashed", metadata={"help": "rows of categories: hashed, or (standalone only) by a counted vocabulary"}
    )
    hash_size: int = field(default=10_000, metadata={"help": "hashed: rows of each of the 26 fields"})
    min_count: int = field(
        default=4, metadata={"help": "counted: training rows that a value needs for a row of its own"}
    )
    silos: Literal["contiguous", "column"] = field(
        default="contiguous", metadata={"help": "clients: stretches of time, or the values of a column"}
    )
    clients: int = field(default=100, metadata={"help": "contiguous: how many clients"})
    column: str = field(default="C2", metadata={"help": "column: whose values are the clients"})
    smallest: int = field(
        default=100,
        metadata={"help": "column: values with fewer training rows are put together until they have as many"},
    )

    def __post_init__(self) -> None:
        for name, least in (
            *(("train_rows", 1), ("validation_rows", 0), ("test_rows", 1), ("hash_size", 1)),
            *(("min_count", 1), ("clients", 1), ("smallest", 1)),
        ):
            if getattr(self, name) < least:
                raise RecipeError(f"data.{name} must be at least {least}, but is {getattr(self, name)}")
        if self.column not in CATEGORIES:
            raise RecipeError(
                f"data.column = {self.column!r} is not a category{nearest(self.column, CATEGORIES)}; there are "
                f"{CATEGORIES[0]} to {CATEGORIES[-1]}"
            )
        if self.silos == "contiguous" and self.clients > self.train_rows:
            raise RecipeError(f"data.clients = {self.clients} cannot share {self.train_rows} training rows")

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> ExampleTable:
        """The examples, every line one. Nothing is drawn."""
        path, asked = self.file(), self.train_rows + self.validation_rows + self.test_rows
        progress(f"reading {asked:,} lines of {path}")
        lines = read(path, asked)
        if len(lines.labels) < asked:
            raise DataError(
                f"{path} has {len(lines.labels):,} lines, but data.train_rows + data.validation_rows + data.test_rows "
                f"ask for {asked:,}; ask for fewer"
            )
        dense = logarithms(lines.integers)
        if self.categories == "hashed":
            rows, sizes = hashed(lines.words, self.hash_size)
        else:
            rows, sizes = counted(lines.words, self.train_rows, self.min_count)
        rows += np.concatenate([[0], np.cumsum(sizes)[:-1]])
        owner = self._owners(lines)
        order = np.argsort(owner, kind="stable")
        numbers, counts = np.unique(owner, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

        def held_out(start: int, size: int) -> Examples:
            part = slice(start, start + size)
            ends = np.array([0, size], dtype=np.int64)
            return Examples(np.zeros(1, dtype=np.int64), ends, dense[part], rows[part], lines.labels[part])

        return ExampleTable(
            card=self._card(lines, len(numbers), sizes),
            training=Examples(numbers.astype(np.int64), offsets, dense[order], rows[order], lines.labels[order]),
            validation=held_out(self.train_rows, self.validation_rows),
            test=held_out(self.train_rows + self.validation_rows, self.test_rows),
            cardinalities=tuple(sizes),
            counted_over_everyone=self.categories == "counted",
        )

    def file(self) -> Path:
        """The file.

        Raises:
            DataError: it is nowhere; the message says where it was looked for.
        """
        if self.path is not None:
            given = self.path.expanduser()
            found = given if given.is_file() else find_file(given, FILES) if given.is_dir() else None
            if found is None:
                raise DataError(
                    f"data.path = {str(self.path)!r} is neither a file nor a folder with one of {', '.join(FILES)} "
                    f"(plain or .gz)"
                )
            return found
        root = os.environ.get("FEDTOWER_DATA")
        places = [*([Path(root) / "criteo"] if root else []), cache_folder() / "criteo"]
        for place in places:
            found = find_file(place, FILES)
            if found is not None:
                return found
        raise DataError(
            f"the Criteo data is not on this machine: looked for {FILES[0]}, plain or .gz, in "
            f"{' and '.join(map(str, places))}. Criteo hands it out after its terms are accepted "
            f"(https://ailab.criteo.com/ressources/); then set FEDTOWER_DATA to the folder that holds criteo/, or "
            f"data.path to the file"
        )

    def _owners(self, lines: Lines) -> IntArray:
        """Whose each training row is, ``(train_rows,)``, 0 .. clients - 1."""
        if self.silos == "contiguous":
            return np.arange(self.train_rows, dtype=np.int64) * self.clients // self.train_rows
        return by_value(lines.words[: self.train_rows, CATEGORIES.index(self.column)], self.smallest)

    def _card(self, lines: Lines, clients: int, sizes: list[int]) -> ExampleCard:
        made = (
            f"hashed to {self.hash_size:,} rows a field"
            if self.categories == "hashed"
            else f"values of {self.min_count} and more training rows"
        )
        silos = (
            "contiguous stretches of time"
            if self.silos == "contiguous"
            else f"values of {self.column}, those with fewer than {self.smallest} rows put together"
        )
        return ExampleCard(
            name="Criteo display advertising",
            clients=clients,
            training=self.train_rows,
            validation=self.validation_rows,
            test=self.test_rows,
            extra={
                "clients": silos,
                "categories": f"26 fields, {sum(sizes):,} rows: {made}",
                "numbers": "log(1 + x), negative and missing ones 0",
                "clicks": f"{100 * lines.labels[: self.train_rows].mean():.1f} % of the training rows",
                "source": "Criteo Labs, Display Advertising Challenge",
                "licence": "Criteo's terms of the challenge: non-commercial research, no redistribution",
            },
        )


def logarithms(integers: FloatArray) -> FloatArray:
    """``log(1 + x)``, of negative and missing numbers 0: what DLRM's own code does with this file.

    Naumov et al., 2019, https://arxiv.org/abs/1906.00091, https://github.com/facebookresearch/dlrm.

    >>> logarithms(np.array([[0, np.e - 1, -2, np.nan]], dtype=np.float32))
    array([[0., 1., 0., 0.]], dtype=float32)
    """
    return np.log1p(np.maximum(np.nan_to_num(integers, nan=0.0), 0.0)).astype(np.float32)


def hashed(words: IntArray, size: int) -> tuple[IntArray, list[int]]:
    """The row of every category within its field, ``(E, 26)``, and how many rows each field has.

    Row 0 is for missing values; the others are SplitMix64 of field and word, as in :mod:`fedtower.core.draws`, so
    that a device needs no table to find its rows.
    """
    fields = np.arange(words.shape[1], dtype=np.int64)
    with np.errstate(over="ignore"):
        bits = absorb(absorb(np.zeros(1, dtype=np.int64), fields)[None, :], words)
    spread = ((bits >> 32) & 0xFFFFFFFF) * size >> 32
    return np.where(words == MISSING, 0, spread + 1), [size + 1] * words.shape[1]


def counted(words: IntArray, train: int, min_count: int) -> tuple[IntArray, list[int]]:
    """The row of every category within its field, ``(E, 26)``, and how many rows each field has.

    Row 0 is for missing values, row 1 for those that fewer than ``min_count`` of the first ``train`` lines have.
    """
    rows = np.empty_like(words)
    sizes = []
    for place in range(words.shape[1]):
        values, counts = np.unique(words[:train, place], return_counts=True)
        known = values[(counts >= min_count) & (values != MISSING)]
        at = np.minimum(np.searchsorted(known, words[:, place]), max(len(known) - 1, 0))
        found = known[at] == words[:, place] if len(known) else np.zeros(len(words), dtype=bool)
        rows[:, place] = np.where(words[:, place] == MISSING, 0, np.where(found, at + 2, 1))
        sizes.append(len(known) + 2)
    return rows, sizes


def by_value(words: IntArray, smallest: int) -> IntArray:
    """Whose each row is: values with ``smallest`` rows and more are clients of their own, the commonest first; the
    others are put together, commonest first, until a client has as many; what is left at last joins the last client.

    >>> by_value(np.array([7, 7, 7, 1, 2, 3, 3]), smallest=2)
    array([0, 0, 0, 2, 2, 1, 1])
    """
    values, inverse, counts = np.unique(words, return_inverse=True, return_counts=True)
    order = np.lexsort((values, -counts))
    client = np.empty(len(values), dtype=np.int64)
    number = held = 0
    for at in order.tolist():
        client[at] = number
        held += int(counts[at])
        if held >= smallest:
            number, held = number + 1, 0
    if held and number:
        client[client == number] = number - 1
    return client[inverse]
