"""Accountant: the seam of the privacy ledger. What a round spends is recorded, and a run ends before it spends too
much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.transform import Transform

Ledger = Mapping[str, NDArray[Any]]
"""What has been recorded, as arrays: it is a part of the server's state, so that a resumed run goes on spending where
the other stopped. Empty before the first round.
"""


class Accountant(Protocol):
    """Says what a run has spent. It adds no noise: that is a transform's, and the accountant reads its settings."""

    def record(self, ledger: Ledger, cohort: Cohort, transforms: Sequence[Transform]) -> Ledger:
        """The ledger after one more round of these transforms. It is asked of every round, whoever answered: that
        nobody did is an outcome too. ``cohort`` holds the clients that counted.
        """
        ...

    def affords(self, ledger: Ledger, transforms: Sequence[Transform]) -> bool:
        """Whether one more round of these transforms stays within what may be spent."""
        ...

    def spent(self, ledger: Ledger) -> Mapping[str, float]:
        """What has been spent, by name, such as ``epsilon`` and ``delta``."""
        ...
