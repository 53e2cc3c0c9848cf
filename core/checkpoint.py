"""Checkpoint: a round's whole state on disk, written so that a kill leaves the old one or the new one, and never half
of one.

A checkpoint is a folder ``checkpoints/000040`` with one ``.npy`` file an array, a folder ``attachments/NAME`` for each
part that writes files of its own (tables in shards, what clients keep), and a manifest that names each file's length
and SHA-256. It is written beside its place, flushed to the disk, and renamed: the rename is the commit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DISK_ERRORS, CheckpointError, StorageError
from fedtower.core.manifest import (
    MANIFEST,
    SEAL,
    Entry,
    Inode,
    files_under,
    flush,
    is_sealed,
    seal_fits,
    write_manifest,
)

FORMAT = 2
_UNSEALED = 1  # the format before: without attachments, and without a digest of the manifest
Arrays = Mapping[str, NDArray[Any]]
Attachments = Mapping[str, Callable[[Path], None]]
_NONE: Attachments = MappingProxyType({})

# What a checkpoint's folder is called; a hidden one is on its way in or out, and only one set aside is ever read.
_PLACE, _UNFINISHED, _REPLACED, _REMOVED = "{:06d}", ".{:06d}.unfinished", ".{:06d}.replaced", ".{:06d}.removed"
_ATTACHED = "attachments"


def write_checkpoint(folder: Path, round: int, arrays: Arrays, keep: int, attachments: Attachments = _NONE) -> Path:
    """The path of the checkpoint of ``round`` under ``folder``; those of earlier rounds are removed afterwards, until
    ``keep`` are left with this one.

    Each of ``attachments`` is called with an empty folder of its own, and writes there whatever files it likes, nested
    ones too; they are flushed, digested and committed with the rest. A file that is a hard link to one of an earlier
    checkpoint (see :func:`earlier_attachments`) is neither flushed nor read again.

    Raises:
        StorageError: the disk is full, read-only, or not ours to write.
        ValueError: an attachment whose name is no plain file name.
    """
    place, unfinished, replaced = (folder / name.format(round) for name in (_PLACE, _UNFINISHED, _REPLACED))
    for name in attachments:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"an attachment's name is the name of its folder, which {name!r} cannot be")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        unfinished.mkdir()
        try:
            _write_files(unfinished, round, arrays, attachments)
            if place.exists():
                place.rename(replaced)  # until the next line it is read from there
            unfinished.rename(place)
            flush(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        # Later ones are of a future that is being run again, or that somebody may still want.
        for old in [other for other in list_checkpoints(folder) if other <= round][:-keep]:
            _remove(folder, old)
    return place


def read_checkpoint(folder: Path, round: int, advice: str | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of the checkpoint of ``round``, each checked against the manifest before it is used; ``advice`` is
    what to do when it is damaged, by default to go on from an older one.

    Raises:
        CheckpointError: a file that is missing, cut short or altered.
    """
    checkpoint = _Checkpoint.open(folder, round, advice)
    arrays = {}
    for name, (path, entry) in checkpoint.arrays.items():
        checkpoint.check(path, entry, name)
        arrays[name] = np.load(path, allow_pickle=False)
    return arrays


def read_attachments(folder: Path, round: int) -> dict[str, Path]:
    """The folder of each attachment of the checkpoint of ``round``, checked as :func:`attachment` does."""
    return {name: attachment(folder, round, name) for name in _Checkpoint.open(folder, round).attachments}


def attachment(folder: Path, round: int, name: str) -> Path:
    """The folder that the attachment ``name`` of the checkpoint of ``round`` wrote; to be read and left as it is.

    Raises:
        CheckpointError: there is none of that name, or a file of it is missing, cut short, altered or was added.
    """
    checkpoint = _Checkpoint.open(folder, round)
    if name not in checkpoint.attachments:
        raise CheckpointError(
            f"the checkpoint {checkpoint.place} holds no {name!r}: it was written by a run with other parts, or by an "
            f"earlier fedtower; resume with the recipe and the fedtower that it was written with"
        )
    place, files = checkpoint.place / _ATTACHED / name, checkpoint.attachments[name]
    for added in (path for path in files_under(place) if str(path.relative_to(place)) not in files):
        raise CheckpointError(
            f"the checkpoint {checkpoint.place} is damaged: {added} is not one of the files it was written with. "
            f"{checkpoint.advice}"
        )
    for file, entry in files.items():
        checkpoint.check(place / file, entry, name)
    return place


def earlier_attachments(place: Path) -> list[Path]:
    """For an attachment that is being written to ``place``: the folders of the same name in the finished checkpoints
    beside it, newest first. Their files may be linked, and never altered.
    """
    folder = place.parents[2]
    older = (_place(folder, round) / _ATTACHED / place.name for round in reversed(list_checkpoints(folder)))
    return [path for path in older if path.is_dir()]


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


def _write_files(place: Path, round: int, arrays: Arrays, attachments: Attachments) -> None:
    """One file an array, the attachments and the manifest, all of them on the disk itself when this returns."""
    known = _known_files(place.parent)
    content: dict[str, Any] = {"format": FORMAT, "round": round, "arrays": {}, "attachments": {}}
    for position, (name, array) in enumerate(sorted(arrays.items())):
        path = place / f"{position:04d}.npy"
        with path.open("wb") as stream:
            np.save(stream, np.asarray(array, order="C"), allow_pickle=False)
        content["arrays"][name] = {"file": path.name, **Entry.of(path).to_dict()}
    for name, write in sorted(attachments.items()):
        attached = place / _ATTACHED / name
        attached.mkdir(parents=True)
        write(attached)
        content["attachments"][name] = {
            str(path.relative_to(attached)): Entry.of(path, known).to_dict() for path in files_under(attached)
        }
    write_manifest(place, content)
    for inner in (path for path in place.rglob("*") if path.is_dir()):
        flush(inner)
    flush(place)


def _known_files(folder: Path) -> dict[Inode, Entry]:
    """What the manifests of the finished checkpoints say about the attached files that are there, by inode."""
    known: dict[Inode, Entry] = {}
    for round in list_checkpoints(folder):
        with suppress(CheckpointError, OSError):  # nothing is taken from a damaged one
            checkpoint = _Checkpoint.open(folder, round)
            for name, files in checkpoint.attachments.items():
                for file, entry in files.items():
                    status = (checkpoint.place / _ATTACHED / name / file).stat()
                    known[status.st_dev, status.st_ino] = entry
    return known


@dataclass(frozen=True)
class _Checkpoint:
    """A finished checkpoint, as its manifest says it is."""

    place: Path
    advice: str
    arrays: Mapping[str, tuple[Path, Entry]]
    attachments: Mapping[str, Mapping[str, Entry]]

    @classmethod
    def open(cls, folder: Path, round: int, advice: str | None = None) -> _Checkpoint:
        """Read the manifest, and check it against its own digest."""
        place, advice = _place(folder, round), advice or _advice(folder, round)
        try:
            if is_sealed(place) and not seal_fits(place):
                raise CheckpointError(
                    f"the checkpoint {place} is damaged: {MANIFEST} is not the one that {SEAL} was made of. {advice}"
                )
            manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] not in (FORMAT, _UNSEALED):
                raise CheckpointError(
                    f"the checkpoint {place} has format {manifest['format']}, and this fedtower reads {FORMAT}; "
                    f"use the fedtower that wrote it (environment.json in the run folder names it)"
                )
            if manifest["format"] != _UNSEALED and not is_sealed(place):
                raise CheckpointError(f"the checkpoint {place} is damaged: {SEAL} is missing. {advice}")
            return cls(place, advice, _arrays(place, manifest), _attachments(manifest))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint {place} has no readable {MANIFEST} ({type(error).__name__}: {error}). {advice}"
            ) from error

    def check(self, path: Path, entry: Entry, name: str) -> None:
        """Refuse a file of the part ``name`` that does not hold what the manifest says."""
        if not entry.fits(path):
            held = path.stat().st_size if path.is_file() else 0
            raise CheckpointError(
                f"the checkpoint {self.place} is damaged: {path.name} ({name}) should hold {entry.bytes} bytes with "
                f"SHA-256 {entry.sha256[:12]}..., and holds {held} that differ. {self.advice}"
            )


def _arrays(place: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[Path, Entry]]:
    return {name: (place / entry["file"], _entry(entry)) for name, entry in manifest["arrays"].items()}


def _attachments(manifest: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    attached = {} if manifest["format"] == _UNSEALED else manifest["attachments"]
    return {name: {file: _entry(entry) for file, entry in files.items()} for name, files in attached.items()}


def _entry(entry: Mapping[str, Any]) -> Entry:
    return Entry(int(entry["bytes"]), str(entry["sha256"]))


def _advice(folder: Path, round: int) -> str:
    older = [other for other in list_checkpoints(folder) if other < round]
    if older:
        return f"Continue from the one before it with --from {older[-1]}."
    return "There is no older one here: start the run again, or bring the folder back from a backup."


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
