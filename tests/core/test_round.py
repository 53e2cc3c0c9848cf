"""A whole round with small real parts: y = w x + r[item] at each client, by gradient descent in numpy."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError, UpdateError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.round import Parts, RoundReport, Tally, run_round, run_rounds
from fedtower.core.rows import localise, step_rows
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transform import States, Transform
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.server_optimizers.sgd import SGD
from fedtower.plugins.transforms.clip import Clip
from fedtower.plugins.transports.in_process import InProcess

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Examples = list[tuple[float, float, int]]  # x, y, item

# Client 0 has two examples, client 1 one, client 2 none; 3 to 7 have a few that are not looked at one by one.
DATA: list[Examples] = [
    [(1.0, 1.0, 0), (2.0, 2.0, 1)],
    [(2.0, 4.0, 1)],
    [],
    *[[(0.1 * c, 0.3 * c - 1, (c + k) % 4) for k in range(c)] for c in range(3, 8)],
]


@dataclass(frozen=True)
class Data:
    """Every example of a client, in one step."""

    of: list[Examples] = field(default_factory=lambda: DATA)

    def work(self, plan: Plan, clients: IntArray) -> Work:
        counts = np.array([len(self.of[client]) for client in clients], dtype=np.int64)
        table = np.zeros((len(clients), 1, max(counts.max(initial=0), 1), 4))
        for place, client in enumerate(clients):
            if counts[place]:
                table[place, 0, :, 2] = self.of[client][0][2]  # padding asks for no row of its own
                table[place, 0, : counts[place], :3] = self.of[client]
                table[place, 0, : counts[place], 3] = 1
        x, y, item, weight = (table[..., column] for column in range(4))
        needed, local = localise(item.astype(np.int64).reshape(len(clients), -1))
        return Work(
            clients=clients,
            steps=np.minimum(counts, 1),
            examples=counts,
            inputs={"x": x, "y": y, "weight": weight},
            slots={"item": local.reshape(item.shape)},
            row_ids={"item": needed},
        )


class Descent:
    """One step down the mean of half the squared error; a client without examples stays where it is."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        w, rows = np.repeat(plan.parameters["w"][None], len(work), axis=0), work.rows["item"].copy()
        losses = np.full(len(work), math.nan)
        for client in range(len(work)):
            if not work.steps[client]:
                continue
            mine = slice(*work.row_ids["item"].offsets[client : client + 2])
            x, y, weight = (work.inputs[name][client, 0] for name in ("x", "y", "weight"))
            slots = work.slots["item"][client, 0]
            error = (w[client] * x + rows[mine][slots, 0] - y) * weight
            losses[client] = np.square(error).sum() / weight.sum()
            slopes = (error / weight.sum()).astype(np.float32)
            w[client] -= np.float32(plan.local.lr) * np.float32((slopes * x).sum())
            rows[mine] = step_rows(rows[mine], slots, slopes[:, None], plan.local.rows_lr)
        return as_updates(plan, work, {"w": w}, {"item": rows}, losses), {}


class Table:
    """Four rows of one number, all 0 at first; they move by lr_scale times their delta."""

    def __init__(self) -> None:
        self.rows = np.zeros((4, 1), dtype=np.float32)
        self.generation = 0

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        return self.rows[ids]

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        for ids, delta in deltas.values():
            self.rows[ids] += np.float32(lr_scale) * delta
        self.generation += 1

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        return {"rows": self.rows.copy(), "generation": np.asarray(self.generation)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.rows, self.generation = np.array(arrays["rows"]), int(arrays["generation"])


@dataclass(frozen=True)
class These:
    """The cohort is always these clients."""

    clients: tuple[int, ...]

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        return Cohort(round, np.array(self.clients, dtype=np.int64), population)


class Clock:
    """Stands at 100 until somebody makes it go on."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def parts(
    *clients: int, plugin: object = None, transforms: Iterable[Transform] = (), data: Data | None = None, **others: Any
) -> Parts:
    """A run of three rounds over these clients, of eight; the plugin's hooks take part."""
    hooks, draws, store, table = Hooks.none(pytest.fail), Draws(1), ClientStore(8), Table()
    if plugin is not None:
        hooks.add(plugin, "plugin")
    side = ClientSide(data or Data(), Descent(), table, list(transforms), store, hooks, draws)
    made = Parts(
        population=8,
        rounds=3,
        sampler=These(clients),
        transport=InProcess(block=2),
        client=side,
        transforms=list(transforms),
        aggregator=FedAvg(),
        optimizer=SGD(),
        store=table,
        local=LocalSettings(steps=1, lr=0.5),
        rows=RowSettings(average="touched"),
        lr=1.0,
        schedule=Schedule("none", to=1.0, rounds=3),
        hooks=hooks,
        draws=draws,
        clock=Clock(),
    )
    made = replace(made, **others)
    side.declare(Plan(1, start(made).parameters, made.local))
    return made


def start(made: Parts) -> ServerState:
    parameters = {"w": np.zeros((), dtype=np.float32)}
    return ServerState(0, parameters, made.optimizer.init(parameters))


def rows_of(made: Parts) -> list[float]:
    assert isinstance(made.store, Table)
    return [float(value) for value in made.store.rows[:, 0]]


def w_of(state: ServerState) -> float:
    return float(state.parameters["w"])


def outcome(made: Parts, rounds: int = 1) -> tuple[ServerState, list[float], RoundReport]:
    """State, rows and report after so many rounds from the start."""
    state = start(made)
    for _ in range(rounds):
        state, report = run_round(state, made)
    return state, rows_of(made), report


# By hand, from w = 0 and r = 0 with a local rate of 1/2. The errors are -y.
#   client 0: dw = 1/2 (1*1 + 2*2) / 2 = 1.25;  dr[0] = 1/2 * 1/2 = 0.25;  dr[1] = 1/2 * 2/2 = 0.5;  loss (1 + 4) / 2
#   client 1: dw = 1/2 (4*2) / 1 = 4;           dr[1] = 1/2 * 4 = 2;                                 loss 16
# and they weigh 2 and 1.
W_1 = (2 * 1.25 + 1 * 4) / 3
LOSS_1 = (2 * 2.5 + 1 * 16) / 3


def test_one_round_by_hand() -> None:
    state, rows, report = outcome(parts(0, 1))
    assert state.round == 1
    assert w_of(state) == pytest.approx(W_1, rel=1e-6)
    assert rows == pytest.approx([0.25, (2 * 0.5 + 1 * 2) / 3, 0, 0], rel=1e-6)
    assert state.generation == 1
    assert report.loss == pytest.approx(LOSS_1, rel=1e-6)
    assert (report.round, report.total_rounds, report.clients, report.dropped) == (1, 3, 2, 0)


def test_a_second_round_goes_on_from_the_first() -> None:
    made = parts(1)
    state, rows, _ = outcome(made, rounds=2)
    # Client 1 alone: w = 4 and r[1] = 2 after the first round, so it is 4 * 2 + 2 - 4 = 6 too high.
    assert w_of(state) == 4 - 0.5 * 6 * 2
    assert rows == [0, 2 - 0.5 * 6, 0, 0]
    assert state.generation == 2


def test_rows_can_be_averaged_over_the_whole_cohort() -> None:
    _, rows, _ = outcome(parts(0, 1, rows=RowSettings(average="cohort")))
    assert rows == pytest.approx([0.25 * 2 / 3, (2 * 0.5 + 1 * 2) / 3, 0, 0], rel=1e-6)


def test_frozen_rows_are_fetched_and_stay() -> None:
    made = parts(0, 1, rows=RowSettings(train="frozen"))
    state, rows, report = outcome(made)
    assert w_of(state) == pytest.approx(W_1, rel=1e-6)
    assert rows == [0, 0, 0, 0]
    assert state.generation == 0
    assert report.bytes_up == 2 * (4 + 8)
    assert report.bytes_down == 2 * 4 + 3 * 4


def test_server_rates_scale_the_step_of_parameters_and_rows() -> None:
    made = parts(1, lr=0.5, schedule=Schedule("linear", to=0.5, rounds=3))
    state = replace(start(made), round=2)  # the third and last round: half of the rates are left
    state, _ = run_round(state, made)
    assert w_of(state) == 0.5 * 0.5 * 4
    assert rows_of(made) == [0, 0.5 * 2, 0, 0]


def test_bytes_are_counted_as_documented() -> None:
    _, _, report = outcome(parts(0, 1))
    # Up: w (4) and the weight (8); of rows their number (4), and for each its id (4) and its delta (4).
    assert report.bytes_up == (4 + 8 + 4 + 2 * 8) + (4 + 8 + 4 + 1 * 8)
    # Down: w (4), and each row asked for (4).
    assert report.bytes_down == (4 + 2 * 4) + (4 + 1 * 4)


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_the_width_of_blocks_changes_no_bit_of_state_or_report(block: int) -> None:
    wide, narrow = (parts(*range(8), transforms=[Clip(norm=0.7)], transport=InProcess(block=b)) for b in (8, block))
    assert_same_bits(outcome(narrow, rounds=3), outcome(wide, rounds=3))
    assert outcome(wide)[2].metrics["clipped"] > 0


@dataclass(frozen=True)
class Backwards:
    """The last of the cohort answers first, and everyone alone."""

    def exchange(self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws) -> Iterator[Updates]:
        for client in cohort.clients[::-1]:
            yield visit(plan, np.array([client]))


def test_the_order_of_arrival_changes_no_bit_of_state_or_report() -> None:
    one, other = parts(*range(8), transport=InProcess()), parts(*range(8), transport=Backwards())
    assert_same_bits(outcome(one, rounds=3), outcome(other, rounds=3))


class Notes:
    """An observer that writes down what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    @hookimpl
    def round_started(self, round: int, cohort: Cohort) -> None:
        self.told.append(("started", round, cohort.clients.tolist()))

    @hookimpl
    def update_received(self, round: int, updates: Updates) -> None:
        assert updates.clients is not None
        self.told.append(("received", round, updates.clients.tolist()))

    @hookimpl
    def client_dropped(self, round: int, clients: IntArray, reason: str) -> None:
        self.told.append(("dropped", round, clients.tolist(), reason))

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        self.told.append(("finished", report.round, report.clients))


def test_observers_are_told_in_order() -> None:
    notes = Notes()
    outcome(parts(0, 1, 3, plugin=notes), rounds=2)
    assert notes.told == [
        told
        for round in (1, 2)
        for told in (
            ("started", round, [0, 1, 3]),
            ("received", round, [0, 1]),
            ("received", round, [3]),
            ("finished", round, 3),
        )
    ]


def test_an_observer_that_fails_changes_nothing() -> None:
    class Failing(Notes):
        @hookimpl
        def update_received(self, round: int, updates: Updates) -> None:
            raise RuntimeError("no disk left to write it down on")

    failing, said = Failing(), list[str]()
    made = parts(0, 1, plugin=failing)
    made.hooks.report = said.append
    assert_same_bits(outcome(made, rounds=2), outcome(parts(0, 1), rounds=2))
    assert len(said) == 1
    assert failing.told[-1] == ("finished", 2, 2)


class Silence:
    """Nobody answers."""

    def exchange(self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws) -> Iterator[Updates]:
        return iter(())


@pytest.mark.parametrize("clients", [(0, 1), ()], ids=["silence", "an empty cohort"])
def test_a_round_in_which_nobody_answers_changes_nothing_but_its_number(clients: tuple[int, ...]) -> None:
    notes = Notes()
    made = parts(*clients, plugin=notes, transport=Silence(), optimizer=SGD(momentum=0.9), aggregator=Numbering())
    before = replace(start(made), optimizer={"w": np.ones((), dtype=np.float32)}, generation=4)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert rows_of(made) == [0, 0, 0, 0]
    assert (report.clients, report.dropped, report.bytes_up, report.bytes_down) == (0, len(clients), 0, 0)
    assert math.isnan(report.loss)
    lost = [("dropped", 1, list(clients), "sent no update in time")] if clients else []
    assert notes.told == [("started", 1, list(clients)), *lost, ("finished", 1, 0)]


def test_clients_without_examples_are_heard_and_move_nothing() -> None:
    made = parts(2, optimizer=SGD(momentum=0.9))
    before = start(made)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert (report.clients, report.dropped) == (1, 0)
    assert math.isnan(report.loss)


def test_clients_without_examples_change_neither_the_step_nor_the_loss() -> None:
    with_one, without = outcome(parts(0, 1, 2)), outcome(parts(0, 1))
    assert_same_bits(with_one[:2], without[:2])
    assert with_one[2].loss == without[2].loss
    assert with_one[2].clients == 3


def test_who_drops_out_might_as_well_not_have_been_chosen() -> None:
    notes = Notes()
    made = parts(*range(8), plugin=notes, transport=InProcess(dropout=0.5))
    state, rows, report = outcome(made)
    ((_, _, lost, _),) = [told for told in notes.told if told[0] == "dropped"]
    assert 0 < len(lost) < 8
    left = tuple(client for client in range(8) if client not in lost)
    assert (report.clients, report.dropped) == (len(left), len(lost))
    assert_same_bits((state, rows), outcome(parts(*left))[:2])


class Deadline(Notes):
    """Two and a half seconds after the start it is too late; each visit takes one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    @hookimpl
    def round_deadline(self, round: int) -> float:
        return 2.5

    @hookimpl(wrapper=True)
    def client_train(self, plan: Plan) -> Generator[None, Any, Any]:
        result = yield
        self._clock.seconds += 1
        return result


def test_what_comes_after_the_deadline_is_dropped() -> None:
    clock = Clock()
    plugin = Deadline(clock)
    made = parts(0, 1, 3, 4, 5, plugin=plugin, transport=InProcess(block=1), clock=clock)
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 1))[:2])
    assert (report.clients, report.dropped) == (2, 3)
    assert report.seconds == 3, "the third is waited for, and nobody after it"
    assert plugin.told[-2:] == [("dropped", 1, [3, 4, 5], "sent no update in time"), ("finished", 1, 2)]


def test_exactly_at_the_deadline_is_too_late() -> None:
    clock = Clock()

    class Sharp(Deadline):
        @hookimpl
        def round_deadline(self, round: int) -> float:
            return 2.0

    made = parts(0, 1, plugin=Sharp(clock), transport=InProcess(block=1), clock=clock)
    assert outcome(made)[2].clients == 1


class Choosy(Notes):
    """Takes no update whose w moved by more than a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    @hookimpl
    def accept_update(self, update: Updates, plan: Plan) -> str | None:
        assert len(update) == 1
        assert plan.round == 1
        assert update.clients is not None
        self.asked.append(int(update.clients[0]))
        moved = float(update.dense["w"][0])
        return f"w moved by {moved}" if not abs(moved) < 3 else None


def test_an_update_that_is_refused_does_not_count_and_the_rest_do() -> None:
    plugin = Choosy()
    state, rows, report = outcome(parts(0, 1, 3, plugin=plugin, transport=InProcess(block=3)))
    assert plugin.asked == [0, 1, 3]
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    assert (report.clients, report.dropped) == (2, 1)
    assert report.bytes_up == outcome(parts(0, 3))[2].bytes_up


def test_a_client_that_was_refused_is_told_so_once() -> None:
    plugin = Choosy()
    outcome(parts(0, 1, plugin=plugin))
    assert [told for told in plugin.told if told[0] == "dropped"] == [("dropped", 1, [1], "refused: w moved by 4.0")]


def test_a_round_whose_updates_are_all_refused_changes_nothing_but_its_number() -> None:
    made = parts(1, plugin=Choosy())
    before = start(made)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert (report.clients, report.dropped) == (0, 1)


# A client whose data is broken, and one whose numbers are too large for any grid.
POISONED: Mapping[str, list[Examples]] = {
    "nan": [*DATA[:1], [(math.nan, 1.0, 0)], *DATA[2:]],
    "inf": [*DATA[:1], [(math.inf, 1.0, 0)], *DATA[2:]],
    "huge": [*DATA[:1], [(1e9, 1e9, 0)], *DATA[2:]],
}


@pytest.mark.parametrize("kind", POISONED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_update_that_cannot_be_summed_stops_the_round_and_names_the_client(kind: str) -> None:
    made = parts(0, 1, 3, data=Data(POISONED[kind]), transport=InProcess(block=3))
    before = start(made)
    with pytest.raises(UpdateError, match=r"the clients \[1\]"):
        run_round(before, made)
    assert (before.round, w_of(before), rows_of(made)) == (0, 0, [0, 0, 0, 0])


@pytest.mark.parametrize("kind", POISONED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_refusing_it_lets_the_round_go_on(kind: str) -> None:
    made = parts(0, 1, 3, plugin=Choosy(), data=Data(POISONED[kind]), transport=InProcess(block=3))
    assert_same_bits(outcome(made)[:2], outcome(parts(0, 3))[:2])


def test_a_plugin_may_select_the_clients() -> None:
    class Selecting(Notes):
        @hookimpl
        def select_clients(self, round: int, population: int, draws: Draws) -> IntArray:
            assert (round, population, draws) == (1, 8, Draws(1))
            return np.array([1, 0])

    plugin = Selecting()
    assert_same_bits(outcome(parts(5, 6, 7, plugin=plugin)), outcome(parts(0, 1)))
    assert plugin.told[0] == ("started", 1, [0, 1])


def test_a_plugin_may_leave_the_choice_to_the_sampler() -> None:
    class Undecided:
        @hookimpl
        def select_clients(self, round: int) -> None:
            return None

    assert_same_bits(outcome(parts(0, 1, plugin=Undecided())), outcome(parts(0, 1)))


def test_selected_clients_that_do_not_exist_are_refused() -> None:
    class Inventing:
        @hookimpl
        def select_clients(self) -> IntArray:
            return np.array([0, 8])

    with pytest.raises(FedtowerError, match="a plugin's select_clients"):
        outcome(parts(0, plugin=Inventing()))


def test_rounds_go_on_until_all_are_done() -> None:
    made = parts(0, 1)
    assert [report.round for _, report in run_rounds(start(made), made)] == [1, 2, 3]


def test_a_run_that_goes_on_is_equal_to_one_that_never_stopped() -> None:
    whole, cut, rest = (parts(*range(8), optimizer=SGD(momentum=0.9)) for _ in range(3))
    *_, (wanted, _) = run_rounds(start(whole), whole)
    state, _ = next(run_rounds(start(cut), cut))
    assert isinstance(cut.store, Table)
    assert rest.store is not None
    rest.store.restore(cut.store.snapshot())
    *_, (got, report) = run_rounds(state, rest)
    assert report.round == 3
    assert_same_bits((got, rows_of(rest)), (wanted, rows_of(whole)))


def test_a_plugin_may_stop_the_run_and_its_reason_is_passed_on() -> None:
    said: list[str] = []

    class Contented:
        @hookimpl
        def stop_run(self, report: RoundReport) -> str | None:
            return "good enough" if report.round == 2 else None

        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(0, 1, plugin=Contented())
    assert [state.round for state, _ in run_rounds(start(made), made)] == [1, 2]
    assert said == ["stopped after round 2 of 3: good enough"]


def test_a_wrapper_of_training_passes_on_what_it_returns() -> None:
    class Halving:
        @hookimpl(wrapper=True)
        def client_train(self, clients: IntArray) -> Generator[None, Any, Any]:
            updates, states = yield
            assert updates.clients.tolist() == clients.tolist()
            return replace(updates, dense={"w": updates.dense["w"] / 2}, rows={}), states

    state, rows, _ = outcome(parts(0, 1, plugin=Halving()))
    assert w_of(state) == pytest.approx(W_1 / 2, rel=1e-6)
    assert rows == [0, 0, 0, 0]


def test_a_wrapper_of_the_aggregate_sees_the_total_and_may_replace_it() -> None:
    seen: list[int | float] = []

    class Pinning:
        @hookimpl(wrapper=True)
        def aggregate(self, round: int) -> Generator[None, Any, Any]:
            total, memory = yield
            seen.extend([round, float(total.dense["w"][0])])
            return replace(total, dense={"w": np.full(1, 7, dtype=np.float32)}), memory

    state, _, report = outcome(parts(0, 1, plugin=Pinning()))
    assert seen == pytest.approx([1, W_1], rel=1e-6)
    assert w_of(state) == 7
    assert report.clients == 2


def test_a_wrapper_of_the_aggregate_may_withhold_it() -> None:
    class Withholding:
        @hookimpl(wrapper=True)
        def aggregate(self) -> Generator[None, Any, Any]:
            _, memory = yield
            return None, memory

    made = parts(0, 1, plugin=Withholding())
    state, rows, _ = outcome(made)
    assert (state.round, w_of(state), rows) == (1, 0, [0, 0, 0, 0])


@dataclass(frozen=True)
class HalfNow:
    """Sends half of w, and what was kept; keeps the other half for the next visit. Finishing adds ``after``."""

    after: float = 0.0

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {"kept": plan.parameters["w"].shape}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        half = updates.dense["w"] * np.float32(0.5)
        return replace(updates, dense={"w": half + state["kept"]}), {"kept": half}

    def decode(self, block: Updates) -> Updates:
        return block

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        assert cohort.population == 8
        return replace(total, dense={"w": total.dense["w"] + np.float32(self.after)})


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


@dataclass(frozen=True)
class Numbering:
    """FedAvg that remembers how many rounds it folded, and how many clients it saw in the last one."""

    def fold(
        self, blocks: Iterable[Updates], state: Mapping[str, NDArray[Any]]
    ) -> tuple[Updates, Mapping[str, NDArray[Any]]]:
        seen: list[Updates] = list(blocks)
        total, _ = FedAvg().fold(seen, {})
        folded = int(state["folded"]) + 1 if state else 1
        return total, {"folded": np.asarray(folded), "seen": np.asarray(sum(map(len, seen)))}


def test_an_aggregator_gets_its_state_back() -> None:
    state, _, _ = outcome(parts(0, 1, aggregator=Numbering()), rounds=3)
    assert int(state.aggregator["folded"]) == 3


@pytest.mark.parametrize("order", [(2, 0), (0, 2)], ids=["first", "last"])
def test_a_client_without_weight_is_folded_wherever_it_stands(order: tuple[int, ...]) -> None:
    class InThisOrder:
        def exchange(self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws) -> Iterator[Updates]:
            return (visit(plan, np.array([client])) for client in order)

    state, _, _ = outcome(parts(0, 2, aggregator=Numbering(), transport=InThisOrder()))
    assert int(state.aggregator["seen"]) == 2


@pytest.mark.parametrize("order", [(2, 0), (0, 2), (2,)], ids=["first", "last", "alone"])
@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_a_weight_that_is_none_is_refused_wherever_it_stands(order: tuple[int, ...], bad: float) -> None:
    class Weighing:
        def exchange(self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws) -> Iterator[Updates]:
            for client in order:
                update = visit(plan, np.array([client]))
                yield update if client == 0 else replace(update, weights=np.array([bad]))

    with pytest.raises(UpdateError, match=r"those of the clients \[2\]"):
        outcome(parts(0, 2, transport=Weighing()))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_mean_is_rounded_once_whatever_the_order(order: tuple[int, ...]) -> None:
    losses, tally = [1e16, 1.0, -1e16], Tally(Cohort(1, np.arange(3), 3))
    blocks = (Updates(np.ones(1), clients=np.array([c]), metrics={"loss": np.array([losses[c]])}) for c in order)
    assert len(list(tally.count(blocks))) == 3
    assert tally.report(1, 1, seconds=0.0).loss == 1 / 3


def test_a_metric_that_only_some_clients_send_is_their_mean() -> None:
    class Extra:
        @hookimpl(wrapper=True)
        def client_train(self, clients: IntArray) -> Generator[None, Any, Any]:
            updates, states = yield
            extra = {"depth": np.array([3.0])} if clients[0] == 1 else {}
            return replace(updates, metrics={**updates.metrics, **extra}), states

    report = outcome(parts(0, 1, plugin=Extra(), transport=InProcess(block=1)))[2]
    assert report.metrics == {"depth": 3.0}
    assert report.loss == pytest.approx(LOSS_1, rel=1e-6)


def test_seconds_are_the_clock_s() -> None:
    clock = Clock()

    class Slow:
        @hookimpl(wrapper=True)
        def aggregate(self) -> Generator[None, Any, Any]:
            result = yield
            clock.seconds += 2.5
            return result

    assert outcome(parts(0, plugin=Slow(), clock=clock))[2].seconds == 2.5
