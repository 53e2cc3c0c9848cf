"""Staging: uploads on their way in. One that is cut short goes on where it ended; none counts before it is whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.checkpoint import storage_errors
from fedtower.core.journal import Task
from fedtower.plugins.transports.grpc.leased import folder_of
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Staging:
    """Unfinished uploads as files, in a folder a lease, in a folder a window. An upload that comes in one go is never
    written here.
    """

    folder: Path
    most_bytes: int

    def held(self, window: tuple[int, Task], lease: bytes, digest: bytes) -> int:
        """How many bytes of an upload are here."""
        try:
            return self._path(window, lease, digest).stat().st_size
        except FileNotFoundError:
            return 0

    async def receive(
        self, window: tuple[int, Task], header: pb.SubmitHeader, whose: str, data: AsyncIterator[bytes]
    ) -> bytes:
        """The whole payload: what is here already, and what comes.

        Raises:
            Refused: more or less came than was announced; what came of one that ends early is kept.
        """
        here = self._before(window, header, whose)
        pieces, size = [here] if here else [], len(here)
        try:
            async for piece in data:
                size += len(piece)
                if size > header.size:
                    self.forget(window, header.lease, header.digest)
                    raise Refused(
                        Reason.TOO_LARGE, f"{whose} announced an update of {header.size:,} bytes, and more came"
                    )
                pieces.append(piece)
        finally:  # also when the line breaks, which ends this from outside
            if len(here) < size < header.size:
                self._keep(window, header, len(here), b"".join(pieces)[len(here) :])
        if size < header.size:
            raise Refused(
                Reason.TRUNCATED,
                f"{whose} announced an update of {header.size:,} bytes, and {size:,} are here; send the rest",
                retry_after_seconds=0.1,
            )
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def forget(self, window: tuple[int, Task], lease: bytes, digest: bytes) -> None:
        """Let go of what is here of an upload."""
        path = self._path(window, lease, digest)
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
        with self._path(window, header.lease, header.digest).open("rb") as file:
            return file.read(header.offset)

    def _keep(self, window: tuple[int, Task], header: pb.SubmitHeader, offset: int, data: bytes) -> None:
        with storage_errors(self.folder):
            path = self._path(window, header.lease, header.digest)
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
