"""RemoteRows: the cloud's rows as a device sees them, fetched by id under its lease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtower.core.rows import FloatArray, IntArray
from fedtower.plugins.transports.grpc.caller import Caller
from fedtower.plugins.transports.grpc.plans import RowSource
from fedtower.plugins.transports.grpc.refusals import Reason, Refused


@dataclass(frozen=True)
class RemoteRows:
    """A :class:`~fedtower.core.rows.RowReader` over the wire; tables are stepped in the cloud.

    A row that was fetched under this lease is not fetched again.
    """

    caller: Caller
    lease: bytes
    sources: Mapping[str, RowSource]
    _held: dict[str, tuple[IntArray, FloatArray]] = field(default_factory=dict, repr=False)

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``, (n, W).

        Raises:
            Refused: a source or an id that the plan does not have, or rows that are not what was asked for.
        """
        if source not in self.sources:
            raise Refused(Reason.WRONG_NAMES, f"the plan has no rows of {source!r}; it has {sorted(self.sources)}")
        width = self.sources[source].width
        known, rows = self._held.get(source, (np.zeros(0, np.int64), np.zeros((0, width), np.float32)))
        missing = np.setdiff1d(ids, known)
        if len(missing):
            came = self.caller.rows(self.lease, source, missing)
            if came.shape != (len(missing), width) or not np.isfinite(came).all():
                raise Refused(
                    Reason.CORRUPT,
                    f"the server sent rows of {source!r} of shape {came.shape} for {len(missing)} ids, or with NaN; "
                    f"rows are {width} wide",
                )
            order = np.argsort(np.concatenate([known, missing]), kind="stable")
            known, rows = np.concatenate([known, missing])[order], np.concatenate([rows, came])[order]
            self._held[source] = (known, rows)
        return np.asarray(rows[np.searchsorted(known, ids)])
