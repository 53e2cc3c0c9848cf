"""Garbage is looked for as ever, but not while modules are imported; and a program of ours never looks through them."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib import import_module

import pytest

from fedtower.core.garbage import undisturbed

IMPORTS = """
import gc
from fedtower.core.garbage import begin_program, undisturbed
{begin}
with undisturbed():
    import json.tool
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


def imported(begin: str) -> str:
    """Whether garbage is looked for after an import in a new process, and whether modules are left out."""
    code = IMPORTS.format(begin=begin)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout


def test_a_program_of_ours_never_looks_through_its_modules() -> None:
    assert imported("begin_program()") == "True True\n"


def test_garbage_is_kept_by_no_import_that_brings_nothing() -> None:
    again = "begin_program(); import json.tool; gc.collect(); print(gc.get_freeze_count())"
    assert imported(again).split() == ["0", "True", "False"]


def test_in_a_process_of_somebody_else_everything_is_looked_through() -> None:
    assert imported("") == "True False\n"


def test_an_import_that_fails_leaves_it_as_it_was() -> None:
    with pytest.raises(ImportError), undisturbed():
        import_module("not_there_at_all")
    assert gc.isenabled()


def test_who_has_turned_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with undisturbed():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
