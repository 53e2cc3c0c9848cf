"""Transforms in a round: what clients keep, what is sent, and what is folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.jagged import Encoded
from fedtower.core.plan import Plan, RowSettings
from fedtower.core.round import Parts, run_rounds
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transform import States
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from fedtower.plugins.transports.in_process import InProcess
from tests.core.small_round import W_1, Choosy, Clock, Deadline, HalfNow, IntArray, Notes, outcome, parts, start, w_of


def test_a_transform_keeps_its_state_for_each_client_between_rounds() -> None:
    class Alternating:
        @hookimpl
        def select_clients(self, round: int) -> IntArray:
            return np.array([[1], [0], [1]][round - 1])

    made = parts(plugin=Alternating(), transforms=[HalfNow()], rows=RowSettings(train="frozen"))
    states = [state for state, _ in run_rounds(start(made), made)]
    # Client 1 wants w to be 2, and goes 1/2 * 2 * (4 - 2 w) towards it: 4 from 0. Client 0 wants w = 1, and goes
    # 1/2 * 5/2 (1 - w).
    first = 4 / 2
    second = first + 1.25 * (1 - first) / 2
    third = second + (4 - 2 * second) / 2 + 4 / 2
    assert [w_of(state) for state in states] == pytest.approx([first, second, third], rel=1e-6)
    kept = made.client.store.read("transforms.0.kept", np.arange(8)).tolist()
    assert kept == pytest.approx([1.25 * (1 - first) / 2, (4 - 2 * second) / 2, 0, 0, 0, 0, 0, 0], rel=1e-6)


def test_a_total_is_finished_before_the_server_steps() -> None:
    state, _, _ = outcome(parts(1, transforms=[HalfNow(after=10)]))
    assert w_of(state) == 4 / 2 + 10


@dataclass(frozen=True)
class Coded:
    """On the wire, w is negated and rows are not sent at all."""

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        return replace(updates, dense={"w": -updates.dense["w"]}, rows={}), state

    def decode(self, block: Updates) -> Updates:
        return replace(block, dense={"w": -block.dense["w"]})

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total


def test_what_is_counted_is_what_was_sent_and_what_is_folded_is_decoded() -> None:
    state, rows, report = outcome(parts(0, 1, transforms=[Coded()]))
    assert w_of(state) == pytest.approx(W_1, rel=1e-6)
    assert rows == [0, 0, 0, 0]
    assert report.bytes_up == 2 * (4 + 8)


def test_a_plugin_judges_what_is_folded_and_not_what_was_sent() -> None:
    seen: list[float] = []

    class Looking:
        @hookimpl
        def accept_update(self, update: Updates) -> None:
            seen.append(float(update.dense["w"][0]))
            assert update.metrics["bytes_up"].tolist() == [4 + 8]

    outcome(parts(0, 1, transforms=[Coded()], plugin=Looking()))
    assert seen == [1.25, 4]


@dataclass(frozen=True)
class Packed(Coded):
    """On the wire, w is four bytes of a codec, and those of client 1 are cut."""

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        assert updates.clients is not None
        parts = [w.tobytes()[: 3 if c == 1 else 4] for w, c in zip(updates.dense["w"], updates.clients, strict=True)]
        return replace(updates, dense={}, encoded={"w": Encoded.of("packed", (), parts)}), state

    def decode(self, block: Updates) -> Updates:
        packed = block.encoded["w"]
        if np.any(np.diff(packed.offsets) != 4):
            raise UpdateError("w has four bytes")
        return replace(block, dense={"w": packed.payload.view(np.float32)}, encoded={})


@pytest.mark.parametrize("block", [1, 3])
def test_encoded_updates_are_counted_as_sent_and_the_undecodable_is_refused(block: int) -> None:
    notes = Notes()
    made = parts(0, 1, 3, transforms=[Packed()], plugin=notes, transport=InProcess(block=block))
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    assert (report.refused, report.clients) == ({"undecodable": 1}, 2)
    assert [told[2:] for told in notes.told if told[0] == "refused"] == [(1, "undecodable", "w has four bytes")]
    plain = outcome(parts(0, 3))[2]
    assert report.bytes_up == plain.bytes_up + 2 * 4, "as long as it was, and 32 bits for how long"


def test_what_nobody_decodes_is_refused() -> None:
    @dataclass(frozen=True)
    class Left(Packed):
        def decode(self, block: Updates) -> Updates:
            return block

    assert outcome(parts(0, transforms=[Left()]))[2].refused == {"undecodable": 1}


@dataclass(frozen=True)
class Noisy(Coded):
    """Adds what it draws, and writes it down; a finished total says who is in it."""

    drawn: list[float] = field(default_factory=list)
    counted: list[list[int]] = field(default_factory=list)

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        assert updates.clients is not None
        noise = draws.normal("noise", 1, updates.clients)
        self.drawn.extend(noise.tolist())
        return replace(updates, dense={"w": updates.dense["w"] + noise.astype(np.float32)}), state

    def decode(self, block: Updates) -> Updates:
        return block

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        self.counted.append(cohort.clients.tolist())
        assert cohort.population == 8
        return total


def test_two_transforms_of_a_kind_draw_differently() -> None:
    one, other = Noisy(), Noisy()
    outcome(parts(0, 1, transforms=[one, other]))
    again = Noisy()
    outcome(parts(0, 1, transforms=[again]))
    assert not set(one.drawn) & set(other.drawn)
    assert again.drawn == one.drawn, "the same position draws the same"


def test_a_total_is_finished_for_those_who_counted() -> None:
    noisy = Noisy()
    outcome(parts(0, 1, 3, transforms=[noisy], plugin=Choosy()))
    assert noisy.counted == [[0, 3]]


def kept(made: Parts) -> list[float]:
    """What each client keeps of w."""
    return [float(value) for value in made.client.store.read("transforms.0.kept", np.arange(8))]


@pytest.mark.parametrize("block", [1, 3])
def test_what_a_refused_client_would_have_kept_is_thrown_away(block: int) -> None:
    made = parts(0, 1, 3, transforms=[HalfNow()], transport=InProcess(block=block), plugin=Sceptic())
    outcome(made)
    wanted = parts(0, 3, transforms=[HalfNow()])
    outcome(wanted)
    assert kept(made) == kept(wanted)
    assert kept(made)[1] == 0
    assert made.client.staged == []


class Sceptic:
    """Takes nothing from client 1."""

    @hookimpl
    def accept_update(self, update: Updates) -> str | None:
        assert update.clients is not None
        return "it is client 1" if update.clients[0] == 1 else None


def test_what_a_late_client_would_have_kept_is_thrown_away() -> None:
    clock = Clock()
    late = Deadline(clock)
    made = parts(0, 1, 3, transforms=[HalfNow()], plugin=late, transport=InProcess(block=1), clock=clock)
    outcome(made)
    assert [value != 0 for value in kept(made)[:4]] == [True, True, False, False]
    assert made.client.staged == []


def test_a_transport_that_divides_blocks_loses_nothing_of_what_is_kept() -> None:
    class Dividing:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            block = visit(plan, cohort.clients)
            return (block.pick(np.array(some)) for some in ([2], [1, 0]))

    made, wanted = parts(0, 1, 3, transforms=[HalfNow()], transport=Dividing()), parts(0, 1, 3, transforms=[HalfNow()])
    outcome(made)
    outcome(wanted)
    assert kept(made) == kept(wanted)
