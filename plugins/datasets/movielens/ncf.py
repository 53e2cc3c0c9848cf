"""The leave-one-out split of the NCF paper on MovieLens 1M: one test item a user, and 99 negatives to rank it among.

He et al., 2017, https://arxiv.org/abs/1708.05031, with the files of its authors:
https://github.com/hexiangnan/neural_collaborative_filtering. There users are numbered user-1, and items by their first
appearance in the rating file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedtower.core.errors import DataError, LeakError
from fedtower.recsys.interactions import read_table
from fedtower.recsys.layout import Column, Layout, find_file, open_bytes
from fedtower.recsys.population import HeldOut
from fedtower.recsys.vocabulary import Vocabulary

IntArray = NDArray[np.int64]

_ID = Column("id", "integer", 0)
_TEST = Layout(
    (_ID, Column("item", "integer", 0), Column("rating", "integer", 1, 5), Column("time", "integer", 0)), "\t"
)
_MAP = Layout((Column("ncf_item", "integer", 0), Column("movie_id", "integer", 0)), header=True, quoted=True)


@dataclass(frozen=True, eq=False)
class GivenSplit:
    """Raw ids: ``users (M,)``, ``items (M,)`` their test items, ``negatives (M, N)``."""

    users: IntArray
    items: IntArray
    negatives: IntArray
    file: Path

    def apply(self, ratings: pd.DataFrame) -> pd.DataFrame:
        """The ratings with every test item as its user's last.

        Many users rated several movies in their last second, and NCF took one of them: among equal times the order of
        the rows decides, so the test rows are put at the end with their user's latest time.
        """
        rated = _pairs(ratings["user"].to_numpy(np.int64), ratings["item"].to_numpy(np.int64))
        wanted = _pairs(self.users, self.items)
        test = _among(rated, wanted)
        lost = np.flatnonzero(~_among(wanted, rated))
        if lost.size:
            raise DataError(
                f"{self.file}, line {lost[0] + 1}: the test item (movie {self.items[lost[0]]}) was not rated by user "
                f"{self.users[lost[0]]}; expected the split of these ratings; remove the file to do without it"
            )
        self._check_negatives(rated)
        latest = ratings.groupby("user")["time"].transform("max")
        ratings = ratings.assign(time=ratings["time"].where(~test, latest))
        return pd.concat([ratings[~test], ratings[test]], ignore_index=True)

    def held_out(self, users: Vocabulary, items: Vocabulary) -> HeldOut:
        """The split in rows, for every client; -1 for a client without a test item."""
        at = users.rows(self.users)
        test = np.full(len(users), -1, dtype=np.int64)
        negatives = np.full((len(users), self.negatives.shape[1]), -1, dtype=np.int64)
        test[at] = items.rows(self.items)
        negatives[at] = items.rows(self.negatives)
        return HeldOut(np.arange(len(users), dtype=np.int64), test, negatives)

    def _check_negatives(self, rated: IntArray) -> None:
        """A negative that its user rated would count a training item as a miss.

        The published file has the test item itself among the negatives of 156 users. It stays, so that figures compare:
        a tie counts against the model.
        """
        wrong = _among(_pairs(self.users[:, None], self.negatives), rated) & (self.negatives != self.items[:, None])
        if wrong.any():
            row, column = (int(place[0]) for place in np.nonzero(wrong))
            raise LeakError(
                f"negative {column + 1} (movie {self.negatives[row, column]}) of user {self.users[row]} was rated by "
                "that user; expected negatives that the user never touched; the files beside "
                f"{self.file} belong to other ratings, or were changed"
            )


def read_split(folder: Path, ratings: pd.DataFrame) -> GivenSplit | None:
    """The split that lies beside the ratings, if it does. Without ``ncf_item_map.csv`` the items are numbered anew."""
    test_file = find_file(folder, ["ncf.test.rating", "ml-1m.test.rating"])
    negative_file = find_file(folder, ["ncf.test.negative", "ml-1m.test.negative"])
    if test_file is None or negative_file is None:
        return None
    test = read_table(test_file, _TEST)
    map_file = find_file(folder, ["ncf_item_map.csv"])
    if map_file is None:
        movies = np.asarray(pd.unique(ratings["item"]), dtype=np.int64)
    else:
        movies = read_table(map_file, _MAP).sort_values("ncf_item")["movie_id"].to_numpy(np.int64)
    users, items = test["id"].to_numpy(np.int64), test["item"].to_numpy(np.int64)
    if len(np.unique(users)) != len(users):
        raise DataError(f"{test_file} has two test items for one user; expected one line for each user")
    negatives = _read_negatives(negative_file, users, items)
    for path, ids in ((test_file, items), (negative_file, negatives)):
        if ids.max(initial=0) >= len(movies):
            raise DataError(f"{path} has the item {ids.max()}, but the items are 0 to {len(movies) - 1}; is it whole?")
    return GivenSplit(users + 1, movies[items], movies[negatives], test_file)


def _read_negatives(path: Path, users: IntArray, items: IntArray) -> IntArray:
    """``(M, N)``; each line is ``(user,item)`` and the negatives, separated by tabs, in the order of the test items."""
    rows: list[list[int]] = []
    with open_bytes(path) as file:
        for line, text in enumerate(file, start=1):
            head, *tail = text.decode("ascii", "replace").rstrip("\r\n").split("\t")
            place = len(rows)
            wanted = f"({users[place]},{items[place]})" if place < len(users) else "the end of the file"
            if head != wanted:
                raise DataError(f"{path}, line {line}, column 1: expected {wanted}, as in the test file, got {head!r}")
            for column, word in enumerate(tail, start=2):
                if not (word.isascii() and word.isdigit()):
                    raise DataError(f"{path}, line {line}, column {column}: expected an item's number, got {word!r}")
            if rows and len(tail) != len(rows[0]):
                raise DataError(
                    f"{path}, line {line}: expected {len(rows[0])} negatives, as in line 1, got {len(tail)}"
                )
            rows.append([int(word) for word in tail])
    if len(rows) != len(users):
        raise DataError(f"{path} ends after line {len(rows)}: expected {len(users)} lines; it is cut, fetch it again")
    return np.array(rows, dtype=np.int64)


def _pairs(users: IntArray, items: IntArray) -> IntArray:
    """One number for each pair; ids below 2**31 do not collide."""
    return (users << 32) + items


def _among(pairs: IntArray, known: IntArray) -> NDArray[np.bool_]:
    # np.isin hashes these numbers badly: 1.2 s for what takes 0.1 s sorted.
    ordered = np.sort(known)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, pairs), len(ordered) - 1)] == pairs)
