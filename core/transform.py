"""Transform: a step on updates, on the client, when a block is decoded, and when the total is finished."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import Plan
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]


class Transform(Protocol):
    """Changes updates. Client sides run first to last; decoding and finishing run last to first."""

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what each client must keep for this transform between visits, zero at first; usually
        nothing.
        """
        ...

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        """The updates of C clients as they leave their devices, and what the devices keep, ``state[name]`` (C,
        *shape).
        """
        ...

    def decode(self, block: Updates) -> Updates:
        """A block as the aggregator is to see it."""
        ...

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        """The total of a cohort, corrected or protected."""
        ...


def on_client(
    transforms: Sequence[Transform], updates: Updates, states: Sequence[States], draws: Draws
) -> tuple[Updates, list[States]]:
    """The client sides of all transforms, first to last, each with a state of its own."""
    kept: list[States] = []
    for transform, state in zip(transforms, states, strict=True):
        updates, state = transform.on_client(updates, state, draws)
        kept.append(state)
    return updates, kept


def decode(transforms: Sequence[Transform], blocks: Iterable[Updates]) -> Iterator[Updates]:
    """Each block decoded, last transform first, as it comes."""
    for block in blocks:
        for transform in reversed(transforms):
            block = transform.decode(block)
        yield block


def finish(transforms: Sequence[Transform], total: Updates, cohort: Cohort) -> Updates:
    """The total finished, last transform first."""
    for transform in reversed(transforms):
        total = transform.finish(total, cohort)
    return total
