"""What every attack promises."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Work
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, Untouched, assert_same_bits
from fedtower.recsys.attacks import Attack, Market
from fedtower.recsys.batches import SequenceData
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.population import Events
from fedtower.recsys.splits import make_split
from fedtower.recsys.vocabulary import Vocabulary

ITEMS, CLIENTS = 60, 9


class AttackPromises(Promises):
    """``make`` gives an attack; three of nine clients are attackers."""

    attackers: NDArray[np.bool_] = np.arange(CLIENTS) % 3 == 1

    @pytest.fixture
    def attack(self) -> Attack:
        """The attack."""
        made: Attack = self.made()
        return made

    def test_it_does_something(self, attack: Attack) -> None:
        events, work, updates = histories(), batches(), examples.updates(CLIENTS)
        bad = self.attackers
        assert (
            not np.array_equal(attack.forged(events, market()), events.items)
            or not _same(_content(attack.relabelled(work, bad)), _content(work))
            or not _same(attack.sent(updates, bad), updates)
        )

    def test_what_it_makes_up_are_as_many_items_of_the_catalogue(self, attack: Attack) -> None:
        events = histories()
        made = attack.forged(events, market())
        assert made.shape == events.items.shape
        assert made.dtype == np.int64
        assert np.all((made >= 0) & (made < ITEMS))

    def test_what_it_makes_up_does_not_depend_on_who_else_is_asked_for(self, attack: Attack) -> None:
        events, alone = histories(), histories(np.array([4]))
        made = attack.forged(events, market())
        assert_same_bits(attack.forged(alone, market()), made[events.offsets[4] : events.offsets[5]])

    def test_the_last_two_events_are_not_among_the_others(self, attack: Attack) -> None:
        events = histories()
        made = attack.forged(events, market())
        for start, stop in zip(events.offsets[:-1], events.offsets[1:], strict=True):
            assert not np.isin(made[stop - 2 : stop], made[start : stop - 2]).any()

    def test_it_labels_batches_of_the_same_form_and_rows_and_leaves_the_others_alone(self, attack: Attack) -> None:
        work = batches()
        after = attack.relabelled(work, self.attackers)
        assert_same_bits(dict(after.row_ids), dict(work.row_ids))
        for name in ("steps", "examples", "clients"):
            assert_same_bits(getattr(after, name), getattr(work, name))
        for name, slots in work.slots.items():
            assert after.slots[name].shape == slots.shape
            assert_same_bits(after.slots[name][~self.attackers], slots[~self.attackers])
            held = np.diff(work.row_ids["item"].offsets)[:, None, None]
            assert np.all((after.slots[name] >= 0) & (after.slots[name] < held))
        for name, values in work.inputs.items():
            assert_same_bits(np.asarray(after.inputs[name])[~self.attackers], np.asarray(values)[~self.attackers])

    def test_it_sends_updates_of_the_same_form_and_leaves_the_others_alone(self, attack: Attack) -> None:
        updates = examples.updates(CLIENTS)
        after = attack.sent(updates, self.attackers)
        honest = np.flatnonzero(~self.attackers)
        assert after.shapes == updates.shapes
        assert after.dense.keys() == updates.dense.keys()
        assert_same_bits(after.clients, updates.clients)
        assert all(delta.dtype == np.float32 and np.isfinite(delta).all() for delta in after.dense.values())
        for part, before in zip(after.rows.values(), updates.rows.values(), strict=True):
            assert_same_bits((part.row_ids, part.offsets), (before.row_ids, before.offsets))
            assert part.row_deltas.dtype == np.float32
            assert np.isfinite(part.row_deltas).all()
        assert_same_bits(after.pick(honest), updates.pick(honest))

    def test_nothing_is_written_into_what_it_is_given(self, attack: Attack) -> None:
        events, work, updates = histories(), batches(), examples.updates(CLIENTS)
        with Untouched(events.items, _content(work), updates):
            attack.forged(events, market())
            attack.relabelled(work, self.attackers)
            attack.sent(updates, self.attackers)

    def test_the_same_seed_gives_the_same_bits(self, attack: Attack) -> None:
        again: Attack = self.made()
        assert_same_bits(again.forged(histories(), market()), attack.forged(histories(), market()))
        one, other = (each.sent(examples.updates(CLIENTS), self.attackers) for each in (attack, again))
        assert_same_bits(one, other)


def histories(clients: NDArray[np.int64] | None = None) -> Events:
    """Nine clients with 8 to 40 events each, no item twice."""
    return population().events(np.arange(CLIENTS) if clients is None else clients)


def market() -> Market:
    """What there is to know: item i is the i-th most touched, and item 40 is promoted."""
    return Market(np.arange(ITEMS), 40, Draws(3))


def population() -> EventTable:
    """Whose histories they are."""
    draws = Draws(1)
    clients = np.arange(CLIENTS, dtype=np.int64)
    lengths = 8 + draws.integers(33, "length", clients)
    owners = np.repeat(clients, lengths)
    items = np.concatenate([draws.permutation(ITEMS, "items", int(c))[:n] for c, n in enumerate(lengths.tolist())])
    return EventTable.build(
        "nine clients",
        users=Vocabulary(clients, "user"),
        items=Vocabulary(np.arange(ITEMS), "item"),
        client_rows=owners,
        item_rows=items,
        times=np.arange(len(items), dtype=np.int64),
    )


def batches() -> Work:
    """A visit of each of them: one step of up to eight targets and twelve negatives."""
    table = population()
    split = make_split("leave_two_out", table, validation=True, draws=Draws(1))
    plan = Plan(1, {}, LocalSettings(steps=1, batch_size=8, negatives=12, history_length=16))
    return SequenceData(table, split, Draws(1)).work(plan, np.arange(CLIENTS, dtype=np.int64))


def _content(work: Work) -> dict[str, object]:
    return {**work.slots, **work.inputs}


def _same(one: object, other: object) -> bool:
    try:
        assert_same_bits(one, other)
    except AssertionError:
        return False
    return True
