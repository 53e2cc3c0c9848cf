"""A client's own model: what one more visit makes of the shared one for itself alone, or the copy that it keeps beside
it.

Devices judge and rank with theirs too, so everything here needs only numpy and a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.control import is_variate
from fedtower.core.plan import Plan
from fedtower.core.rows import RowReader

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
V = TypeVar("V")

PERSONAL = "personal."
"""Before the name of a shared parameter: the client's own copy of it (:mod:`fedtower.recsys.ditto`)."""


def is_own(name: str) -> bool:
    """Whether a parameter that lives on devices is a part of the one model there, and no copy or control variate.

    >>> [name for name in ("out.weight", "personal.out.weight", "own_control.out.weight") if is_own(name)]
    ['out.weight']
    """
    return not name.startswith(PERSONAL) and not is_variate(name)


def own_view(states: Mapping[str, V]) -> dict[str, V]:
    """What a client keeps as the parameters of its model: each copy under the name of what it is a copy of.

    >>> own_view({"personal.out.weight": 1})
    {'out.weight': 1}
    """
    return {name.removeprefix(PERSONAL): value for name, value in states.items() if name.startswith(PERSONAL)}


def judging(states: Mapping[str, V], *, personal: bool) -> dict[str, V]:
    """Of what a client keeps, the parameters with which it judges: those that nobody else has, and its copies in place
    of what was sent where the figures are of its ``personal`` model.

    >>> judging({"user": 1, "own_control.out": 2, "personal.out": 3}, personal=False)
    {'user': 1}
    >>> judging({"personal.out": 3}, personal=True)
    {'out': 3}
    """
    mine = {name: value for name, value in states.items() if is_own(name)}
    return {**mine, **(own_view(states) if personal else {})}


@dataclass(frozen=True)
class Personal:
    """The model of each of C clients: ``parameters[name]`` (C, *shape), and the rows that it has tuned, jagged:
    ``offsets`` (C+1,), ``ids`` and ``rows`` (R, W).
    """

    clients: IntArray
    parameters: Mapping[str, FloatArray]
    offsets: IntArray
    ids: IntArray
    rows: FloatArray

    def overlay(self, places: IntArray, items: IntArray, rows: FloatArray) -> FloatArray:
        """Of ``items`` (M, n) the ``rows`` (M, n, W), or those that the clients at ``places`` (M,) have tuned."""
        if not len(self.ids):
            return rows
        width = int(max(items.max(initial=0), self.ids.max())) + 1
        owners = np.repeat(np.arange(len(self.clients), dtype=np.int64), np.diff(self.offsets))
        held, wanted = owners * width + self.ids, places[:, None] * width + items
        at = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
        return np.where((held[at] == wanted)[..., None], self.rows[at], rows)


def tune(plan: Plan, client: ClientSide, clients: IntArray) -> Personal:
    """What one visit by ``plan`` makes of the model for each of ``clients``; nothing is sent, and nothing is kept."""
    work = client.given(plan, clients)
    updates, after = client.runtime.train(replace(plan, train_rows=True), work)
    shared = {name: value[None] + updates.dense[name] for name, value in plan.parameters.items()}
    (source, needed), *_ = work.row_ids.items()
    rows = work.rows[source] + updates.rows[source].row_deltas
    return Personal(clients, {**shared, **after}, needed.offsets, needed.ids, rows)


def tuned(plan: Plan, client: ClientSide, one: IntArray) -> tuple[dict[str, FloatArray], RowReader]:
    """What :func:`tune` makes of the model for ``one`` client (1,), as that client's device judges with it: its
    parameters, and its rows.
    """
    assert client.rows is not None  # a model that is tuned ranks items
    personal = tune(plan, client, one)
    own = {name: value[0] for name, value in personal.parameters.items()}
    return own, TunedRows(client.rows, personal)


@dataclass(frozen=True)
class TunedRows:
    """A :class:`~fedtower.core.rows.RowReader` of one client: rows that it has tuned, and the others as they are."""

    rows: RowReader
    personal: Personal

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``, (n, W)."""
        fetched = self.rows.fetch(source, ids)
        (own,) = self.personal.overlay(np.zeros(1, dtype=np.int64), ids[None], fetched[None])
        return np.asarray(own)
