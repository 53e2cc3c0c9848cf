"""Checkpoint: a round's whole state on disk, written so that a kill leaves the old one or the new one, and never half
of one.

A checkpoint is a folder ``checkpoints/000040`` with one ``.npy`` file an array and a ``manifest.json`` that names each
file's length and SHA-256. It is written beside its place, flushed to the disk, and renamed: the rename is the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DISK_ERRORS, CheckpointError, StorageError

FORMAT = 1
Arrays = Mapping[str, NDArray[Any]]


def write_checkpoint(folder: Path, round: int, arrays: Arrays, keep: int) -> Path:
    """The path of the checkpoint of ``round`` under ``folder``; older ones but the last ``keep`` are removed
    afterwards.

    Raises:
        StorageError: the disk is full, read-only, or not ours to write.
    """
    place = folder / f"{round:06d}"
    unfinished = folder / f".{place.name}.{os.getpid()}"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*"):
            shutil.rmtree(left_over)
        unfinished.mkdir()
        try:
            files = {}
            for position, (name, array) in enumerate(sorted(arrays.items())):
                path = unfinished / f"{position:04d}.npy"
                with path.open("wb") as stream:
                    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
                    stream.flush()
                    os.fsync(stream.fileno())
                files[name] = {"file": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}
            manifest = unfinished / "manifest.json"
            with manifest.open("w", encoding="utf-8") as text:
                json.dump({"format": FORMAT, "round": round, "arrays": files}, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            if place.exists():
                shutil.rmtree(place)
            unfinished.rename(place)
            _sync_folder(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(folder / f"{old:06d}")
    return place


def read_checkpoint(folder: Path, round: int) -> dict[str, NDArray[Any]]:
    """The arrays of the checkpoint of ``round``, each checked against the manifest before it is used.

    Raises:
        CheckpointError: a file that is missing, cut short or altered.
    """
    place = folder / f"{round:06d}"
    older = [other for other in list_checkpoints(folder) if other < round]
    advice = (
        f"Continue from the one before it with --from {older[-1]}."
        if older
        else "There is no older one here: start the run again, or bring the folder back from a backup."
    )
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["arrays"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint {place} has format {manifest['format']}, and this fedtower reads {FORMAT}; "
                f"use the fedtower that wrote it (environment.json in the run folder names it)"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {place} has no readable manifest.json ({error}). {advice}") from error
    arrays = {}
    for name, entry in files.items():
        path = place / entry["file"]
        size = path.stat().st_size if path.exists() else 0
        if size != entry["bytes"] or _digest(path) != entry["sha256"]:
            raise CheckpointError(
                f"the checkpoint {place} is damaged: {path.name} ({name}) should hold {entry['bytes']} bytes with "
                f"SHA-256 "
                f"{entry['sha256'][:12]}..., and holds {size} that differ. {advice}"
            )
        arrays[name] = np.load(path, allow_pickle=False)
    return arrays


def list_checkpoints(folder: Path) -> list[int]:
    """The rounds that have a finished checkpoint under ``folder``, oldest first."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()) if folder.is_dir() else []


def grouped(arrays: Arrays, group: str) -> dict[str, NDArray[Any]]:
    """The arrays whose name starts with ``group/``, without it."""
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a disk can say (full, read-only, not permitted) into a StorageError that names ``path`` and the way
    out.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise StorageError(
                f"cannot write to {path}: {DISK_ERRORS[error.errno]}. What was committed before is intact; of a run "
                f"that has a checkpoint, `fedtower resume` goes on from there."
            ) from error
        raise


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
