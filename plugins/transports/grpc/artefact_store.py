"""ArtefactStore: what the server gives out, as files named by their SHA-256."""

from __future__ import annotations

import os
from dataclasses import dataclass
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

    def keep_only(self, digests: set[bytes]) -> None:
        """Remove all others: nobody will ask for them any more."""
        kept = {digest.hex() for digest in digests}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
