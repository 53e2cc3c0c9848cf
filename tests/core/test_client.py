"""The client's half: what a visit is given, what leaves the device, and what stays on it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Work, as_updates
from fedtower.core.store import ClientStore
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transform import States, Transform
from fedtower.core.updates import Updates, stack

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

PLAN = Plan(4, {"w": np.array([1.0, 2.0, 3.0], dtype=np.float32)}, LocalSettings(steps=1))


class Data:
    """Client c has c examples and needs the rows 0 .. c-1."""

    def work(self, plan: Plan, clients: IntArray) -> Work:
        ids = [np.arange(client) for client in clients]
        offsets = np.concatenate([[0], np.cumsum(clients)])
        needed = RowIds(offsets, np.concatenate([np.zeros(0, dtype=np.int64), *ids]))
        return Work(clients, np.ones_like(clients), clients, inputs={}, row_ids={"item": needed})


class Table:
    """Row i is (i, 10 i)."""

    generation = 0

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        assert source == "item"
        return np.stack([ids, 10 * ids], axis=1).astype(np.float32)

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        raise AssertionError("a client never steps the cloud's rows")

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        raise AssertionError("nor restores them")


@dataclass
class Doubling:
    """Everything the client has becomes twice as much; what it was given is kept to look at."""

    given: list[Work] = field(default_factory=list)

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        self.given.append(work)
        shared = {name: np.repeat(2 * value[None], len(work), axis=0) for name, value in plan.parameters.items()}
        rows = {source: 2 * values for source, values in work.rows.items()}
        updates = as_updates(plan, work, shared, rows, losses=work.clients.astype(np.float64))
        return updates, {name: 2 * values for name, values in work.states.items()}


@dataclass(frozen=True)
class Visits:
    """Adds how often the client was here before, times ``times``, to what it sends."""

    times: float = 1.0

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {"visits": ()}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        before = state["visits"]
        dense = {name: delta + np.float32(self.times) * before[:, None] for name, delta in updates.dense.items()}
        return replace(updates, dense=dense), {"visits": before + 1}

    def decode(self, block: Updates) -> Updates:
        return block

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total


def ids(*clients: int) -> IntArray:
    return np.array(clients, dtype=np.int64)


def side(*transforms: Transform, hooks: Hooks | None = None, device: bool = True) -> ClientSide:
    """Nine clients; each keeps one number on its device, 5 at first."""
    store = ClientStore(9)
    if device:
        store.declare("mine", np.array([5.0], dtype=np.float32))
    made = ClientSide(
        data=Data(),
        runtime=Doubling(),
        rows=Table(),
        transforms=transforms,
        store=store,
        hooks=hooks or Hooks.none(pytest.fail),
        draws=Draws(1),
        device_state=("mine",) if device else (),
    )
    made.declare(PLAN)
    return made


def visit(client: ClientSide, *clients: int) -> Updates:
    """A visit after which everybody's update counted."""
    updates = client.visit(PLAN, ids(*clients))
    client.settle(ids(*clients), np.ones(len(clients), dtype=bool))
    return updates


def given(client: ClientSide) -> list[Work]:
    assert isinstance(client.runtime, Doubling)
    return client.runtime.given


def test_a_visit_is_given_its_rows_and_what_its_devices_kept() -> None:
    client = side()
    client.store.write("mine", ids(2), np.array([[7.0]], dtype=np.float32))
    client.visit(PLAN, ids(1, 2))
    (work,) = given(client)
    assert work.rows["item"].tolist() == [[0, 0], [0, 0], [1, 10]]
    assert work.states["mine"].tolist() == [[5], [7]]


def test_what_leaves_is_new_minus_old() -> None:
    updates = side().visit(PLAN, ids(1, 2))
    assert updates.dense["w"].tolist() == [[1, 2, 3]] * 2
    assert updates.rows["item"].row_deltas.tolist() == [[0, 0], [0, 0], [1, 10]]
    assert updates.rows["item"].offsets.tolist() == [0, 1, 3]
    assert updates.weights.tolist() == [1, 2]
    assert updates.clients is not None
    assert updates.clients.tolist() == [1, 2]
    assert updates.rounds is not None
    assert updates.rounds.tolist() == [4, 4]


def test_what_stays_on_the_device_is_not_sent_and_is_there_next_time() -> None:
    client = side()
    first = visit(client, 1, 2)
    visit(client, 2, 3)
    assert "mine" not in first.dense
    assert client.store.read("mine", ids(0, 1, 2, 3)).ravel().tolist() == [5, 10, 20, 10]


def test_bytes_down_are_the_shared_parameters_and_the_rows_of_each() -> None:
    updates = side().visit(PLAN, ids(0, 1, 4))
    assert updates.metrics["bytes_down"].tolist() == [12, 12 + 8, 12 + 4 * 8]
    assert updates.metrics["loss"].tolist() == [0, 1, 4]


def test_rows_that_are_frozen_are_fetched_and_not_sent() -> None:
    client = side()
    updates = client.visit(replace(PLAN, train_rows=False), ids(1, 2))
    assert updates.rows == {}
    assert given(client)[0].rows["item"].shape == (3, 2)


def test_each_transform_keeps_a_state_for_each_client() -> None:
    client = side(Visits(), Visits(times=10))
    deltas = [visit(client, *clients).dense["w"][:, 0].tolist() for clients in ((1, 2), (2, 3), (2,))]
    assert deltas == [[1, 1], [1 + 11, 1], [1 + 22]]
    for position in (0, 1):
        assert client.store.read(f"transforms.{position}.visits", ids(0, 1, 2, 3)).tolist() == [0, 1, 3, 1]


def of_all(side: ClientSide) -> ClientStore:
    assert isinstance(side.store, ClientStore)
    return side.store


def test_who_else_is_in_the_block_changes_no_bit() -> None:
    together, alone = side(Visits()), side(Visits())
    for _ in range(2):
        block = visit(together, 0, 3, 4)
        assert_same_bits(stack(visit(alone, client) for client in (0, 3, 4)), block)
    assert_same_bits(dict(of_all(alone).snapshot()), dict(of_all(together).snapshot()))


def test_a_wrapper_sees_plan_and_clients_and_its_result_is_the_one_that_counts() -> None:
    seen: list[Any] = []

    class Negating:
        @hookimpl(wrapper=True)
        def client_train(self, plan: Plan, clients: IntArray) -> Generator[None, Any, Any]:
            updates, states = yield
            seen.append((plan.round, clients.tolist(), states["mine"].tolist()))
            return replace(updates, dense={"w": -updates.dense["w"]}), {"mine": np.zeros_like(states["mine"])}

    hooks = Hooks.none(pytest.fail)
    hooks.add(Negating(), "negating")
    client = side(Visits(), hooks=hooks)
    visit(client, 1, 2)
    updates = visit(client, 2)
    assert seen == [(4, [1, 2], [[10], [10]]), (4, [2], [[0]])]
    assert updates.dense["w"].tolist() == [[-1 + 1, -2 + 1, -3 + 1]], "transforms come after the wrapper"
    assert client.store.read("mine", ids(2)).tolist() == [[0]]


def test_a_model_without_rows_and_without_device_state_needs_no_store_of_them() -> None:
    class Plain(Data):
        def work(self, plan: Plan, clients: IntArray) -> Work:
            return replace(super().work(plan, clients), row_ids={})

    client = replace(side(device=False), data=Plain(), rows=None)
    updates = client.visit(PLAN, ids(1, 2))
    assert updates.rows == {}
    assert updates.metrics["bytes_down"].tolist() == [12, 12]
    assert of_all(client).names == ()


def test_nothing_is_kept_before_the_server_has_spoken() -> None:
    client = side(Visits())
    first, second = client.visit(PLAN, ids(1, 2)), client.visit(PLAN, ids(1, 2))
    assert_same_bits(first, second)
    assert client.store.read("mine", ids(1, 2)).tolist() == [[5], [5]]


def test_what_counted_is_kept_and_what_did_not_is_forgotten() -> None:
    client = side(Visits())
    client.visit(PLAN, ids(1, 2))
    client.visit(PLAN, ids(3, 4, 5))
    client.settle(ids(1, 2), np.array([False, True]))
    client.settle(ids(5, 3), np.array([True, True]))  # a transport may divide a block, and turn it round
    assert [staged.clients.tolist() for staged in client.staged] == [[4]]
    client.discard()
    client.settle(ids(4), np.array([True]))
    assert client.store.read("mine", ids(1, 2, 3, 4, 5)).ravel().tolist() == [5, 10, 10, 5, 10]
    assert client.store.read("transforms.0.visits", ids(1, 2, 3, 4, 5)).tolist() == [0, 1, 1, 0, 1]


def test_a_block_knows_the_rows_it_was_given_until_it_is_settled() -> None:
    client = side()
    client.visit(PLAN, ids(1, 2))
    leased = client.leased(ids(1, 2))
    assert leased is not None
    assert (leased["item"].rows.ids.tolist(), leased["item"].width) == ([0, 0, 1], 2)
    assert client.leased(ids(1)) is None
    client.settle(ids(1, 2), np.array([True, False]))
    assert client.leased(ids(1, 2)) is None


def test_of_those_who_are_left_of_a_visit_it_is_not_known_what_they_were_given() -> None:
    client = side()
    client.visit(PLAN, ids(1, 2))
    client.settle(ids(1), np.array([True]))
    assert client.leased(ids(2)) is None
