"""Transform: a step on updates, on the client, when a block is decoded, and when the total is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.plan import Plan
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]
IntArray = NDArray[np.int64]

ROWS = "rows of "
"""Encoded rows of a table ``item`` are called ``rows of item``; their shape is that of one row."""


class Transform(Protocol):
    """Changes updates. Client sides run first to last; decoding and finishing run last to first.

    A client side may replace a dense delta, or the rows of a table, by bytes (``Updates.encoded``), which its decoding
    gives back; under the names and with the shapes that they had, and rows as :data:`ROWS` says. A transform says what
    it does with updates in the capabilities of its offer (:mod:`fedtower.core.chains`).
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


def decode(transforms: Sequence[Transform], block: Updates, plan: Plan | None = None) -> Updates:
    """A block decoded, last transform first.

    Raises:
        UpdateError: bytes that cannot be decoded, or that say they are of another shape than the ``plan``'s: a few of
            them could ask for any amount of memory.
    """
    for name, part in block.encoded.items():
        table = name.startswith(ROWS)
        if (
            plan is not None
            and not table
            and (name not in plan.parameters or part.shape != plan.parameters[name].shape)
        ):
            raise UpdateError(
                f"{block.who()} sent {name!r} encoded, of shape {part.shape}, which the plan of round {plan.round} "
                f"does not have; are they on an older plan?"
            )
    for transform in reversed(transforms):
        block = transform.decode(block)
    return block


def visit_keys(updates: Updates) -> tuple[IntArray, IntArray]:
    """The round and the client of each visit, (C, 1) both: what a transform's draws are keyed by, before a position."""
    if updates.rounds is None or updates.clients is None:
        raise ValueError(
            "these updates do not say of which rounds and clients they are, so nothing can be drawn for them"
        )
    return updates.rounds[:, None], updates.clients[:, None]


def finish(transforms: Sequence[Transform], total: Updates, cohort: Cohort) -> Updates:
    """The total finished, last transform first."""
    for transform in reversed(transforms):
        total = transform.finish(total, cohort)
    return total
