"""Vocabulary: raw user and item ids on one side, rows 0 .. n-1 of the tables on the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DataError, nearest

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The raw id of every row: ``ids[row]`` is the raw id, int64 or text, and each occurs once.

    >>> movies = Vocabulary(np.array([1193, 661, 914]), noun="item")
    >>> movies.row("661"), movies.name(0), len(movies)
    (1, '1193', 3)
    >>> movies.rows(np.array([914, 5]))
    array([ 2, -1])

    Raises:
        DataError: two rows have the same raw id, or ``row`` was asked for an id that no row has.
    """

    ids: NDArray[Any]
    noun: str = "id"

    def __post_init__(self) -> None:
        if self.ids.ndim != 1:
            raise ValueError(f"a vocabulary of {self.noun}s is a list of ids, but its shape is {self.ids.shape}")
        if self._ranked.size > 1 and bool((self._ranked[1:] == self._ranked[:-1]).any()):
            twice = self._ranked[1:][self._ranked[1:] == self._ranked[:-1]][0]
            raise DataError(f"the {self.noun} id {str(twice)!r} is there twice; every table row needs an id of its own")

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, raw: str | int) -> int:
        """The row of one raw id; an unknown one is refused with the nearest known."""
        found = int(self.rows(np.array([raw]))[0])
        if found < 0:
            hint = nearest(str(raw), (str(known) for known in self.ids[:20_000]))
            example = f"; the first is {str(self.ids[0])!r}" if len(self) else ""
            raise DataError(
                f"there is no {self.noun} {str(raw)!r} among the {len(self):,} {self.noun}s of this data{hint}{example}"
            )
        return found

    def rows(self, raw: NDArray[Any]) -> IntArray:
        """The row of every raw id ``(n,)``, -1 where it is unknown."""
        raw = self._as_ids(np.asarray(raw))
        if not len(self) or raw.size == 0:
            return np.full(raw.shape, -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self._ranked, raw), len(self) - 1)
        return np.where(self._ranked[place] == raw, self._order[place], -1)

    def name(self, row: int) -> str:
        """The raw id of a row, as text."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not among the {len(self)} rows of {self.noun}s")
        return str(self.ids[row])

    def _as_ids(self, raw: NDArray[Any]) -> NDArray[Any]:
        """``raw`` in the type of ``ids``: whoever types a user's number types text."""
        if self.ids.dtype.kind not in "iu":
            return raw.astype(str)
        if raw.dtype.kind in "iu":
            return raw
        # No int64 can be text that is not a number, nor a known id be the smallest int64: an unknown stays unknown.
        return np.array([_integer(text) for text in raw.ravel()], dtype=np.int64).reshape(raw.shape)

    @cached_property
    def _order(self) -> IntArray:
        return np.argsort(self.ids, kind="stable").astype(np.int64)

    @cached_property
    def _ranked(self) -> NDArray[Any]:
        return np.asarray(self.ids[self._order])


def _integer(text: Any) -> int:
    """The int64 that ``text`` spells, or the smallest int64."""
    smallest = int(np.iinfo(np.int64).min)
    try:
        number = int(str(text))
    except ValueError:
        return smallest
    return number if abs(number) < 2**63 else smallest
