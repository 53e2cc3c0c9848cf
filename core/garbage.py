"""Garbage: Python looks for it every now and then, and in vain while modules are imported: what they make stays.

Of importing the recommender, with its 2,400 modules, these looks were a third of the time, and as much again when the
process ended.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_is_ours = False


def begin_program() -> None:
    """Say that this process is a program of fedtower's own: whatever its modules have made is never looked through.

    In a process of somebody else's that would keep garbage of theirs for good.
    """
    global _is_ours
    _is_ours = True


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage is looked for meanwhile: for imports.

    >>> with undisturbed():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    if not gc.isenabled():
        yield
        return
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if _is_ours and len(sys.modules) > modules:  # else there is nothing new that stays
            gc.freeze()
        gc.enable()
