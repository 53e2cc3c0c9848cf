"""A client's data as fixed-shape batches: stretches of its history, targets in them, and negatives beside them.

A *stretch* is ``span`` consecutive targets and the ``history_length`` events before them, so the rows of one step are
one slot an event, shared by all its targets; each target then looks back ``history_length`` events from where it
stands. A step's targets are drawn from one stretch, and an epoch takes every target once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import LeakError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds, localise
from fedtower.core.runtime import Work
from fedtower.recsys.history import TRAIN, Events, Population, Split
from fedtower.recsys.negatives import uniform_negatives
from fedtower.recsys.phases import phased

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def span_of(local: LocalSettings) -> int:
    """Targets of one stretch: as many as it looks back, and at least a batch."""
    return max(local.batch_size, local.history_length)


@dataclass(frozen=True)
class SequenceData:
    """The clients of a population as next-item batches: what a sequence model trains on.

    ``work()`` gives the inputs ``target`` (C, S, B), the slot at which a target stands, ``weight`` (C, S, B), 0 for
    padding, and ``user`` (C, S, F), and what :func:`~fedtower.recsys.phases.phased` adds; the slots ``history`` (C, S,
    T), oldest first, and ``negatives`` (C, S, N), both of rows of ``item``.
    """

    population: Population
    split: Split
    draws: Draws

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """One visit of each client.

        Raises:
            LeakError: a held-out item is in a history that it would train on, or is a target, or is a negative where
                ``local.negatives_from`` spares held-out items.
        """
        local = plan.local
        events = self.population.events(clients)
        role = self.split.parts(events).role
        seen = training_events(events, role)
        target, start = self._targets(seen, plan)
        history = _stretches(seen, start, span_of(local) + local.history_length)
        spared = local.negatives_from == "untouched"
        negatives = uniform_negatives(
            events if spared else seen,
            *(self.population.num_items, target.shape[1], local.negatives, self.draws, plan.round),
        )
        _ask_for_nothing_more(history, negatives, target, empty=seen.lengths == 0)
        needed, where = localise(np.concatenate([history, negatives], axis=2).reshape(len(clients), -1))
        refuse_held_out(events, role, needed if spared else _in_histories(history, empty=seen.lengths == 0))

        where = where.reshape(*history.shape[:2], -1)
        weight = (target >= 0).astype(np.float32)
        user = self.population.user_features(clients)
        work = Work(
            clients=clients,
            steps=np.asarray((weight.sum(axis=2) > 0).sum(axis=1)),
            examples=weight.sum(axis=(1, 2)).astype(np.int64),
            inputs={
                "target": np.where(target >= 0, target - start[..., None], 0),
                "weight": weight,
                "user": np.broadcast_to(user[:, None, :], (*target.shape[:2], user.shape[1])),
            },
            slots={"history": where[..., : history.shape[2]], "negatives": where[..., history.shape[2] :]},
            row_ids={"item": needed},
        )
        return phased(work, local)

    def _targets(self, seen: Events, plan: Plan) -> tuple[IntArray, IntArray]:
        """Which events are the targets of each step, (C, S, B), -1 for padding, and where its stretch starts, (C,
        S).
        """
        local = plan.local
        lots = [self._epoch(seen, plan, epoch) for epoch in range(local.epochs or 1)]
        turns = sum(lot.num_batches for lot in lots)
        width = max(min(int(np.max(turns, initial=0)), local.steps or np.iinfo(np.int64).max), 1)
        target = np.full((len(seen), width, local.batch_size), -1, dtype=np.int64)
        start = np.zeros((len(seen), width), dtype=np.int64)
        before = np.zeros(len(seen), dtype=np.int64)
        for lot in lots:
            step = lot.turn + before[lot.owner]
            kept = step < width
            target[lot.owner[kept], step[kept], lot.place[kept]] = lot.position[kept]
            start[lot.owner[kept], step[kept]] = np.maximum(lot.first[kept] - local.history_length, 0)
            before = before + lot.num_batches
        return target, start

    def _epoch(self, seen: Events, plan: Plan, epoch: int) -> _Lot:
        """Every target once, in batches: stretches of equal length, shuffled within, cut into batches, in random turn.
        Batches whose turn never comes, because a visit has fewer steps, are left out.
        """
        size, limit = plan.local.batch_size, plan.local.steps or np.iinfo(np.int64).max
        owner, stretch, first, length = _stretches_of(seen, span_of(plan.local))
        # Which batches there are follows from lengths alone: only targets whose turn comes are drawn and sorted.
        batches = -(-length // size)
        of = np.repeat(np.arange(len(owner)), batches)
        batch = _rank_in_runs(of)
        lot = self.draws.bits("batches", plan.round, seen.clients[owner[of]], epoch, stretch[of], batch)
        # What is left over of a stretch comes last, so that a visit of one step has as many targets as its stretch may
        # give. A stretch that is shorter than a batch waits no longer than others, or nobody would ever train on it.
        left_over = (length[of] - batch * size < size) & (batch > 0)
        by_lot = np.lexsort((lot, left_over, owner[of]))
        turn = np.empty(len(of), dtype=np.int64)
        turn[by_lot] = _rank_in_runs(owner[of][by_lot])
        num_batches = np.bincount(owner, weights=batches, minlength=len(seen)).astype(np.int64)

        taken = np.flatnonzero(np.bincount(of, weights=turn < limit, minlength=len(owner)))
        each = np.repeat(taken, length[taken])
        position = first[each] + _rank_in_runs(each)
        key = self.draws.bits("targets", plan.round, seen.clients[owner[each]], epoch, position)
        order = _by_key_in_runs(key, each)
        each, position = each[order], position[order]
        rank = _rank_in_runs(each)
        when = turn[(np.cumsum(batches) - batches)[each] + rank // size]
        kept = when < limit
        each, position, rank, when = each[kept], position[kept], rank[kept], when[kept]
        return _Lot(owner[each], position, first[each], when, rank % size, num_batches)


@dataclass(frozen=True)
class _Lot:
    """An epoch's targets: owner, event position, first target of the stretch, turn of the batch, place in it, all
    (E,).
    """

    owner: IntArray
    position: IntArray
    first: IntArray
    turn: IntArray
    place: IntArray
    num_batches: IntArray  # (C,)


def training_events(events: Events, role: NDArray[np.int8]) -> Events:
    """The events without the held-out ones."""
    kept = role == TRAIN
    counts = np.bincount(events.owners[kept], minlength=len(events))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Events(events.clients, offsets, events.items[kept], events.times[kept], events.ratings[kept])


def refuse_held_out(events: Events, role: NDArray[np.int8], needed: RowIds) -> None:
    """Raise LeakError if a client would fetch the row of an item that is held out for it."""
    width = int(max(events.items.max(initial=0), needed.ids.max(initial=0))) + 1
    held = np.sort((events.owners * width + events.items)[role != TRAIN])
    if not len(held):
        return
    owners = np.repeat(np.arange(len(events), dtype=np.int64), np.diff(needed.offsets))
    keys = owners * width + needed.ids
    leaked = keys[held[np.minimum(np.searchsorted(held, keys), len(held) - 1)] == keys]
    if len(leaked):
        owner, item = divmod(int(leaked[0]), width)
        raise LeakError(
            f"item row {item} is held out for client {events.clients[owner]}, and yet its training batch holds it, as "
            f"a history item, a "
            f"target or a negative; every figure of this run would be worthless, so it stops here"
        )


def _in_histories(history: IntArray, empty: NDArray[np.bool_]) -> RowIds:
    """The rows of each client's histories and targets; of a history without events, whose slots are filled with
    negatives, none.
    """
    rows, _ = localise(history.reshape(len(history), -1)[~empty])
    counts = np.zeros(len(history), dtype=np.int64)
    counts[~empty] = np.diff(rows.offsets)
    return RowIds(np.concatenate([[0], np.cumsum(counts)]), rows.ids)


def _stretches(seen: Events, start: IntArray, window: int) -> IntArray:
    """The items of ``window`` events from ``start`` (C, S) on, (C, S, window).

    A slot beyond the last event repeats the last one: no target stands after it, so nothing looks at it, and it is
    fetched anyway. What stands there for a client without events has no meaning.
    """
    if not len(seen.items):
        return np.zeros((*start.shape, window), dtype=np.int64)
    last = np.maximum(seen.lengths - 1, 0)[:, None, None]
    at = np.minimum(start[..., None] + np.arange(window), last) + seen.offsets[:-1, None, None]
    return np.asarray(seen.items[np.minimum(at, len(seen.items) - 1)])


def _stretches_of(seen: Events, span: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The stretches of each client: whose, the how manieth, its first target, and how many targets, all (n,).

    A client's first event is nobody's target; the others are cut into stretches of equal length, ``span`` at most.
    """
    count = np.maximum(seen.lengths - 1, 0)
    num = -(-count // span)
    owner = np.repeat(np.arange(len(seen), dtype=np.int64), num)
    stretch = _rank_in_runs(owner)
    first, after = (-(-(stretch + one) * count[owner] // num[owner]) for one in (0, 1))
    return owner, stretch, first + 1, after - first


def _ask_for_nothing_more(history: IntArray, negatives: IntArray, target: IntArray, empty: NDArray[np.bool_]) -> None:
    """Let the slots that nothing looks at repeat rows that the client fetches anyway.

    A step of padding repeats the client's first step, and a history without events a negative. So the rows that a
    client asks for do not depend on who else is in its block, and none of them is somebody else's.
    """
    history[empty] = negatives[empty, :, :1]
    client, step = np.nonzero((target < 0).all(axis=2))
    history[client, step], negatives[client, step] = history[client, 0], negatives[client, 0]


def _by_key_in_runs(key: IntArray, *runs: IntArray) -> IntArray:
    """The order in which each run of equal entries, which stand together, is sorted by ``key``: what ``lexsort`` gives.

    The run and the leading bits of the key make one word, and one sort of words takes a fifth of the sort by several
    arrays. Where those bits are the same for two entries of a run, which happens once in 2**40 runs, that sort decides.
    """
    run = np.zeros(len(key), dtype=np.int64)
    run[_heads(*runs)] = 1
    run = np.cumsum(run)
    bits = int(run[-1]).bit_length() if len(run) else 0
    unsigned = np.asarray(key, dtype=np.int64).view(np.uint64) ^ np.uint64(1 << 63)
    word = (run << (63 - bits)) | (unsigned >> np.uint64(bits + 1)).astype(np.int64)
    order = np.argsort(word)
    ordered = word[order]
    if bool((ordered[1:] == ordered[:-1]).any()):
        return np.lexsort((key, *reversed(runs)))
    return order


def _rank_in_runs(*keys: IntArray) -> IntArray:
    """The place of each entry within its run of equal keys, which stand together."""
    head = _heads(*keys)
    return np.asarray(np.arange(len(keys[0])) - np.repeat(head, np.diff(np.append(head, len(keys[0])))))


def _heads(*keys: IntArray) -> IntArray:
    new = np.ones(len(keys[0]), dtype=bool)
    if len(new):
        new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.flatnonzero(new)
