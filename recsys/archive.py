"""Archive: a data set's file on its official site; fetched once its licence is accepted, checked, and unpacked.

A download that breaks off is kept and goes on where it stopped. What arrives is checked against the site's checksum
before it is unpacked, and appears in its place in one step, whole or not at all.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import ssl
import stat
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fedtower.core.errors import DataError

Progress = Callable[[int, int | None], None]
"""Told the bytes that are here, and the bytes in all if the site says so."""

_ATTEMPTS = 4  # without a byte of progress; each waits for the site up to the timeout
_TIMEOUT_SECONDS = 30.0
_PIECE = 1 << 18
# The largest, ml-25m, unpacks to 1.2 GB: more than this is not what was asked for.
_MOST_UNPACKED = 8 << 30


@dataclass(frozen=True)
class Archive:
    """A zip file that holds one folder. Without an ``md5``, as the site changes the file, the site's own counts."""

    file: str
    folder: str
    site: str
    licence: str
    licence_url: str
    md5: str | None = None


def fetch(archive: Archive, into: Path, progress: Progress, site: str | None = None) -> Path:
    """The archive's folder in ``into``, downloaded if it is not there; ``site`` is a mirror of the official one.

    Raises:
        DataError: the site cannot be reached, or what it sent is not what it should be.
    """
    target = into / archive.folder
    if target.is_dir():
        return target
    into.mkdir(parents=True, exist_ok=True)
    url, partial = f"{(site or archive.site).rstrip('/')}/{archive.file}", into / f"{archive.file}.part"
    download(url, partial, progress)
    _check(partial, archive.md5 or _published_md5(url), url)
    _unpack(partial, archive.folder, into)
    partial.unlink()
    return target


class Downloadable(Protocol):
    """A data set whose files can be fetched from their official site."""

    @property
    def archive(self) -> Archive:
        """Where they are, and under which licence."""
        ...


def cache_folder() -> Path:
    """The folder of this user for data sets: ``$XDG_CACHE_HOME/fedtower``, else ``~/.cache/fedtower``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedtower"


def download(url: str, path: Path, progress: Progress) -> None:
    """Bring ``url`` to ``path``; what is there already is taken as its beginning, and the rest asked for by HTTP Range.

    Raises:
        DataError: the site cannot be reached, says no, or stopped sending; what came is kept.
    """
    failures = 0
    while failures < _ATTEMPTS:
        before = path.stat().st_size if path.exists() else 0
        try:
            if _download_on(url, path, progress):
                return
            cause = "the site stopped sending"
        except HTTPError as error:
            raise DataError(f"{url} cannot be fetched: the site says {error.code} {error.reason}") from error
        except (URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            cause = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if path.exists() and path.stat().st_size > before else failures + 1
    kept = path.stat().st_size if path.exists() else 0
    raise DataError(
        f"{url} cannot be fetched: {cause}. {kept:,} bytes are kept in {path}: the same command goes on from there"
    )


def _download_on(url: str, path: Path, progress: Progress) -> bool:
    """One request for what is missing; whether all of it came."""
    have = path.stat().st_size if path.exists() else 0
    request = Request(url, headers={"User-Agent": "fedtower", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        response = urlopen(request, timeout=_TIMEOUT_SECONDS)
    except HTTPError as error:
        if error.code != 416:  # 416: nothing follows what we have; the checksum will say whether that is right
            raise
        error.close()
        return True
    with response:
        if have and response.status != 206:  # a site that does not resume sends everything again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with path.open("ab" if have else "wb") as file:
            progress(have, total)
            while piece := response.read(_PIECE):
                file.write(piece)
                have += len(piece)
                progress(have, total)
    return total is None or have >= total


def _check(path: Path, expected: str, url: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != expected:
        path.unlink()
        raise DataError(
            f"{url} has the md5 checksum {got}, but {expected} was expected: it was damaged on the way, or is another "
            "file; it was removed, so try again, and if that does not help, get it by hand from the official site"
        )


def _published_md5(url: str) -> str:
    """The checksum that the site publishes beside the file."""
    try:
        with urlopen(Request(f"{url}.md5", headers={"User-Agent": "fedtower"}), timeout=_TIMEOUT_SECONDS) as response:
            text = response.read(1_000).decode("ascii", "replace")
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(f"the checksum {url}.md5 cannot be fetched, so the file cannot be checked: {error}") from error
    found = re.search(r"\b[0-9a-f]{32}\b", text)
    if found is None:
        raise DataError(f"{url}.md5 does not hold a checksum, but {text[:60]!r}, so the file cannot be checked")
    return found.group()


def _unpack(path: Path, folder: str, into: Path) -> None:
    """Unpack into a new folder beside, and move that into place when it is whole."""
    beside = Path(tempfile.mkdtemp(prefix=f".{folder}-", dir=into))
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MOST_UNPACKED:
                raise DataError(
                    f"{path} unpacks to more than {_MOST_UNPACKED >> 30} GiB; it is not the expected archive"
                )
            for member in members:
                _check_member(member, folder, path)
                archive.extract(member, beside)
        if not (beside / folder).is_dir():
            raise DataError(f"{path} does not hold the folder {folder}/; it is not the expected archive")
        (beside / folder).replace(into / folder)
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is not a zip file, or a damaged one ({error}); remove it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_member(member: zipfile.ZipInfo, folder: str, path: Path) -> None:
    """Refuse whatever would be written outside of the folder, and links, which could point there."""
    parts = PurePosixPath(member.filename.replace("\\", "/")).parts
    if not parts or parts[0] != folder or ".." in parts or stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(
            f"{path} holds {member.filename!r}, which is not a plain file in {folder}/; nothing was unpacked"
        )
