"""What every transport promises."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import Plan
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises, assert_same_bits, not_promised
from fedtower.core.transport import Transport
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
        return list(transport.exchange(plan, cohort, visit, Draws(seed), deadline=None)), visited, plan

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


def _clients(block: Updates) -> NDArray[np.int64]:
    assert block.clients is not None
    return block.clients
