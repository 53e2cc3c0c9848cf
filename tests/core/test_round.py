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

from fedtower.core.accounting import Ledger
from fedtower.core.checking import CheckSettings
from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError, PluginError, UpdateError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.jagged import Encoded
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.round import Parts, RoundReport, run_round, run_rounds
from fedtower.core.rows import localise, step_rows
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.tally import Tally
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


def test_examples_are_those_of_the_clients_that_count() -> None:
    class Objection:
        @hookimpl
        def accept_update(self, update: Updates, plan: Plan) -> str | None:
            return "not this one" if update.clients is not None and 4 in update.clients else None

    assert outcome(parts(0, 1, 2, 4))[2].examples == 2 + 1 + 0 + 4
    assert outcome(parts(0, 1, 2, 4, plugin=Objection()))[2].examples == 2 + 1 + 0


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_the_width_of_blocks_changes_no_bit_of_state_or_report(block: int) -> None:
    wide, narrow = (parts(*range(8), transforms=[Clip(norm=0.7)], transport=InProcess(block=b)) for b in (8, block))
    assert_same_bits(outcome(narrow, rounds=3), outcome(wide, rounds=3))
    assert outcome(wide)[2].metrics["clipped"] > 0


@dataclass(frozen=True)
class Backwards:
    """The last of the cohort answers first, and everyone alone."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
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
    def update_refused(self, round: int, client: int, reason: str, words: str) -> None:
        self.told.append(("refused", round, client, reason, words))

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

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
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
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_client_s_broken_update_is_refused_and_the_round_goes_on(kind: str, block: int) -> None:
    notes = Notes()
    made = parts(0, 1, 3, plugin=notes, data=Data(POISONED[kind]), transport=InProcess(block=block))
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    reason = "too_large" if kind == "huge" else "not_finite"
    assert (report.clients, report.dropped, report.refused) == (2, 1, {reason: 1})
    assert report.bytes_up == outcome(parts(0, 3))[2].bytes_up
    assert math.isfinite(report.loss)
    assert [told[:4] for told in notes.told if told[0] == "refused"] == [("refused", 1, 1, reason)]
    ((_, _, lost, said),) = [told for told in notes.told if told[0] == "dropped"]
    assert lost == [1]
    assert said.startswith("refused: its update is")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_everybody_s_mistake_is_said_and_in_the_end_stops_the_run() -> None:
    said: list[str] = []

    class Listening:
        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(1, plugin=Listening(), data=Data(POISONED["nan"]), rounds=9)
    before, after = start(made), list[tuple[ServerState, RoundReport]]()
    with pytest.raises(UpdateError, match=r"rounds 1 to 3 was refused: .* lower local\.lr"):
        after.extend(run_rounds(before, made))
    assert [report.refused for _, report in after] == [{"not_finite": 1}] * 3
    assert [state for state, _ in after] == [replace(before, round=round) for round in (1, 2, 3)]
    assert said[0] == (
        "every update of round 1 was refused, and nothing moved; 1 of them: its update is not finite; if it is "
        "everybody's, lower local.lr"
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_round_in_which_somebody_counts_ends_the_row_of_those_in_vain() -> None:
    class InTurns:
        @hookimpl
        def select_clients(self, round: int) -> IntArray:
            return np.array([0 if round % 3 == 0 else 1])

    made = parts(plugin=InTurns(), data=Data(POISONED["nan"]), rounds=9)
    assert len(list(run_rounds(start(made), made))) == 9


@dataclass(frozen=True)
class Tampering:
    """Every client alone; what client 1 sends is tampered with, and client 1 answers ``times`` times."""

    changed: Any
    times: int = 1

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        for client in cohort.clients:
            update = visit(plan, np.array([client]))
            yield from [self.changed(update)] * self.times if client == 1 else [update]


def rows_with(update: Updates, **changes: Any) -> Updates:
    return replace(update, rows={"item": replace(update.rows["item"], **changes)})


TAMPERED: Mapping[str, tuple[str, Any]] = {
    "another round's": ("other_round", lambda update: replace(update, rounds=update.rounds + 1)),
    "a stranger's": ("not_asked", lambda update: replace(update, clients=np.array([6]))),
    "negative": ("weight", lambda update: replace(update, weights=np.array([-1.0]))),
    "weightless": ("weight", lambda update: replace(update, weights=np.array([math.nan]))),
    "of too many": ("num_examples", lambda update: replace(update, weights=np.array([51.0]))),
    "of another model": ("wrong_names", lambda update: replace(update, dense={"v": update.dense["w"]})),
    "too little": ("wrong_names", lambda update: replace(update, dense={})),
    "of another table": ("wrong_names", lambda update: replace(update, rows={"user": update.rows["item"]})),
    "of another shape": ("wrong_shape", lambda update: replace(update, dense={"w": np.zeros((1, 2), np.float32)})),
    "too wide": ("wrong_shape", lambda update: rows_with(update, row_deltas=np.zeros((1, 2), np.float32))),
    "of doubles": ("wrong_dtype", lambda update: replace(update, dense={"w": np.zeros(1)})),
    "a row of others": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([3]))),
    "a row of nobody": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([-1]))),
    "a row beyond": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([2**62]))),
    "NaN in rows": ("not_finite", lambda update: rows_with(update, row_deltas=np.full((1, 1), np.nan, np.float32))),
    "too long": ("norm", lambda update: replace(update, dense={"w": np.full(1, 100, np.float32)})),
    "no number of bytes": (
        "not_finite",
        lambda update: replace(update, metrics={**update.metrics, "bytes_down": np.array([math.nan])}),
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_update_is_refused_for_its_reason_and_moves_no_bit(kind: str) -> None:
    reason, changed = TAMPERED[kind]
    notes, bounds = Notes(), CheckSettings(max_norm=50.0, max_examples=50)
    made = parts(0, 1, 3, plugin=notes, transport=Tampering(changed), checks=bounds)
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    assert (report.refused, report.clients) == ({reason: 1}, 2)
    assert [told[3] for told in notes.told if told[0] == "refused"] == [reason]


def test_an_update_that_comes_twice_counts_once() -> None:
    notes = Notes()
    made = parts(0, 1, 3, plugin=notes, transport=Tampering(lambda update: update, times=3))
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 1, 3))[:2])
    assert (report.refused, report.clients, report.dropped) == ({"repeated": 2}, 3, 0)
    assert not [told for told in notes.told if told[0] == "dropped"], "its first update counts"


def test_a_client_that_stands_twice_in_a_block_counts_once() -> None:
    class Twice:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            yield visit(plan, cohort.clients).pick(np.array([0, 1, 1]))

    state, rows, report = outcome(parts(0, 1, transport=Twice()))
    assert_same_bits((state, rows), outcome(parts(0, 1))[:2])
    assert report.refused == {"repeated": 1}


def test_the_transport_is_told_the_deadline() -> None:
    told: list[float | None] = []

    class Hearing:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            told.append(deadline)
            return iter(())

    outcome(parts(0, transport=Hearing()))
    outcome(parts(0, transport=Hearing(), plugin=Deadline(Clock())))
    assert told == [None, 2.5]


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


@dataclass(frozen=True)
class Counting:
    """A ledger of how many rounds there were, and of those who counted; a budget of rounds."""

    budget: int

    def record(self, ledger: Ledger, cohort: Cohort, transforms: Any) -> Ledger:
        assert len(transforms) == 1
        rounds = int(ledger["rounds"]) if ledger else 0
        return {"rounds": np.asarray(rounds + 1), "clients": cohort.clients}

    def affords(self, ledger: Ledger, transforms: Any) -> bool:
        return not ledger or int(ledger["rounds"]) < self.budget

    def spent(self, ledger: Ledger) -> Mapping[str, float]:
        return {"rounds": float(ledger["rounds"])}


def test_a_run_ends_when_another_round_cannot_be_afforded() -> None:
    told: list[tuple[int, Mapping[str, float]]] = []
    said: list[str] = []

    class Watching:
        @hookimpl
        def privacy_spent(self, round: int, spent: Mapping[str, float]) -> None:
            told.append((round, spent))

        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(0, 1, 3, plugin=Watching(), transforms=[HalfNow()], accountant=Counting(budget=2))
    states = [state for state, _ in run_rounds(start(made), made)]
    assert [int(state.accountant["rounds"]) for state in states] == [1, 2]
    assert states[-1].accountant["clients"].tolist() == [0, 1, 3]
    assert told == [(1, {"rounds": 1.0}), (2, {"rounds": 2.0})]
    assert said == ["stopped after round 2 of 3: another would cost too much (rounds 2)"]
    assert list(run_rounds(states[-1], made)) == [], "a resumed run goes on with its ledger"


def test_a_round_in_which_nobody_answers_is_recorded_too() -> None:
    made = parts(0, transport=Silence(), transforms=[HalfNow()], accountant=Counting(budget=2))
    state, _ = run_round(start(made), made)
    assert int(state.accountant["rounds"]) == 1
    assert state.accountant["clients"].tolist() == []


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


@pytest.mark.parametrize(("part", "lost"), [("dense", "w"), ("rows", "rows of item")])
def test_an_aggregator_that_loses_what_it_is_given_ends_the_run(part: str, lost: str) -> None:
    class Forgetful(FedAvg):
        def fold(
            self, blocks: Iterable[Updates], state: Mapping[str, NDArray[Any]]
        ) -> tuple[Updates, Mapping[str, NDArray[Any]]]:
            total, memory = super().fold(blocks, state)
            return replace(total, dense={}) if part == "dense" else replace(total, rows={}), memory

    with pytest.raises(PluginError, match=f"the aggregator Forgetful was given {lost} and gives a total without"):
        outcome(parts(0, 1, aggregator=Forgetful()))


@pytest.mark.parametrize("order", [(2, 0), (0, 2)], ids=["first", "last"])
def test_a_client_without_weight_is_folded_wherever_it_stands(order: tuple[int, ...]) -> None:
    class InThisOrder:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            return (visit(plan, np.array([client])) for client in order)

    state, _, _ = outcome(parts(0, 2, aggregator=Numbering(), transport=InThisOrder()))
    assert int(state.aggregator["seen"]) == 2


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
    assert report.metrics == {"steps": 1.0, "depth": 3.0}
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
