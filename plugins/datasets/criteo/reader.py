"""The official file of Criteo's challenge, streamed: a label, 13 whole numbers and 26 categories a line, no header.

A block of lines is held at a time, so that what is needed of a file of 11 GB is read in the memory of its arrays.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.layout import Column, Layout, open_bytes

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

INTEGERS = tuple(f"I{place}" for place in range(1, 14))
CATEGORIES = tuple(f"C{place}" for place in range(1, 27))
LAYOUT = Layout(
    (
        Column("label", "integer", 0, 1),
        *(Column(name, "integer", empty=True) for name in INTEGERS),
        *(Column(name, "hex", empty=True) for name in CATEGORIES),
    ),
    separator="\t",
)
MISSING = -1
"""The word of a category that is not given."""

_BLOCK = 1 << 24  # bytes read at a time: about 70,000 lines
_TABS = len(LAYOUT.columns) - 1


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines of the file as numbers.

    Shape:
        labels ``(E,)``; integers ``(E, 13)``, not a number where missing; words ``(E, 26)``, the eight hexadecimal
        digits as a number, :data:`MISSING` where missing.
    """

    labels: FloatArray
    integers: FloatArray
    words: IntArray


def read(path: Path, rows: int) -> Lines:
    """The first ``rows`` lines, or all where there are fewer.

    Raises:
        DataError: a line does not fit; the message has the file, the line, the column, and what was expected.
    """
    parts: list[Lines] = []
    with open_bytes(path) as raw:
        for block in _blocks(raw):
            parts.append(_parse(path, block))
            if sum(len(part.labels) for part in parts) >= rows:
                break
    if not parts:
        raise DataError(f"{path} is empty; expected lines of {', '.join(column.name for column in LAYOUT.columns)}")
    return Lines(
        np.concatenate([part.labels for part in parts])[:rows],
        np.concatenate([part.integers for part in parts])[:rows],
        np.concatenate([part.words for part in parts])[:rows],
    )


def _blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """The content in pieces that end with a line."""
    rest = b""
    while block := raw.read(_BLOCK):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield whole
    if rest.strip():
        yield rest


def _parse(path: Path, block: bytes) -> Lines:
    """The lines of a block.

    Raises:
        DataError: see :func:`read`.
    """
    names = [column.name for column in LAYOUT.columns]
    dtypes: Any = {**dict.fromkeys(INTEGERS, "float64"), **dict.fromkeys(CATEGORIES, "str"), "label": "float64"}
    _check_columns(path, block)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frame = pd.read_csv(
                io.BytesIO(block),
                sep="\t",
                header=None,
                names=names,
                dtype=dtypes,
                quoting=3,
                keep_default_na=False,
                na_values=[""],
                index_col=False,
            )
    except (ValueError, OverflowError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise LAYOUT.refusal(path, str(error)) from error
    label = frame["label"].to_numpy()
    if not np.isin(label, (0.0, 1.0)).all():
        raise LAYOUT.refusal(path, "a label is neither 0 nor 1")
    integers = frame[list(INTEGERS)].to_numpy()
    given = integers[~np.isnan(integers)]
    if not np.array_equal(given, np.floor(given)) or np.isinf(given).any():
        raise LAYOUT.refusal(path, "one of the numbers is not a whole number")
    words = np.stack([_words(path, frame[name]) for name in CATEGORIES], axis=1)
    return Lines(label.astype(np.float32), integers.astype(np.float32), words)


def _check_columns(path: Path, block: bytes) -> None:
    """Raise DataError unless every line has 40 columns: to pandas a line that was cut is one with missing values."""
    symbols = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(symbols == ord("\n"))
    tabs = np.flatnonzero(symbols == ord("\t"))
    edges = np.concatenate([[-1], ends, [len(symbols)]])
    counts = np.diff(np.searchsorted(tabs, edges))
    # A blank line, which may hold the other half of a Windows line end, is passed over by everybody.
    if np.any((counts != _TABS) & (np.diff(edges) > 2)):
        raise LAYOUT.refusal(path, f"a line has not {_TABS + 1} columns")


def _words(path: Path, column: pd.Series[Any]) -> IntArray:
    """A column of eight hexadecimal digits as numbers."""
    codes, known = pd.factorize(column)  # "category" as a type would take 00000010 for a number
    if len(known) and not pd.Series(known).str.fullmatch("[0-9a-f]{8}").all():
        raise LAYOUT.refusal(path, f"the column {column.name!r} holds something else than 8 hexadecimal digits")
    words = np.array([*(int(text, 16) for text in known), MISSING], dtype=np.int64)
    return words[codes]  # the code of a missing value is -1: the last
