"""The modules of tests that go first are there."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import LONG


def test_every_long_module_is_there() -> None:
    here = Path(__file__).resolve().parents[1]
    assert [name for name in LONG if not (here / name).is_file()] == []
