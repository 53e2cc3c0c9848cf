"""Batches: all that an intake was asked for in one transaction.

A transaction first locks the windows that it is about, in their order: so intakes take turns, position by position, and
cannot wait for each other in a circle. Payloads are sent last, and only those that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedtower.core.intake import Answer, Batch, Ending, Grant, Renewal, Window
from fedtower.core.journal import Instant, Lease, LeaseRecord, RoundRecord, Upload
from fedtower.plugins.journals.postgresql.database import Cursor

ROUND = "round, task, state, epoch, plan, reason, accepted, retired"
LEASE = "id, round, task, client, boot, expires, digest, replaced, given, ended, late"

Order = Grant | Renewal | Ending | Upload


def commit(orders: Sequence[Order], cursor: Cursor, now: Instant) -> list[Answer]:
    """The answers, as they will be when the transaction is over."""
    batch = read_batch(orders, cursor, now)
    answers = [_answer(batch, order) for order in orders]
    write_leases(batch, cursor)
    if batch.accepted:
        write_uploads(batch, cursor)
    return answers


def read_batch(orders: Sequence[Order], cursor: Cursor, now: Instant) -> Batch[Upload]:
    """The windows that the orders are about, locked, and their leases as they are from then on."""
    named = [order.lease for order in orders if not isinstance(order, Grant)]
    grants = [order for order in orders if isinstance(order, Grant)]
    windows: set[Any] = {(order.round, order.task) for order in grants}
    if named:
        windows |= set(cursor.execute("SELECT DISTINCT round, task FROM leases WHERE id = ANY(%s)", (named,)))
    under_way = sorted({order.task for order in grants if order.most is not None})
    if under_way:  # what is counted in them must stand still
        windows |= set(
            cursor.execute("SELECT round, task FROM rounds WHERE state = 'open' AND task = ANY(%s)", (under_way,))
        )
    rounds = _lock(windows, cursor)
    leases: list[LeaseRecord] = []
    if named:
        leases += find_leases(cursor, named)
    if grants:
        asked = [(order.round, order.task, order.client) for order in grants]
        found = cursor.execute(
            f"SELECT {LEASE} FROM leases WHERE NOT replaced AND (round, task, client) IN "
            "(SELECT * FROM unnest(%s::bigint[], %s::text[], %s::bigint[]))",
            [list(column) for column in zip(*asked, strict=True)],
        )
        leases += leases_of(found)
    if under_way:
        leases += leases_of(
            cursor.execute(
                f"SELECT {LEASE} FROM leases WHERE NOT replaced AND digest IS NULL AND (round, task) IN "
                "(SELECT round, task FROM rounds WHERE state = 'open' AND task = ANY(%s))",
                (under_way,),
            )
        )
    return Batch(now, rounds, leases)


def write_leases(batch: Batch[Upload], cursor: Cursor) -> None:
    """What has become of leases; replaced ones first, as a client has one that is not."""
    write = cursor.executemany
    if batch.replaced:
        cursor.execute("UPDATE leases SET replaced = true WHERE id = ANY(%s)", (batch.replaced,))
    if batch.granted:
        given = [(*_row(lease), batch.now.seconds) for lease in batch.granted]
        write(f"INSERT INTO leases ({LEASE}) VALUES (%s, %s, %s, %s, %s, %s, NULL, false, %s, NULL, false)", given)
    if batch.renewed:
        renewed = [(lease.expires.seconds, lease.id) for lease in batch.renewed]
        write("UPDATE leases SET expires = %s WHERE id = %s", renewed)
    if batch.ended:
        ended = [(batch.now.seconds, each.late, each.lease) for each in batch.ended]
        write("UPDATE leases SET ended = %s, late = %s WHERE id = %s AND digest IS NULL", ended)


def write_uploads(batch: Batch[Upload], cursor: Cursor) -> None:
    """What was accepted, and how many a window has by now."""
    digests = [[sent.lease for _, _, sent in batch.accepted], [sent.digest for _, _, sent in batch.accepted]]
    cursor.execute(
        "UPDATE leases SET digest = new.digest, ended = %s, late = false "
        "FROM unnest(%s::bytea[], %s::bytea[]) AS new (id, digest) WHERE leases.id = new.id",
        [batch.now.seconds, *digests],
    )
    for count, window in batch.counts:
        cursor.execute("UPDATE rounds SET accepted = %s WHERE round = %s AND task = %s", (count, *window))
    columns = "round, task, position, client, lease, digest, payload"
    with cursor.copy(f"COPY uploads ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int8", "text", "int8", "int8", "bytea", "bytea", "bytea"])
        for lease, position, sent in batch.accepted:
            payload = b"".join(sent.chunks)
            copy.write_row((lease.round, lease.task, position, lease.client, lease.id, sent.digest, payload))


def _lock(windows: set[Window], cursor: Cursor) -> dict[Window, RoundRecord]:
    if not windows:
        return {}
    found = cursor.execute(
        f"SELECT {ROUND} FROM rounds WHERE (round, task) IN (SELECT * FROM unnest(%s::bigint[], %s::text[])) "
        "ORDER BY round, task FOR UPDATE",
        [list(column) for column in zip(*windows, strict=True)],
    )
    records = [RoundRecord(*row) for row in found]
    return {(record.round, record.task): record for record in records}


def find_leases(cursor: Cursor, named: list[bytes]) -> list[LeaseRecord]:
    """The leases of these ids, as far as there are such."""
    return leases_of(cursor.execute(f"SELECT {LEASE} FROM leases WHERE id = ANY(%s)", (named,)))


def leases_of(rows: Iterable[tuple[Any, ...]]) -> list[LeaseRecord]:
    """The leases in rows, whose columns are as in :data:`LEASE`."""
    found = []
    for id, round, task, client, boot, expires, digest, replaced, given, ended, late in rows:
        since, end = (None if seconds is None else Instant(boot, seconds) for seconds in (given, ended))
        lease = Lease(id, round, task, client, Instant(boot, expires), since)
        found.append(LeaseRecord(lease, digest, replaced, end, late))
    return found


def _row(lease: Lease) -> tuple[Any, ...]:
    return lease.id, lease.round, lease.task, lease.client, lease.expires.boot, lease.expires.seconds


def _answer(batch: Batch[Upload], order: Order) -> Answer:
    if isinstance(order, Grant):
        return batch.grant(order)
    if isinstance(order, Ending):
        batch.end(order)
        return None
    return batch.renew(order) if isinstance(order, Renewal) else batch.accept(order)
