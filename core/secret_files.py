"""Secret files: keys on disk that nobody but their owner reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedtower.core.errors import StorageError, TrustError


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read, from its first byte on, and flush it to disk.

    Raises:
        StorageError: it is there already; a key that is overwritten is lost.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise StorageError(
            f"{path} is there already, and a key is not overwritten; remove it, or name another"
        ) from error
    with os.fdopen(file, "wb") as out:
        os.fchmod(file, 0o600)  # whatever the umask is
        out.write(data)
        out.flush()
        os.fsync(file)


def read_secret(path: Path) -> bytes:
    """The bytes of a secret file.

    Raises:
        TrustError: it is not there, or others than its owner may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except FileNotFoundError as error:
        raise TrustError(f"there is no key {path}") from error
    if mode & 0o077:
        raise TrustError(
            f"{path} has the mode {mode:03o}: others than its owner may read this key; `chmod 600 {path}`, and make a "
            "new one if somebody may have read it"
        )
    return data
