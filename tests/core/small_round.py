"""A round with small real parts: y = w x + r[item] at each client, by gradient descent in numpy."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.round import Parts, RoundReport, run_round
from fedtower.core.rows import localise, step_rows
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.transform import States, Transform
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.server_optimizers.sgd import SGD
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
