"""Layout: the columns that a text file must have, and the exact place where it has not."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

from fedtower.core.errors import DataError, nearest

_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_HEX = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class Column:
    """A column by name, and what its values must be; ``empty`` says that a value may be missing."""

    name: str
    kind: Literal["integer", "number", "text", "time", "hex"] = "text"
    low: float = -math.inf
    high: float = math.inf
    empty: bool = False

    @property
    def expected(self) -> str:
        """What a value must be, in words.

        >>> Column("rating", "number", 1, 5).expected
        'a number from 1 to 5'
        """
        if self.kind == "text":
            return "any text" if self.empty else "a text that is not empty"
        if self.kind == "time":
            return "a time of 1970 or later in ISO 8601, such as 2024-05-01T12:30:00"
        if self.empty:
            return f"{replace(self, empty=False).expected}, or nothing"
        if self.kind == "hex":
            return "8 hexadecimal digits"
        noun = "a whole number" if self.kind == "integer" else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{noun} from {self.low:.12g} to {self.high:.12g}"
        return f"{noun} of {self.low:.12g} or more" if math.isfinite(self.low) else noun

    def accepts(self, text: str) -> bool:
        """Whether this is such a value."""
        text = text.strip()
        if not text:
            return self.empty
        if self.kind == "text":
            return True
        if self.kind == "time":
            return _is_time(text)
        if self.kind == "hex":
            return _HEX.fullmatch(text) is not None
        if self.kind == "integer" and not (_WHOLE.fullmatch(text) and abs(float(text)) < 2**63):
            return False
        try:
            number = float(text)
        except ValueError:
            return False
        return math.isfinite(number) and self.low <= number <= self.high


@dataclass(frozen=True)
class Layout:
    """The columns of a delimited text file: by place, or by name where the file has a ``header`` line.

    A file with a header may have other columns too. ``quoted`` files follow the rules of CSV (RFC 4180).
    """

    columns: tuple[Column, ...]
    separator: str = ","
    header: bool = False
    quoted: bool = False
    encoding: str = "utf-8"

    def refusal(
        self, path: Path, cause: str, remedy: str = "correct or remove the line, or fetch the file again"
    ) -> DataError:
        """The error for the first line of the file that does not fit, found line by line.

        ``cause`` is what made somebody look; it is what is left to say if every line fits.
        """
        with open_bytes(path) as raw:
            rows = self._rows(raw, path)
            columns: Sequence[tuple[int, Column]] = list(enumerate(self.columns))
            width = len(columns)
            if self.header:
                _, names = next(rows, (1, []))
                columns = self.places(path, names)
                width = len(names)
            for line, fields in rows:
                wrong = _first_wrong(fields, columns, width, self.separator)
                if wrong:
                    return DataError(f"{path}, line {line}, {wrong}; {remedy}")
        return DataError(f"{path} cannot be read: {cause}")

    def places(self, path: Path, names: Sequence[str]) -> list[tuple[int, Column]]:
        """Where each column stands under these header names.

        Raises:
            DataError: one is not there; the message names the nearest.
        """
        for column in self.columns:
            if column.name not in names:
                raise DataError(
                    f"{path}, line 1, has no column {column.name!r}{nearest(column.name, names)}; "
                    f"its columns, separated by {self.separator!r}, are {', '.join(names) or 'none'}"
                )
        return [(list(names).index(column.name), column) for column in self.columns]

    def names(self, path: Path) -> list[str]:
        """The header of the file."""
        with open_bytes(path) as raw:
            return next(self._rows(raw, path), (1, []))[1]

    def _rows(self, raw: IO[bytes], path: Path) -> Iterator[tuple[int, list[str]]]:
        """The fields of each line that is not blank, and its number."""
        lines = _decoded(raw, self.encoding, path)
        if self.quoted:
            reader = csv.reader(lines, delimiter=self.separator, strict=True)
            start = 1
            try:
                for fields in reader:
                    if fields:
                        yield start, fields
                    start = reader.line_num + 1
            except csv.Error as error:
                raise DataError(f"{path}, line {start}, is not CSV: {error}; is a quotation mark missing?") from error
            return
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            if text:
                yield number, text.split(self.separator)


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, unpacked if its name ends in ``.gz``."""
    return io.BufferedReader(_Unpacked(path)) if path.suffix == ".gz" else path.open("rb")


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that is in the folder, plain or ``.gz``."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


class _Unpacked(io.RawIOBase):
    """A gzip file whose damage is told as a :class:`DataError`, wherever in the file it is met."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed by close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return self._file.readinto(buffer)
        except EOFError as error:
            raise DataError(
                f"{self._path} ends too early: the gzip file is cut, probably a download that broke off; fetch it again"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._path} is not a gzip file, or a damaged one ({error}); fetch it again") from error

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).year >= 1970
    except ValueError:
        return False


def _decoded(raw: IO[bytes], encoding: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(raw, start=1):
        try:
            # A byte order mark, which spreadsheets write, is no part of the first name.
            yield line.decode("utf-8-sig" if number == 1 and encoding == "utf-8" else encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}, byte {error.start + 1}: expected {encoding} text, got the byte "
                f"{line[error.start]:#04x}; convert the file to {encoding}"
            ) from error


def _first_wrong(
    fields: Sequence[str], columns: Sequence[tuple[int, Column]], width: int, separator: str
) -> str | None:
    """What is wrong with one line, or nothing."""
    if len(fields) != width:
        at = min(len(fields), width) + 1
        return f"column {at}: expected {width} columns separated by {separator!r}, got {len(fields)}"
    for place, column in columns:
        if not column.accepts(fields[place]):
            return f"column {place + 1} ({column.name}): expected {column.expected}, got {fields[place]!r}"
    return None
