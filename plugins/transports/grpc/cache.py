"""ArtefactCache: what a device has fetched, by its SHA-256, on disk and bounded; what was cut short goes on where it
ended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import StorageError
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

Fetch = Callable[[Artefact, int], Iterable[bytes]]
"""Gives an artefact's bytes from an offset on."""

SMALL_BYTES = 256 << 10
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ArtefactCache:
    """Files named by digest under ``folder``; above ``limit_bytes`` those that were longest unused go first.

    A file is looked through before it is used: a disk that forgot something costs a fetch and no more.
    """

    folder: Path
    limit_bytes: int = 256 << 20

    def get(self, artefact: Artefact, fetch: Fetch, *, keep: Collection[bytes] = ()) -> Path:
        """The file of an artefact, fetched if it is not here; room is made for it, but not of the digests in ``keep``.

        Raises:
            Refused: what was fetched is not the artefact.
            StorageError: the disk is full, or the artefacts in use are more than the limit.
        """
        found = self.find(artefact)
        if found is not None:
            return found
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(artefact, {artefact.digest, *keep})
            return self._receive(artefact, fetch)

    def put(self, artefact: Artefact, data: bytes, *, keep: Collection[bytes] = ()) -> None:
        """Take in an artefact that was made here; room is made for it, but not of the digests in ``keep``."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(artefact, {artefact.digest, *keep})
            self._write(artefact, data)

    def gather(
        self, artefacts: Iterable[Artefact], fetch: Callable[[list[Artefact]], Iterable[tuple[Artefact, bytes]]]
    ) -> None:
        """Take in what of these small artefacts is not here and ``fetch`` gives; :meth:`get` asks for the rest."""
        missing = [each for each in artefacts if each.size <= SMALL_BYTES and self.find(each) is None]
        if len(missing) < 2 or sum(each.size for each in missing) > self.limit_bytes:
            return
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for each, data in fetch(missing):
                self._write(each, data)

    def keep_only(self, digests: Collection[bytes]) -> None:
        """Remove all others: the server's newest plan does not name them."""
        kept = {digest.hex() for digest in digests}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    def find(self, artefact: Artefact) -> Path | None:
        """The file of an artefact, if it is here and whole; it counts as used now."""
        path = self.folder / artefact.digest.hex()
        try:
            if path.stat().st_size != artefact.size or _digest(_blocks(path)) != artefact.digest:
                path.unlink()
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def _write(self, artefact: Artefact, data: bytes) -> None:
        path = self.folder / artefact.digest.hex()
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(artefact.check(data))
        unfinished.replace(path)

    def _receive(self, artefact: Artefact, fetch: Fetch) -> Path:
        """Append to what came before, and keep it only if the whole is the artefact."""
        path = self.folder / artefact.digest.hex()
        partial = path.with_suffix(".part")
        with partial.open("ab") as file:
            if file.tell() > artefact.size:
                file.truncate(0)
            for data in fetch(artefact, file.tell()) if file.tell() < artefact.size else ():
                if file.tell() + len(data) > artefact.size:
                    partial.unlink()
                    raise Refused(
                        Reason.TOO_LARGE,
                        f"the artefact {artefact.name!r} should have {artefact.size:,} bytes: more came",
                    )
                file.write(data)
            size = file.tell()
        if size < artefact.size:  # it stays, and the next fetch goes on from here
            raise Refused(
                Reason.TRUNCATED, f"of the artefact {artefact.name!r} {size:,} of {artefact.size:,} bytes came"
            )
        if _digest(_blocks(partial)) != artefact.digest:
            partial.unlink()
            raise Refused(
                Reason.CORRUPT, f"the artefact {artefact.name!r} is not what its digest {artefact.digest.hex()} says"
            )
        partial.replace(path)
        return path

    def _make_room(self, artefact: Artefact, keep: Collection[bytes]) -> None:
        """Remove what was longest unused until the artefact fits."""
        kept = {digest.hex() for digest in keep}
        held = sorted((path for path in self.folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
        room = self.limit_bytes - artefact.size - sum(path.stat().st_size for path in held if path.suffix != ".part")
        for path in held:
            if room >= 0:
                break
            if path.stem not in kept:
                room += path.stat().st_size
                path.unlink()
        if room < 0:
            raise StorageError(
                f"the artefact {artefact.name!r} of {artefact.size:,} bytes does not fit into {self.folder}: its limit "
                f"of {self.limit_bytes:,} bytes is taken by what this visit needs; allow more (--cache-mb)"
            )


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _digest(blocks: Iterable[bytes]) -> bytes:
    said = hashlib.sha256()
    for block in blocks:
        said.update(block)
    return said.digest()
