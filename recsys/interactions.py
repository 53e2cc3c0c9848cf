"""Interactions: who touched what, when, as a frame; read from files, cleaned, and made into a population.

The only room of the recommender that knows pandas: what leaves it is an `EventTable` of plain arrays.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.layout import Column, Layout, open_bytes
from fedtower.recsys.population import FloatArray, HeldOut
from fedtower.recsys.vocabulary import Vocabulary

MOST_VALUES = 1_000
"""How many values a feature column may have: each takes a place in every client's feature vector."""

_DTYPES = {"integer": "int64", "number": "float64", "text": "str", "time": "str"}
# One byte that no text file holds, for separators that are longer than pandas' fast parser takes.
_ONE_BYTE = "\x1f"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who touched what, when.

    ``frame`` has the columns ``user`` and ``item`` (raw ids), and may have ``rating`` and ``time`` (Unix seconds).
    Without ``time`` the order of the rows is the order of time. ``users`` and ``items`` are frames indexed by raw id
    whose columns are categorical features, several values separated by ``|``; the column ``title`` of ``items`` is the
    item's title.
    """

    name: str
    frame: pd.DataFrame
    users: pd.DataFrame | None = None
    items: pd.DataFrame | None = None
    times_are_ranks: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_table(self, given: Callable[[Vocabulary, Vocabulary], HeldOut] | None = None) -> EventTable:
        """The population: rows for raw ids in their natural order, one-hot features, and events in time order.

        ``given`` makes the test items that came with the data, once the rows of users and items are known.
        """
        client_rows, users = _vocabulary(self.frame["user"], "user")
        item_rows, items = _vocabulary(self.frame["item"], "item")
        ordered = "time" in self.frame
        user_features = encode(self.users, users)
        item_features = encode(None if self.items is None else self.items.drop(columns="title", errors="ignore"), items)
        extra = dict(self.extra)
        for noun, features in (("user", user_features), ("item", item_features)):
            if features.told:
                extra[f"{noun} features"] = features.told
        return EventTable.build(
            self.name,
            users=users,
            items=items,
            client_rows=client_rows,
            item_rows=item_rows,
            times=self.frame["time"].to_numpy(np.int64) if ordered else np.arange(len(self.frame), dtype=np.int64),
            ratings=self.frame["rating"].to_numpy(np.float32) if "rating" in self.frame else None,
            times_are_ranks=self.times_are_ranks or not ordered,
            user_table=user_features.table,
            item_table=item_features.table,
            titles=_titles(self.items, items),
            given=None if given is None else given(users, items),
            extra=extra,
        )


@dataclass(frozen=True, eq=False)
class Features:
    """Multi-hot features of every row ``(rows, width)``, and in words which columns they come from."""

    table: FloatArray
    told: str = ""


def read_table(path: Path, layout: Layout) -> pd.DataFrame:
    """The layout's columns of a delimited text file, plain or ``.gz``, by pandas' fast parser.

    Raises:
        DataError: a line does not fit; the message has the file, the line, the column, and what was expected.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a line that is too long is only a warning to pandas
            frame = _parse(path, layout)
        refused = next((column for column in layout.columns if not _fits(frame[column.name], column)), None)
    except (ValueError, OverflowError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise layout.refusal(path, str(error)) from error
    if refused is not None:
        raise layout.refusal(path, f"the column {refused.name!r} holds something else than {refused.expected}")
    return frame


def is_parquet(path: Path) -> bool:
    """Whether the file is Parquet, by how it begins."""
    with open_bytes(path) as file:
        return file.read(4) == b"PAR1"


def read_parquet(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    """The given columns of a Parquet file, held to the same promises as text.

    Raises:
        DataError: a column is missing, or a row does not fit; rows are counted from 1.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        Layout(tuple(columns)).places(path, names)
        frame = pd.read_parquet(path, columns=[column.name for column in columns])
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file, or a damaged one: {error}") from error
    for place, column in enumerate(columns, start=1):
        values = frame[column.name]
        good = values.notna().to_numpy() | column.empty
        if column.kind == "text":
            good &= column.empty | (values.astype("str").str.strip() != "").to_numpy()
        else:
            numbers = pd.to_numeric(values, errors="coerce")
            good &= np.isfinite(numbers.to_numpy(np.float64, na_value=np.nan)) & numbers.between(
                column.low, column.high
            )
            frame[column.name] = numbers
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"{path}, row {row + 1}, column {place} ({column.name}): expected {column.expected}, got "
                f"{values.tolist()[row]!r}; correct or remove the row"
            )
    return frame.astype({column.name: _DTYPES[column.kind] for column in columns})


def encode(frame: pd.DataFrame | None, rows: Vocabulary) -> Features:
    """Multi-hot features for the rows of a vocabulary; one that the frame does not know has none.

    Each column is categorical, several values separated by ``|``; an empty text is no value.

    >>> people = pd.DataFrame({"job": ["cook", "cook|poet", ""]}, index=["ann", "bob", "cem"])
    >>> encode(people, Vocabulary(np.array(["bob", "ann"]))).table
    array([[1., 1.],
           [1., 0.]], dtype=float32)

    Raises:
        DataError: a column has more than `MOST_VALUES` values, or the frame has an id twice.
    """
    if frame is None or not len(frame.columns):
        return Features(np.zeros((len(rows), 0), np.float32))
    twice = frame.index[frame.index.duplicated()]
    if len(twice):
        raise DataError(f"the {rows.noun} {str(twice[0])!r} has two lines of features; expected one; remove the other")
    parts, told = [], []
    at = rows.rows(frame.index.to_numpy())
    for name, column in frame.loc[at >= 0].items():
        words = column.fillna("").astype("str").str.split("|").explode()
        words = words[words != ""]
        values = sorted(words.unique())
        if len(values) > MOST_VALUES:
            raise DataError(
                f"the feature column {name!r} has {len(values):,} different values, for example {values[0]!r}; at most "
                f"{MOST_VALUES:,} are one-hot encoded; put the values into groups, or leave the column out"
            )
        table = np.zeros((len(rows), len(values)), np.float32)
        table[rows.rows(words.index.to_numpy()), np.searchsorted(np.array(values), words.to_numpy(str))] = 1
        parts.append(table)
        told.append(f"{name} ({len(values)})")
    return Features(np.concatenate(parts, axis=1), ", ".join(told))


def _parse(path: Path, layout: Layout) -> pd.DataFrame:
    names = [column.name for column in layout.columns]
    dtypes: Any = defaultdict(lambda: "str", {column.name: _DTYPES[column.kind] for column in layout.columns})
    with open_bytes(path) as raw:
        source: Any = raw
        separator = layout.separator
        if len(separator) > 1:
            source = io.BytesIO(raw.read().replace(separator.encode(), _ONE_BYTE.encode()))
            separator = _ONE_BYTE
        try:
            frame = pd.read_csv(
                source,
                sep=separator,
                header=0 if layout.header else None,
                names=None if layout.header else names,
                dtype=dtypes,
                encoding=layout.encoding,
                quoting=0 if layout.quoted else 3,
                keep_default_na=False,  # an item may be called NA
                index_col=False,
            )
        except pd.errors.EmptyDataError:
            frame = pd.DataFrame(columns=names)
    layout.places(path, [str(name) for name in frame.columns])
    if frame.empty:
        raise DataError(f"{path} is empty; expected lines of {', '.join(names)}")
    return frame[names]


def _fits(values: pd.Series[Any], column: Column) -> bool:
    if column.kind == "text":
        return column.empty or not bool((values.fillna("").str.strip() == "").any())
    return bool(np.isfinite(values).all() and values.between(column.low, column.high).all())


def _vocabulary(raw: pd.Series[Any], noun: str) -> tuple[NDArray[np.int64], Vocabulary]:
    """The row of every raw id, and the ids of the rows, sorted: their order says nothing of how popular they are."""
    codes, ids = pd.factorize(raw, sort=True)
    whole = pd.api.types.is_integer_dtype(raw)
    return codes.astype(np.int64, copy=False), Vocabulary(np.asarray(ids, dtype=np.int64 if whole else str), noun)


def _titles(items: pd.DataFrame | None, rows: Vocabulary) -> tuple[str | None, ...]:
    if items is None or "title" not in items:
        return ()
    titles: list[str | None] = [None] * len(rows)
    for row, title in zip(rows.rows(items.index.to_numpy()).tolist(), items["title"], strict=True):
        if row >= 0 and isinstance(title, str) and title.strip():
            titles[row] = title.strip()
    return tuple(titles)
