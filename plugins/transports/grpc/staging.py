"""Staging: uploads on their way in. One that is cut short goes on where it ended; none counts before it is whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedtower.core.checkpoint import storage_errors
from fedtower.core.journal import Task
from fedtower.plugins.transports.grpc.leased import folder_of
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb

_MOST_KEPT = 10_000


@dataclass(frozen=True)
class Staging:
    """Unfinished uploads as files, in a folder a lease, in a folder a window. An upload that comes in one go is never
    written here.
    """

    folder: Path
    most_bytes: int
    _kept: set[Path] = field(default_factory=set, repr=False)

    def held(self, window: tuple[int, Task], lease: bytes, digest: bytes) -> int:
        """How many bytes of an upload are here."""
        try:
            return self._path(window, lease, digest).stat().st_size
        except FileNotFoundError:
            return 0

    async def receive(
        self, window: tuple[int, Task], header: pb.SubmitHeader, whose: str, data: AsyncIterator[memoryview]
    ) -> memoryview:
        """The whole payload, read-only: what is here already, and what comes. One that comes in one piece is not
        copied; of a larger one each piece is, once, to its place.

        Raises:
            Refused: more or less came than was announced; what came of one that ends early is kept.
        """
        here = self._before(window, header, whose)
        whole, first, size = memoryview(b""), memoryview(here), len(here)
        try:
            async for piece in data:
                if size + len(piece) > header.size:
                    size = 0  # nothing of it is worth keeping
                    self.forget(window, header.lease, header.digest)
                    raise Refused(
                        Reason.TOO_LARGE, f"{whose} announced an update of {header.size:,} bytes, and more came"
                    )
                if not size:
                    first = piece
                else:
                    if not whole:
                        whole = memoryview(bytearray(header.size))  # memory that is not written to takes no room
                        whole[:size] = first
                    whole[size : size + len(piece)] = piece
                size += len(piece)
        finally:  # also when the line breaks, which ends this from outside
            if len(here) < size < header.size:
                self._keep(window, header, len(here), (whole or first)[len(here) : size])
        if size < header.size:
            raise Refused(
                Reason.TRUNCATED,
                f"{whose} announced an update of {header.size:,} bytes, and {size:,} are here; send the rest",
                retry_after_seconds=0.1,
            )
        return whole.toreadonly() if whole else first

    def forget(self, window: tuple[int, Task], lease: bytes, digest: bytes) -> None:
        """Let go of what is here of an upload. Of most there is nothing, and nobody looks; what an intake that was
        killed has kept of one that was then sent anew goes with its window.
        """
        path = self._path(window, lease, digest)
        if path in self._kept:
            self._kept.discard(path)
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it is not there, or another upload is in it
                path.parent.rmdir()

    def _before(self, window: tuple[int, Task], header: pb.SubmitHeader, whose: str) -> bytes:
        if not header.offset:
            return b""
        held = self.held(window, header.lease, header.digest)
        if header.offset > held:
            raise Refused(
                Reason.TRUNCATED,
                f"{whose} goes on at {header.offset:,} with an update of which {held:,} bytes are here; ask (Resume) "
                f"before going on",
                retry_after_seconds=0.1,
            )
        path = self._path(window, header.lease, header.digest)
        self._kept.add(path)
        with path.open("rb") as file:
            return file.read(header.offset)

    def _keep(self, window: tuple[int, Task], header: pb.SubmitHeader, offset: int, data: memoryview) -> None:
        with storage_errors(self.folder):
            path = self._path(window, header.lease, header.digest)
            if len(self._kept) > _MOST_KEPT:
                self._kept.clear()  # what is of these goes with its window
            self._kept.add(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # One upload a lease: who begins others without end would fill the disk.
            for other in path.parent.iterdir():
                if other != path:
                    other.unlink()
            with path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.truncate()
                file.write(data)

    def _path(self, window: tuple[int, Task], lease: bytes, digest: bytes) -> Path:
        return self.folder / folder_of(*window) / lease.hex() / digest.hex()[:16]
