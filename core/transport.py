"""Transport: the seam that reaches a cohort and yields its updates as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.core.plan import Plan
from fedtower.core.updates import Updates

Visit = Callable[[Plan, NDArray[np.int64]], Updates]


@runtime_checkable
class KeepsTime(Protocol):
    """A transport that says itself which updates came in time: what it has acknowledged counts, whenever it is read."""

    keeps_time: ClassVar[bool]


class Abandoned(FedtowerError):
    """A round came to its end without enough updates: none of them counts. The message says how it stood."""


class Transport(Protocol):
    """Exchanges a plan for updates. A client whose update never comes is simply missing from the blocks."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """Blocks of updates, lazily, as they come; ``visit`` is the client's half, for transports that run it here.

        ``deadline`` is how many seconds from now on updates are of use; who waits for a network stops waiting then.
        ``None`` sets no limit.

        Raises:
            Abandoned: too few came; the round changes nothing.
        """
        ...
