"""Versions: what clients were sent who are still at work when the server has moved on.

In a simulation a client is trained when its update arrives, and by then parameters and rows are others. Those that it
was sent are kept as long as somebody works from them, in the state of the server: a checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import grouped
from fedtower.core.client import ClientSide
from fedtower.core.plan import Plan
from fedtower.core.rows import FloatArray, IntArray
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]

KEPT = "kept"


@dataclass(frozen=True)
class KeptRows:
    """Rows as they once were: ``held[source]`` are ids (n,), sorted, and rows (n, D)."""

    held: Mapping[str, tuple[IntArray, FloatArray]]

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``; of those only that somebody needed who was on the way."""
        known, rows = self.held[source]
        return rows[np.searchsorted(known, ids)]


@dataclass(frozen=True)
class Versions:
    """Visits from the newest version, whose plan this is, and from older ones, which ``flight`` has."""

    plan: Plan
    client: ClientSide
    flight: State

    def visit(self, version: int, clients: IntArray) -> Updates:
        """The updates of clients that were sent this version."""
        if version == self.plan.round:
            return self.client.visit(self.plan, clients)
        held = grouped(self.flight, f"{KEPT}/{version}")
        plan = replace(self.plan, round=version, parameters=grouped(held, "parameters"))
        rows = None if self.client.rows is None else _rows(held)
        return replace(self.client, rows=rows).visit(plan, clients)

    def left(self, flight: State, stalest: int) -> dict[str, NDArray[Any]]:
        """``flight`` as a version has left it, and what those in it were sent, as far as it counts in the next version,
        where updates may be ``stalest`` versions behind.
        """
        kept = dict(flight)
        if "clients" not in flight:
            return kept
        clients, versions = flight["clients"], flight["versions"]
        for version in np.unique(versions[versions > self.plan.round - stalest]).tolist():
            prefix = f"{KEPT}/{version}/"
            if version == self.plan.round:
                sent = self._sent(clients[versions == version])
                kept |= {prefix + name: value for name, value in sent.items()}
            else:
                kept |= {name: value for name, value in self.flight.items() if name.startswith(prefix)}
        return kept

    def _sent(self, clients: IntArray) -> dict[str, NDArray[Any]]:
        """The parameters of the newest version, and the rows that these clients need of it."""
        sent: dict[str, NDArray[Any]] = {f"parameters/{name}": v for name, v in self.plan.parameters.items()}
        if self.client.rows is None:
            return sent
        for source, needed in self.client.data.work(self.plan, np.sort(clients)).row_ids.items():
            ids = np.unique(needed.ids)
            sent |= {f"rows/{source}/ids": ids, f"rows/{source}/values": self.client.rows.fetch(source, ids)}
        return sent


def _rows(held: State) -> KeptRows:
    rows = grouped(held, "rows")
    sources = {name.rpartition("/")[0] for name in rows}
    return KeptRows({source: (rows[f"{source}/ids"], rows[f"{source}/values"]) for source in sources})
