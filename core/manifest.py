"""Manifest: what each file of a finished folder must hold, and a digest of the manifest itself.

``manifest.json`` names each file's length and SHA-256; ``manifest.sha256`` holds that of ``manifest.json``, in the form
that ``sha256sum --check`` reads. A digest finds damage, not malice: who may write the folder may write both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
Inode = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """What one file must hold."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: Mapping[Inode, Entry] | None = None) -> Entry:
        """What the file holds, as it is on the disk when this returns.

        A file whose inode is ``known`` was flushed and digested when it was written: a link to it costs nothing, and
        what has been damaged since is not taken for its content.
        """
        status = path.stat()
        entry = (known or {}).get((status.st_dev, status.st_ino))
        if entry is not None and entry.bytes == status.st_size:
            return entry
        flush(path)
        return cls(status.st_size, digest(path))

    def fits(self, path: Path) -> bool:
        """Whether the file is there and holds this."""
        return path.is_file() and path.stat().st_size == self.bytes and digest(path) == self.sha256

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """``content`` as the folder's manifest, with its seal, both on the disk itself when this returns."""
    path, seal = folder / MANIFEST, folder / SEAL
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    flush(path)
    seal.write_text(f"{digest(path)}  {MANIFEST}\n", encoding="utf-8")
    flush(seal)


def is_sealed(folder: Path) -> bool:
    """Whether the folder's manifest has a seal; manifests of format 1 had none."""
    return (folder / SEAL).exists()


def seal_fits(folder: Path) -> bool:
    """Whether the manifest is the one that was sealed."""
    return (folder / SEAL).read_bytes() == f"{digest(folder / MANIFEST)}  {MANIFEST}\n".encode()


def files_under(folder: Path) -> Iterator[Path]:
    """All files under ``folder``, nested ones too, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def flush(path: Path) -> None:
    """Put a file, or a folder's list of files, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
