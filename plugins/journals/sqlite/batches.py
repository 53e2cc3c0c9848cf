"""Batches: payloads to a segment, and then all that an intake was asked for in one transaction of the index."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedtower.core.intake import Answer, Batch, Grant, Renewal
from fedtower.core.journal import Clock, Instant, LeaseRecord, Outcome, Upload, WrongState
from fedtower.plugins.journals.sqlite.index import LEASE, Index, lease_record
from fedtower.plugins.journals.sqlite.segments import Place
from fedtower.plugins.journals.sqlite.windows import find_round

# SQLite takes 32,766 values in one statement; more than a few hundred make it no faster.
_VALUES = 500

_UNDER_WAY = (
    f"SELECT {', '.join(f'leases.{name}' for name in LEASE.split(', '))} FROM rounds JOIN leases USING (round, task) "
    "WHERE rounds.task = ? AND state = 'open' AND NOT replaced AND digest IS NULL"
)


@dataclass(frozen=True)
class Placed:
    """An upload whose payload is durable and counts for nothing yet."""

    lease: bytes
    digest: bytes
    place: Place


Order = Grant | Renewal | Upload
Prepared = Grant | Renewal | Placed | Outcome


def prepare(
    orders: Sequence[Order], index: Index, clock: Clock, append: Callable[[Sequence[Upload]], list[Place]]
) -> list[Prepared]:
    """Write the payloads that look acceptable, and answer the other uploads: none of these answers can change later."""
    uploads = [order for order in orders if isinstance(order, Upload)]
    with index.read() as connection:
        batch = read_batch(connection, uploads, clock())
    outcomes = [batch.judge(upload) for upload in uploads]
    fresh = [upload for upload, outcome in zip(uploads, outcomes, strict=True) if outcome is Outcome.ACCEPTED]
    places = iter(append(fresh) if fresh else ())
    judged = iter(outcomes)
    return [_placed(order, next(judged), places) if isinstance(order, Upload) else order for order in orders]


def commit(orders: Sequence[Prepared], index: Index, clock: Clock) -> list[Answer]:
    """The answers, all of them durable."""
    if all(isinstance(order, Outcome) for order in orders):
        return [order for order in orders if isinstance(order, Outcome)]
    with index.write() as connection:
        batch = read_batch(connection, orders, clock())
        answers = [_answer(batch, order) for order in orders]
        write_batch(connection, batch)
        _extend(connection, [order.place for order in orders if isinstance(order, Placed)])
    return answers


def read_batch(connection: sqlite3.Connection, orders: Sequence[Prepared | Upload], now: Instant) -> Batch[Placed]:
    """The windows and leases that the orders are about."""
    named = [order.lease for order in orders if isinstance(order, Renewal | Placed | Upload)]
    leases: list[LeaseRecord] = []
    for start in range(0, len(named), _VALUES):
        several = named[start : start + _VALUES]
        marks = ",".join("?" * len(several))
        leases += map(lease_record, connection.execute(f"SELECT {LEASE} FROM leases WHERE id IN ({marks})", several))
    grants = [order for order in orders if isinstance(order, Grant)]
    for order in grants:
        leases += map(
            lease_record,
            connection.execute(
                f"SELECT {LEASE} FROM leases WHERE round = ? AND task = ? AND client = ? AND NOT replaced",
                (order.round, order.task, order.client),
            ),
        )
    for task in sorted({order.task for order in grants if order.most is not None}):
        leases += map(lease_record, connection.execute(_UNDER_WAY, (task,)))
    windows = {(held.lease.round, held.lease.task) for held in leases} | {(each.round, each.task) for each in grants}
    found = {window: find_round(connection, *window) for window in windows}
    return Batch(now, {window: record for window, record in found.items() if record is not None}, leases)


def write_batch(connection: sqlite3.Connection, batch: Batch[Placed]) -> None:
    """What came of the orders."""
    write = connection.executemany
    write("UPDATE leases SET replaced = 1 WHERE id = ?", [(id,) for id in batch.replaced])
    write(
        f"INSERT INTO leases ({LEASE}) VALUES (?, ?, ?, ?, ?, ?, NULL, 0)",
        [
            (each.id, each.round, each.task, each.client, each.expires.boot, each.expires.seconds)
            for each in batch.granted
        ],
    )
    write("UPDATE leases SET expires = ? WHERE id = ?", [(each.expires.seconds, each.id) for each in batch.renewed])
    write("UPDATE leases SET digest = ? WHERE id = ?", [(sent.digest, lease.id) for lease, _, sent in batch.accepted])
    write(
        "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (lease.round, lease.task, position, lease.id, sent.place.segment, sent.place.offset, sent.place.length)
            for lease, position, sent in batch.accepted
        ],
    )
    counts = [(count, *window) for count, window in batch.counts]
    write("UPDATE rounds SET accepted = ? WHERE round = ? AND task = ?", counts)


def _extend(connection: sqlite3.Connection, places: Sequence[Place]) -> None:
    """Let the segments count as far as they were written."""
    ends = {
        place.segment: place.end for place in places
    }  # of each segment the last one, as they were appended in order
    for segment, end in ends.items():
        done = connection.execute("UPDATE segments SET extent = max(extent, ?) WHERE number = ?", (end, segment))
        if done.rowcount != 1:
            raise WrongState(f"the segment {segment} is not in the index any more; was the folder tidied by hand?")


def _placed(upload: Upload, outcome: Outcome, places: Iterator[Place]) -> Prepared:
    return Placed(upload.lease, upload.digest, next(places)) if outcome is Outcome.ACCEPTED else outcome


def _answer(batch: Batch[Placed], order: Prepared) -> Answer:
    if isinstance(order, Grant):
        return batch.grant(order)
    if isinstance(order, Renewal):
        return batch.renew(order)
    return batch.accept(order) if isinstance(order, Placed) else order
