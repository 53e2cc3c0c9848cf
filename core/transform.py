"""Transform: a step on updates, on the client, when a block is decoded, and when the total is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import Plan
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]


class Transform(Protocol):
    """Changes updates. Client sides run first to last; decoding and finishing run last to first.

    A client side may replace a dense delta by bytes (``Updates.encoded``), which its decoding gives back.
    """

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what each client must keep for this transform between visits, zero at first; usually
        nothing.
        """
        ...

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        """The updates of C clients as they leave their devices, and what the devices keep, ``state[name]`` (C,
        *shape). ``draws`` are those of this transform's position in the chain alone. What the devices keep is lost
        when the server does not count their update.
        """
        ...

    def decode(self, block: Updates) -> Updates:
        """A block as the aggregator is to see it; nothing in it has been checked.

        Raises:
            UpdateError: it is not what a client side sends; the round goes on without the clients that sent it.
        """
        ...

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        """The total of the clients of ``cohort``, corrected or protected; only those whose update counted are in it."""
        ...


def on_client(
    transforms: Sequence[Transform], updates: Updates, states: Sequence[States], draws: Draws
) -> tuple[Updates, list[States]]:
    """The client sides of all transforms, first to last, each with a state and draws of its own."""
    kept: list[States] = []
    for position, (transform, state) in enumerate(zip(transforms, states, strict=True)):
        updates, state = transform.on_client(updates, state, draws.under(f"transforms.{position}"))
        kept.append(state)
    return updates, kept


def decode(transforms: Sequence[Transform], block: Updates) -> Updates:
    """A block decoded, last transform first."""
    for transform in reversed(transforms):
        block = transform.decode(block)
    return block


def finish(transforms: Sequence[Transform], total: Updates, cohort: Cohort) -> Updates:
    """The total finished, last transform first."""
    for transform in reversed(transforms):
        total = transform.finish(total, cohort)
    return total
