"""Rows over a socket: the table process gives rows by id to the intakes beside it, which pass them on unread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import FedtowerError
from fedtower.core.rows import FloatArray, IntArray, RowStore
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tensors import to_array, to_tensor
from fedtower.protos.v1 import federation_pb2 as pb

METHOD = "/fedtower.v1.Rows/Fetch"
"""A FetchRowsRequest, and RowsChunks; no device can call it."""

_PART_BYTES = 240 << 10
_COME_BACK_SECONDS = 2.0


@dataclass(frozen=True)
class LockedRows:
    """A RowStore that fetches and steps in turns: a row is never read while it is written."""

    rows: RowStore
    lock: Any

    @classmethod
    def of(cls, rows: RowStore) -> LockedRows:
        """The same store, behind a lock."""
        return cls(rows, Lock())

    @property
    def generation(self) -> int:
        """How many times the store has been stepped."""
        return self.rows.generation

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``."""
        with self.lock:
            return self.rows.fetch(source, ids)

    def apply(self, deltas: Any, lr_scale: float) -> None:
        """Step the tables."""
        with self.lock:
            self.rows.apply(deltas, lr_scale)

    def snapshot(self) -> Any:
        """The store's snapshot."""
        with self.lock:
            return self.rows.snapshot()

    def restore(self, arrays: Any) -> None:
        """Continue from a snapshot."""
        with self.lock:
            self.rows.restore(arrays)


def serve_rows(rows: RowStore, address: str, current: Event, threads: int = 4) -> grpc.Server:
    """A server of rows at ``unix:PATH``, started; stop it with ``.stop(None)``.

    Until ``current`` is set, the rows are not those of the window that is open, and who asks is told to come back.
    """

    def fetch(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if not current.is_set():
            pause = pb.ComeBack(seconds=_COME_BACK_SECONDS, reason="rows are coming back")
            yield pb.RowsChunk(come_back=pause).SerializeToString()
            return
        try:
            yield from _chunks(rows, data)
        except Refused as refused:
            yield pb.RowsChunk(refusal=refused.to_message()).SerializeToString()

    server = grpc.server(ThreadPoolExecutor(threads))
    handler: Any = grpc.unary_stream_rpc_method_handler(fetch)  # bytes in, bytes out
    service, _, method = METHOD.removeprefix("/").partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(address)
    server.start()
    return server


def ids_of(request: pb.FetchRowsRequest, whose: str) -> IntArray:
    """The ids that are asked for, (n,). Raises Refused for what are none."""
    ids = to_array(request.ids, whose)
    if ids.dtype not in (np.uint32, np.int64) or ids.ndim != 1:
        raise Refused(Reason.WRONG_SHAPE, f"{whose} asked for rows by {ids.dtype} of shape {ids.shape}; ids are (n,)")
    return ids.astype(np.int64)


def _chunks(rows: RowStore, data: bytes) -> Iterator[bytes]:
    request = parse(pb.FetchRowsRequest, data)
    try:
        held: NDArray[np.float32] = rows.fetch(request.source, ids_of(request, "a device"))
    except Refused:
        raise
    except FedtowerError as error:
        raise Refused(Reason.ROW_NOT_LEASED, str(error)) from error
    step = max(_PART_BYTES // max(4 * held.shape[1], 1), 1)
    for first in range(0, max(len(held), 1), step):
        part = pb.RowsPart(first=first, rows=to_tensor(held[first : first + step]))
        yield pb.RowsChunk(part=part).SerializeToString()
