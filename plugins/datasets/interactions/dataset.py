"""A data set from a table of interactions, with the names of its columns in the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.interactions import Interactions, is_parquet, read_parquet, read_table
from fedtower.recsys.layout import Column, Layout

_LAST_SECOND = 253_402_300_799  # the end of the year 9999
_UNITS = {"s": 1, "ms": 1_000}


@dataclass(frozen=True)
class InteractionsFile:
    """A CSV (plain or ``.gz``) or Parquet file with one row an interaction; ids are text.

    Features are columns of the interactions, where a user's or item's last row counts, or of a file of their own with
    one row a user or item. Each is categorical, several values separated by ``|``, and one-hot encoded: at most 1,000
    values.
    """

    path: Path = field(metadata={"help": "the file of interactions: .csv, .csv.gz or .parquet"})
    user: str = field(default="user", metadata={"help": "the column of user ids, in every file that has users"})
    item: str = field(default="item", metadata={"help": "the column of item ids, in every file that has items"})
    rating: str | None = field(
        default=None, metadata={"help": "the column of ratings; without it an event is just one"}
    )
    min_rating: float | None = field(default=None, metadata={"help": "leave out interactions with a lower rating"})
    timestamp: str | None = field(
        default=None,
        metadata={"help": "the column of times, numbers or ISO 8601; without it the order of the rows counts"},
    )
    timestamp_unit: Literal["s", "ms"] = field(default="s", metadata={"help": "of numeric times, since 1970"})
    users_path: Path | None = field(default=None, metadata={"help": "a file of its own for user features"})
    user_features: tuple[str, ...] = field(default=(), metadata={"help": "the columns of user features"})
    items_path: Path | None = field(default=None, metadata={"help": "a file of its own for item features and titles"})
    item_features: tuple[str, ...] = field(default=(), metadata={"help": "the columns of item features"})
    title: str | None = field(default=None, metadata={"help": "the column of item titles"})
    separator: str = field(default=",", metadata={"help": "between the columns of a text file"})

    def __post_init__(self) -> None:
        if self.min_rating is not None and self.rating is None:
            raise ValueError("min_rating needs rating, the name of the column of ratings")
        if len(self.separator) != 1:
            raise ValueError(f"separator must be one character, but is {self.separator!r}")
        if self.title in self.item_features:
            raise ValueError(f"title = {self.title!r} must not be one of item_features: every title would be a feature")
        if self.users_path is not None and not self.user_features:
            raise ValueError("users_path needs user_features, the names of the columns to use")
        if self.items_path is not None and not (self.item_features or self.title):
            raise ValueError("items_path needs item_features or title, the names of the columns to use")

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> EventTable:
        """The population; of an item that a user has twice the last row stays."""
        progress(f"reading {self.path}")
        table = self._read(self.path, self._columns)
        frame = pd.DataFrame({"user": table[self.user], "item": table[self.item]})
        if self.rating:
            frame["rating"] = table[self.rating]
        if self.timestamp:
            seconds = self._seconds(table[self.timestamp])
            # Whole seconds are kept, and the order within a second with them: ties stay in the order of the rows.
            frame = frame.assign(time=seconds.astype("int64")).iloc[np.argsort(seconds.to_numpy(), kind="stable")]
        extra = {"source": str(self.path)}
        if self.min_rating is not None:
            kept = frame["rating"] >= self.min_rating
            extra["left out"] = f"{len(frame) - int(kept.sum()):,} ratings below {self.min_rating:g}"
            frame = frame[kept]
            if frame.empty:
                raise DataError(
                    f"{self.path} has no {self.rating} of {self.min_rating:g} or more; lower data.min_rating"
                )
        return Interactions(
            self.path.name,
            frame,
            users=self._side(self.users_path, self.user, self.user_features, table),
            items=self._side(self.items_path, self.item, self._item_columns, table, title=self.title),
            extra=extra,
        ).to_table()

    @property
    def _columns(self) -> tuple[Column, ...]:
        """What the file of interactions must have."""
        ratings = (Column(self.rating, "number"),) if self.rating else ()
        times = (Column(self.timestamp),) if self.timestamp else ()
        own_users = self.user_features if self.users_path is None else ()
        own_items = self._item_columns if self.items_path is None else ()
        return (Column(self.user), Column(self.item), *ratings, *times, *_features((*own_users, *own_items)))

    @property
    def _item_columns(self) -> tuple[str, ...]:
        return (*self.item_features, *([self.title] if self.title else []))

    def _read(self, path: Path, columns: tuple[Column, ...]) -> pd.DataFrame:
        if not path.is_file():
            raise DataError(f"there is no file {path}; expected a CSV or Parquet file, from {Path.cwd()}")
        # One column may serve twice; the first to name it says what it must hold.
        once = tuple({column.name: column for column in reversed(columns)}.values())
        return read_parquet(path, once) if is_parquet(path) else read_table(path, self._layout(*once))

    def _layout(self, *columns: Column) -> Layout:
        return Layout(columns, self.separator, header=True, quoted=True)

    def _side(
        self, path: Path | None, key: str, columns: tuple[str, ...], table: pd.DataFrame, title: str | None = None
    ) -> pd.DataFrame | None:
        """Features by raw id, from a file of their own or from the interactions."""
        if not columns:
            return None
        if path is None:
            side = table.drop_duplicates(key, keep="last")
        else:
            side = self._read(path, (Column(key), *_features(columns)))
        side = side.set_index(key)[list(columns)]
        return side.rename(columns={title: "title"}) if title else side

    def _seconds(self, texts: pd.Series[Any]) -> pd.Series[Any]:
        """Unix seconds of numbers or of ISO 8601 times (UTC where they name no zone)."""
        name, unit = str(self.timestamp), _UNITS[self.timestamp_unit]
        numbers = pd.to_numeric(texts, errors="coerce")
        if numbers.notna().sum() >= len(texts) / 2:
            seconds, column = numbers / unit, Column(name, "number", 0, _LAST_SECOND * unit)
        else:
            moments = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
            seconds, column = (moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1), Column(name, "time")
        wrong = np.flatnonzero(~seconds.between(0, _LAST_SECOND))
        if not wrong.size:
            return seconds
        remedy = "correct or remove it"
        if numbers.iloc[wrong[0]] > _LAST_SECOND:
            remedy = 'if these are milliseconds, set data.timestamp_unit = "ms"'
        if not is_parquet(self.path):
            raise self._layout(column).refusal(self.path, f"{name} has something else than {column.expected}", remedy)
        raise DataError(
            f"{self.path}, row {wrong[0] + 1}, column {name!r}: expected {column.expected}, got "
            f"{texts.iloc[wrong[0]]!r}; {remedy}"
        )


def _features(names: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(Column(name, empty=True) for name in names)
