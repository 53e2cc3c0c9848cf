"""What tests of every room share: the public data sets, and a place for runs."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets that ``FEDTOWER_DATA`` names.

    Without it a test is skipped on a desk, and fails where ``CI`` is set: there nothing may go unseen.
    """
    named = os.environ.get("FEDTOWER_DATA", "")
    folder = Path(named) if named else None
    if folder is not None and folder.is_dir():
        return folder
    missing = f"FEDTOWER_DATA names {named!r}, which is not a folder" if named else "FEDTOWER_DATA is not set"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set: the tests on real data must run here")
    pytest.skip(f"{missing}: set it to a folder with ml-100k, ml-1m and ml-latest-small")


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one, so that `runs/` is made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
