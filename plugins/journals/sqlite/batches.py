"""Batches: payloads to a segment, and then all that an intake was asked for in one transaction of the index.

A statement is about the whole batch and ends in one step. Python lets go of the interpreter for every step of SQLite,
which is for every row that is read or written, and then waits until a busy event loop gives it back.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedtower.core.intake import Answer, Batch, Ending, Grant, Renewal
from fedtower.core.journal import Clock, Instant, Lease, LeaseRecord, Outcome, Upload, WrongState
from fedtower.plugins.journals.sqlite.index import LEASE, Index, lease_record
from fedtower.plugins.journals.sqlite.segments import Place
from fedtower.plugins.journals.sqlite.windows import find_round

# SQLite takes 32,766 values in one statement; more than a few hundred make it no faster.
_VALUES = 500

_LEASES = (
    "SELECT json_group_array(json_array(hex(leases.id), leases.round, leases.task, leases.client, leases.boot, "
    "printf('%!.17g', leases.expires), hex(leases.digest), leases.replaced, "
    "iif(leases.given IS NULL, NULL, printf('%!.17g', leases.given)), "
    "iif(leases.ended IS NULL, NULL, printf('%!.17g', leases.ended)), leases.late)) FROM "
)
_CURRENT = (
    "(VALUES {}) AS asked CROSS JOIN leases "  # as they stand: SQLite does not change the order of a CROSS JOIN
    "ON round = asked.column1 AND task = asked.column2 AND client = asked.column3 AND NOT replaced"
)
_UNDER_WAY = (
    "rounds JOIN leases USING (round, task) "
    "WHERE rounds.task = ? AND state = 'open' AND NOT replaced AND digest IS NULL"
)


@dataclass(frozen=True)
class Placed:
    """An upload whose payload is durable and counts for nothing yet."""

    lease: bytes
    digest: bytes
    place: Place


Order = Grant | Renewal | Ending | Upload
Prepared = Grant | Renewal | Ending | Placed | Outcome


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
    named = [order.lease for order in orders if isinstance(order, Renewal | Ending | Placed | Upload)]
    leases: list[LeaseRecord] = []
    for several in _by(_VALUES, named):
        leases += _leases(connection, f"leases WHERE id IN ({_marks(len(several))})", several)
    grants = [order for order in orders if isinstance(order, Grant)]
    asking = [(order.round, order.task, order.client) for order in grants]
    for several in _by(_VALUES, asking):
        asked = ",".join([f"({_marks(3)})"] * len(several))
        leases += _leases(connection, _CURRENT.format(asked), [value for each in several for value in each])
    for task in sorted({order.task for order in grants if order.most is not None}):
        leases += _leases(connection, _UNDER_WAY, (task,))
    windows = {(held.lease.round, held.lease.task) for held in leases} | {(each.round, each.task) for each in grants}
    found = {window: find_round(connection, *window) for window in windows}
    return Batch(now, {window: record for window, record in found.items() if record is not None}, leases)


def write_batch(connection: sqlite3.Connection, batch: Batch[Placed]) -> None:
    """What came of the orders."""
    connection.executemany("UPDATE leases SET replaced = 1 WHERE id = ?", [(id,) for id in batch.replaced])
    _write(
        connection,
        f"INSERT INTO leases ({LEASE}) {{}}",
        [(*_row(each), None, 0, batch.now.seconds, None, 0) for each in batch.granted],
    )
    _write(
        connection,
        "WITH later (id, moment) AS ({}) UPDATE leases SET expires = moment FROM later WHERE leases.id = later.id",
        list({each.id: each.expires.seconds for each in batch.renewed}.items()),  # of one asked twice the later
    )
    _write(
        connection,
        "WITH sent (id, digest, moment) AS ({}) "
        "UPDATE leases SET digest = sent.digest, ended = moment, late = 0 FROM sent WHERE leases.id = sent.id",
        [(lease.id, sent.digest, batch.now.seconds) for lease, _, sent in batch.accepted],
    )
    _write(
        connection,
        "WITH told (id, moment, was_late) AS ({}) UPDATE leases SET ended = moment, late = was_late FROM told "
        "WHERE leases.id = told.id AND digest IS NULL",
        list({each.lease: (each.lease, batch.now.seconds, int(each.late)) for each in batch.ended}.values()),
    )
    _write(
        connection,
        "INSERT INTO uploads {}",
        [
            (lease.round, lease.task, position, lease.id, sent.place.segment, sent.place.offset, sent.place.length)
            for lease, position, sent in batch.accepted
        ],
    )
    counts = [(count, *window) for count, window in batch.counts]
    connection.executemany("UPDATE rounds SET accepted = ? WHERE round = ? AND task = ?", counts)


def _leases(connection: sqlite3.Connection, which: str, values: Sequence[Any]) -> Iterator[LeaseRecord]:
    """The leases that ``which`` (a part of FROM on) names, read in one step."""
    (found,) = connection.execute(_LEASES + which, values).fetchone()
    for id, round, task, client, boot, expires, digest, replaced, given, ended, late in json.loads(found):
        since, end = (None if seconds is None else float(seconds) for seconds in (given, ended))
        record = (bytes.fromhex(id), round, task, client, boot, float(expires), bytes.fromhex(digest) or None, replaced)
        yield lease_record((*record, since, end, late))


def _write(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """A statement with the rows as VALUES in the place of its ``{}``."""
    for several in _by(_VALUES, rows):
        values = f"VALUES {','.join([f'({_marks(len(several[0]))})'] * len(several))}"
        connection.execute(statement.format(values), [value for row in several for value in row])


def _row(lease: Lease) -> tuple[Any, ...]:
    return lease.id, lease.round, lease.task, lease.client, lease.expires.boot, lease.expires.seconds


def _by(many: int, rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (rows[start : start + many] for start in range(0, len(rows), many))


def _marks(count: int) -> str:
    return ",".join("?" * count)


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
    if isinstance(order, Ending):
        batch.end(order)
        return None
    return batch.accept(order) if isinstance(order, Placed) else order
