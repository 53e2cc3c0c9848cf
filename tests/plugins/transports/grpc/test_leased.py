"""What was given out under a lease: kept in files, known without them while the window is open, and then let go of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtower.core.journal import Task
from fedtower.plugins.transports.grpc.leased import LeasedRows

FIRST: tuple[int, Task] = (1, "train")
SECOND: tuple[int, Task] = (2, "train")
LEASE, OTHER = bytes(16), bytes([1]) * 16


def noted(folder: Path) -> LeasedRows:
    leased = LeasedRows(folder)
    for window, lease in ((FIRST, LEASE), (SECOND, OTHER)):
        leased.note_examples(window, lease, 5)
        leased.note(window, lease, "item", np.array([7, 3]))
        leased.note(window, lease, "item", np.array([3, 9]))
    return leased


def test_what_is_known_is_what_the_files_say(tmp_path: Path) -> None:
    leased = noted(tmp_path)
    for given, examples in (
        leased.known(FIRST, LEASE),
        leased.of(FIRST, LEASE),
        LeasedRows(tmp_path).known(FIRST, LEASE),
    ):
        assert {name: ids.tolist() for name, ids in given.items()} == {"item": [3, 7, 9]}
        assert examples == 5


def test_nothing_of_a_window_that_has_ended_stays_in_memory(tmp_path: Path) -> None:
    leased = noted(tmp_path)
    leased.forget(FIRST)
    assert not list(leased._lately.of(FIRST, LEASE))
    assert len(list(leased._lately.of(SECOND, OTHER))) == 3
    leased.forget(SECOND)
    assert (leased._lately._count, len(leased._lately._held)) == (0, 0)
