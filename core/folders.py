"""Folders that a user names: made where they are missing, and where they cannot be, it is said why."""

from __future__ import annotations

import errno
from pathlib import Path

from fedtower.core.errors import DISK_ERRORS, StorageError

_NO_PLACE = {
    errno.ENOENT: "a part of that path is not there and cannot be made; choose another folder",
    errno.EEXIST: "something else has that name, a file or a link to nowhere; choose another folder",
}


def make_folder(path: Path) -> None:
    """Make a folder, and those above it; one that is there stays as it is.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = DISK_ERRORS.get(error.errno or 0) or _NO_PLACE.get(error.errno or 0) or str(error.strerror)
        raise StorageError(f"the folder {path} cannot be made: {why}") from error
