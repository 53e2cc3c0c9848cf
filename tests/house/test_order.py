"""The modules of tests that take long are there, and go first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import LONG, pytest_collection_modifyitems

TESTS = Path(__file__).resolve().parents[1]


def test_every_long_module_is_there() -> None:
    assert [name for name in LONG if not (TESTS / name).is_file()] == []


def test_long_modules_go_first_and_the_others_stay_as_they_were() -> None:
    names = ["a.py", LONG[2], "house/b.py", LONG[0], "a.py", LONG[2]]
    items: list[Any] = [SimpleNamespace(path=TESTS / name, place=place) for place, name in enumerate(names)]
    pytest_collection_modifyitems(items)
    assert [item.place for item in items] == [3, 1, 5, 0, 2, 4]
