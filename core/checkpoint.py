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

# What a checkpoint's folder is called; a hidden one is on its way in or out, and only one set aside is ever read.
_PLACE, _UNFINISHED, _REPLACED, _REMOVED = "{:06d}", ".{:06d}.unfinished", ".{:06d}.replaced", ".{:06d}.removed"


def write_checkpoint(folder: Path, round: int, arrays: Arrays, keep: int) -> Path:
    """The path of the checkpoint of ``round`` under ``folder``; those of earlier rounds are removed afterwards, until
    ``keep`` are left with this one.

    Raises:
        StorageError: the disk is full, read-only, or not ours to write.
    """
    place, unfinished, replaced = (folder / name.format(round) for name in (_PLACE, _UNFINISHED, _REPLACED))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        unfinished.mkdir()
        try:
            _write_files(unfinished, round, arrays)
            if place.exists():
                place.rename(replaced)  # until the next line it is read from there
            unfinished.rename(place)
            _sync_folder(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        # Later ones are of a future that is being run again, or that somebody may still want.
        for old in [other for other in list_checkpoints(folder) if other <= round][:-keep]:
            _remove(folder, old)
    return place


def read_checkpoint(folder: Path, round: int) -> dict[str, NDArray[Any]]:
    """The arrays of the checkpoint of ``round``, each checked against the manifest before it is used.

    Raises:
        CheckpointError: a file that is missing, cut short or altered.
    """
    place = _place(folder, round)
    older = [other for other in list_checkpoints(folder) if other < round]
    advice = (
        f"Continue from the one before it with --from {older[-1]}."
        if older
        else "There is no older one here: start the run again, or bring the folder back from a backup."
    )
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint {place} has format {manifest['format']}, and this fedtower reads {FORMAT}; "
                f"use the fedtower that wrote it (environment.json in the run folder names it)"
            )
        files = [
            (name, place / entry["file"], int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["arrays"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint {place} has no readable manifest.json ({type(error).__name__}: {error}). {advice}"
        ) from error
    arrays = {}
    for name, path, size, digest in files:
        held = path.stat().st_size if path.is_file() else 0
        if held != size or _digest(path) != digest:
            raise CheckpointError(
                f"the checkpoint {place} is damaged: {path.name} ({name}) should hold {size} bytes with SHA-256 "
                f"{digest[:12]}..., and holds {held} that differ. {advice}"
            )
        arrays[name] = np.load(path, allow_pickle=False)
    return arrays


def list_checkpoints(folder: Path) -> list[int]:
    """The rounds that have a finished checkpoint under ``folder``, oldest first."""
    finished = {path.name for path in folder.glob("[0-9]*")} | {path.stem[1:] for path in folder.glob(".*.replaced")}
    return sorted(int(name) for name in finished if name.isdecimal())


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


def _write_files(place: Path, round: int, arrays: Arrays) -> None:
    """One file an array and the manifest, all of them on the disk itself when this returns."""
    files = {}
    for position, (name, array) in enumerate(sorted(arrays.items())):
        path = place / f"{position:04d}.npy"
        with path.open("wb") as stream:
            np.save(stream, np.asarray(array, order="C"), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        files[name] = {"file": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)}
    with (place / "manifest.json").open("w", encoding="utf-8") as text:
        json.dump({"format": FORMAT, "round": round, "arrays": files}, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    _sync_folder(place)


def _place(folder: Path, round: int) -> Path:
    """Where the checkpoint of ``round`` is: aside, if a kill came while another was taking its place."""
    place, replaced = folder / _PLACE.format(round), folder / _REPLACED.format(round)
    return replaced if replaced.exists() and not place.exists() else place


def _remove(folder: Path, round: int) -> None:
    """Take a checkpoint off the list in one step, and then file by file off the disk."""
    removed = folder / _REMOVED.format(round)
    (folder / _PLACE.format(round)).rename(removed)
    shutil.rmtree(removed)


def _tidy(folder: Path) -> None:
    """Remove what a kill left behind, and put back what it left aside."""
    for left_over in [*folder.glob(".*.unfinished"), *folder.glob(".*.removed")]:
        shutil.rmtree(left_over)
    for replaced in folder.glob(".*.replaced"):
        place = folder / replaced.stem[1:]
        if place.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(place)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
