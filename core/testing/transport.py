"""What every transport promises."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.deadline import ARRIVED
from fedtower.core.draws import Draws
from fedtower.core.plan import Plan
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, assert_same_bits, not_promised
from fedtower.core.traces import Load
from fedtower.core.transport import Simulates, Simulation, Transport
from fedtower.core.updates import Updates


class TransportPromises(Promises):
    """``make`` gives a transport that reaches clients by visiting them here; of one that reaches devices, whose server
    must be running, there is nothing to prove.
    """

    def exchange(
        self, clients: int, seed: int = 7, deadline: float | None = None
    ) -> tuple[list[Updates], list[int], Plan]:
        """The blocks that come back from a cohort, the clients that were visited, and the plan."""
        plan, visited = examples.plan(), list[int]()

        def visit(received: Plan, block: NDArray[np.int64]) -> Updates:
            assert received is plan or received.round == plan.round
            visited.extend(block.tolist())
            return Updates(
                weights=np.ones(len(block)),
                dense={"me": block.astype(np.float32)[:, None]},
                clients=block,
                rounds=np.full(len(block), plan.round, dtype=np.int64),
            )

        cohort = Cohort(plan.round, 5 * np.arange(clients, dtype=np.int64), 5 * clients + 1)
        transport: Transport = self.made()
        if hasattr(transport, "open"):
            not_promised("this transport reaches devices")
        return list(transport.exchange(plan, cohort, visit, Draws(seed), deadline)), visited, plan

    @pytest.mark.parametrize("clients", [1, 2, 200])
    def test_a_client_is_visited_at_most_once_and_belongs_to_the_cohort(self, clients: int) -> None:
        _, visited, _ = self.exchange(clients)
        assert len(visited) == len(set(visited))
        assert set(visited) <= set(range(0, 5 * clients, 5))

    def test_what_comes_back_is_what_the_clients_sent(self) -> None:
        blocks, visited, plan = self.exchange(200)
        heard: list[int] = []
        for block in blocks:
            assert block.clients is not None
            assert block.rounds is not None
            assert_same_bits(block.dense["me"][:, 0], block.clients.astype(np.float32))
            assert set(block.rounds.tolist()) <= {plan.round}
            heard.extend(block.clients.tolist())
        assert len(heard) == len(set(heard)), "an update came back twice"
        assert set(heard) <= set(visited)

    def test_somebody_answers(self) -> None:
        blocks, _, _ = self.exchange(200)
        assert sum(len(block) for block in blocks) > 0

    def test_an_empty_cohort_gives_no_updates(self) -> None:
        blocks, visited, _ = self.exchange(0)
        assert sum(len(block) for block in blocks) == 0
        assert not visited

    def test_the_same_draws_lose_the_same_clients(self) -> None:
        one, other = (sorted(int(c) for b in self.exchange(200)[0] for c in _clients(b)) for _ in range(2))
        assert one == other

    def test_a_transport_with_a_time_of_its_own_goes_on_from_a_saved_one(self) -> None:
        one, other = self.own_time(), self.own_time()
        plan, cohort = examples.plan(), Cohort(1, np.arange(200, dtype=np.int64), 200)
        list(one.exchange(plan, cohort, _visit, Draws(7), 3_600.0))
        other.begin({name: np.array(value) for name, value in one.state().items()})
        assert other.now() == one.now()
        assert_same_bits(other.state(), one.state())
        heard = [list(each.exchange(plan, cohort, _visit, Draws(7), 3_600.0)) for each in (one, other)]
        assert_same_bits(heard[0], heard[1])
        assert_same_bits(other.state(), one.state())

    def test_time_of_its_own_never_goes_back_nor_beyond_the_deadline(self) -> None:
        transport, plan = self.own_time(), examples.plan()
        cohort = Cohort(1, np.arange(200, dtype=np.int64), 200)
        began = before = transport.now()
        for block in transport.exchange(plan, cohort, _visit, Draws(7), 20.0):
            assert before <= transport.now() < began + 20.0
            assert np.all((block.metrics[ARRIVED] >= 0) & (block.metrics[ARRIVED] <= transport.now() - began))
            before = transport.now()
        assert before <= transport.now() <= began + 20.0

    def test_what_counts_is_no_waste_of_a_transport_that_knows_what_devices_spend(self) -> None:
        transport, plan = self.own_time(), examples.plan()
        cohort = Cohort(1, np.arange(200, dtype=np.int64), 200)
        heard = np.concatenate([_clients(block) for block in transport.exchange(plan, cohort, _visit, Draws(7), 60.0)])
        spent = transport.spent(Cohort(1, np.sort(heard), 200))
        assert 0 <= spent.wasted < spent.seconds
        nothing = transport.spent(Cohort(1, heard[:0], 200))
        assert nothing.wasted == pytest.approx(nothing.seconds)
        assert nothing.seconds == pytest.approx(spent.seconds)
        assert nothing.late == spent.late + len(heard)

    def own_time(self) -> Simulation:
        """The transport of a run of the one under test, at its beginning."""
        transport = self.made()
        if not isinstance(transport, Simulates):
            not_promised("this transport has no time of its own")
        opened = transport.over(_load, cast("Sampler", None))  # nobody has to be chosen
        opened.begin({})
        return opened


def _visit(plan: Plan, clients: NDArray[np.int64]) -> Updates:
    return Updates(np.ones(len(clients)), clients=clients)


def _load(plan: Plan, clients: NDArray[np.int64]) -> Load:
    same = np.ones(len(clients))
    return Load(1e5 * same, 10 * same, 1e5 * same)


def _clients(block: Updates) -> NDArray[np.int64]:
    assert block.clients is not None
    return block.clients
