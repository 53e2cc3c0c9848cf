"""ArtefactStore: what the server gives out, as files named by their SHA-256."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedtower.core.checkpoint import storage_errors
from fedtower.plugins.transports.grpc.artefacts import Artefact


@dataclass(frozen=True)
class ArtefactStore:
    """A folder that the table process writes and every intake reads."""

    folder: Path

    def put(self, name: str, data: bytes) -> Artefact:
        """The artefact that ``data`` is, in the folder."""
        artefact = Artefact.of(name, data)
        path = self.path(artefact.digest)
        if not path.exists():
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(f".{os.getpid()}")
                unfinished.write_bytes(data)
                unfinished.replace(path)
        return artefact

    def path(self, digest: bytes) -> Path:
        """Where an artefact is, if it is there."""
        return self.folder / digest.hex()

    def chunks(self, first: bytes, offset: int, others: Sequence[bytes], size: int) -> Iterator[bytes]:
        """The bytes of an artefact from an offset on, ``size`` at a time, and then those of ``others``, up to the first
        of them that is larger than that, or not here.
        """
        with self.path(first).open("rb") as file:
            file.seek(offset)
            while len(block := file.read(size)) == size:
                yield block
        held = bytearray()
        for data in chain([block], self._small(others, size)):
            held += data
            while len(held) >= size:
                yield bytes(held[:size])
                del held[:size]
        if held:
            yield bytes(held)

    def _small(self, digests: Sequence[bytes], size: int) -> Iterator[bytes]:
        for digest in digests:
            path = self.path(digest)
            try:
                if len(digest) != 32 or path.stat().st_size > size:
                    return
                yield path.read_bytes()
            except FileNotFoundError:
                return

    def keep_only(self, digests: set[bytes]) -> None:
        """Remove all others: nobody will ask for them any more."""
        kept = {digest.hex() for digest in digests}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
