"""A secret file is its owner's alone, from its first byte on."""

import os
import stat
from pathlib import Path

import pytest

from fedtower.core.errors import StorageError, TrustError
from fedtower.core.secret_files import read_secret, write_secret


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_whatever_the_umask_the_owner_alone_may_read_it(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_secret(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "key") == b"secret"


def test_it_is_not_overwritten(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"secret")
    with pytest.raises(StorageError, match="is there already"):
        write_secret(tmp_path / "key", b"other")
    assert read_secret(tmp_path / "key") == b"secret"


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o610, 0o777])
def test_one_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"secret")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(TrustError, match=f"has the mode {mode:o}"):
        read_secret(tmp_path / "key")


def test_one_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="there is no key"):
        read_secret(tmp_path / "key")
