"""Segments: append-only files of payloads, each with a header that says whose it is.

A record is ``magic, CRC-32 of the rest of the header, length, lease, SHA-256`` (big-endian, 64 bytes) and the payload.
A segment is written by one process, which holds a lock on it for as long as it lives; after that process nobody adds to
it. How far it counts is in the index: what lies beyond was never acknowledged.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.journal import DamagedRecord, Upload

ADVICE = "Bring the file back from a backup, or abandon the round; what else was accepted is intact"

MAGIC = b"ftj1"
_REST = struct.Struct(">Q16s32s")
_START = struct.Struct(">4sI")
HEADER_BYTES = _START.size + _REST.size
# Linux takes 1,024 pieces in one writev.
_PIECES = 1024


@dataclass(frozen=True)
class Place:
    """Where a payload lies: after the header at ``offset`` of a segment."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + HEADER_BYTES + self.length


def segment_path(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"{number:08d}.segment"


class Segment:
    """The segment that this process writes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.path = segment_path(folder, number)
        self.end = 0
        # Whoever began a segment of this number was killed before the index had it.
        self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        sync_folder(folder)

    def append(self, uploads: Sequence[Upload]) -> list[Place]:
        """Where the payloads lie now, on the disk itself; after an OSError nothing may be appended any more."""
        places, end = list[Place](), self.end
        pieces = list[bytes | memoryview]()
        for upload in uploads:
            places.append(Place(self.number, end, upload.nbytes))
            pieces += [_header(upload), *upload.chunks]
            end = places[-1].end
        _write_all(self._file, pieces)
        os.fdatasync(self._file)
        self.end = end
        return places

    def cut(self) -> None:
        """Give back the space of what a failed append has left."""
        os.ftruncate(self._file, self.end)

    def close(self) -> None:
        """Let go of it: from now on anybody may cut off what the index does not have."""
        os.close(self._file)


def read_payload(file: int, place: Place, lease: bytes, digest: bytes, whose: str) -> bytes:
    """The payload at ``place`` of an open segment, once it is sure that it is the one that was accepted.

    Raises:
        DamagedRecord: it is not; the message begins with ``whose``.
    """
    header = os.pread(file, HEADER_BYTES, place.offset)
    if header != header_bytes(place.length, lease, digest):
        raise DamagedRecord(f"{whose}: the header at byte {place.offset} is not the one that was written. {ADVICE}")
    payload = _read_all(file, place.length, place.offset + HEADER_BYTES)
    if len(payload) != place.length:
        raise DamagedRecord(f"{whose}: of {place.length} bytes {len(payload)} are there. {ADVICE}")
    if hashlib.sha256(payload).digest() != digest:
        raise DamagedRecord(f"{whose}: the payload after byte {place.offset} does not have its SHA-256. {ADVICE}")
    return payload


def records(path: Path, extent: int) -> Iterator[tuple[Place, bytes, bytes]]:
    """The place, lease and digest of every record in the first ``extent`` bytes of a segment.

    Raises:
        DamagedRecord: the file is shorter than that, or there is no header where one should be.
    """
    number, offset = int(path.stem), 0
    with path.open("rb") as file:
        while offset < extent:
            header = os.pread(file.fileno(), HEADER_BYTES, offset)
            length, lease, digest = (
                _REST.unpack(header[_START.size :]) if len(header) == HEADER_BYTES else (0, b"", b"")
            )
            if header != header_bytes(length, lease, digest):
                raise DamagedRecord(f"{path}: there is no record at byte {offset}, and the segment counts to {extent}")
            place = Place(number, offset, length)
            yield place, lease, digest
            offset = place.end


def is_written(path: Path) -> bool:
    """Whether a living process holds the segment."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def header_bytes(length: int, lease: bytes, digest: bytes) -> bytes:
    """The header of a record."""
    rest = _REST.pack(length, lease, digest)
    return _START.pack(MAGIC, zlib.crc32(rest)) + rest


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(upload: Upload) -> bytes:
    return header_bytes(upload.nbytes, upload.lease, upload.digest)


def _write_all(file: int, pieces: Sequence[bytes | memoryview]) -> None:
    for start in range(0, len(pieces), _PIECES):
        several = pieces[start : start + _PIECES]
        written, wanted = os.writev(file, several), sum(map(len, several))
        if written < wanted:  # a signal, or a disk that has only so much space: the rest goes on or says why not
            rest = memoryview(b"".join(several))[written:]
            while rest:
                rest = rest[os.write(file, rest) :]


def _read_all(file: int, length: int, offset: int) -> bytes:
    """What is there of ``length`` bytes; one read gives 2 GiB at most, and may give less."""
    pieces, left = [], length
    while left and (piece := os.pread(file, min(left, 1 << 30), offset + length - left)):
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
