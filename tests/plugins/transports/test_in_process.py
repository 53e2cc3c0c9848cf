"""The transport of a simulation: blocks of the width it is told, as late as possible, and clients that vanish."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import Plan
from fedtower.core.testing import examples
from fedtower.core.testing.transport import TransportPromises
from fedtower.core.updates import Updates
from fedtower.plugins.transports.in_process import InProcess


def visit(plan: Plan, clients: NDArray[np.int64]) -> Updates:
    return Updates(np.ones(len(clients)), clients=clients)


def blocks(transport: InProcess, clients: int, round: int = 1) -> list[list[int]]:
    """The clients of each block of a cohort of everybody."""
    everybody = Cohort(round, np.arange(clients), clients)
    answered = transport.exchange(examples.plan(round), everybody, visit, Draws(7), None)
    return [[] if block.clients is None else block.clients.tolist() for block in answered]


def test_clients_are_visited_in_blocks_and_in_order() -> None:
    assert blocks(InProcess(block=3), 8) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_block_is_visited_when_it_is_asked_for() -> None:
    visited: list[int] = []

    def noting(plan: Plan, clients: NDArray[np.int64]) -> Updates:
        visited.extend(clients.tolist())
        return visit(plan, clients)

    answers = InProcess(block=2).exchange(examples.plan(), Cohort(1, np.arange(6), 6), noting, Draws(7), None)
    assert visited == []
    next(answers)
    assert visited == [0, 1]


def test_clients_vanish_at_the_rate_of_dropout() -> None:
    lost = [1000 - sum(map(len, blocks(InProcess(dropout=0.3), 1000, round))) for round in range(20)]
    assert abs(sum(lost) - 6000) < 4 * math.sqrt(20_000 * 0.3 * 0.7)
    assert len(set(lost)) > 1, "and not the same ones every round"


def test_who_vanishes_does_not_depend_on_the_width_of_blocks() -> None:
    wide, narrow = blocks(InProcess(block=100, dropout=0.5), 100), blocks(InProcess(block=1, dropout=0.5), 100)
    assert [client for block in wide for client in block] == [client for block in narrow for client in block]
    assert 30 < len(narrow) < 70


def test_those_who_vanish_are_not_visited() -> None:
    visited: list[int] = []

    def noting(plan: Plan, clients: NDArray[np.int64]) -> Updates:
        visited.extend(clients.tolist())
        return visit(plan, clients)

    transport = InProcess(dropout=0.5)
    answers = transport.exchange(examples.plan(), Cohort(1, np.arange(100), 100), noting, Draws(7), None)
    heard = [int(client) for block in answers if block.clients is not None for client in block.clients]
    assert visited == heard


@pytest.mark.parametrize(("name", "value"), [("block", 0), ("dropout", -0.1), ("dropout", 1.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"transport.{name} must be"):
        InProcess(**{name: value})  # type: ignore[arg-type]


class TestWithDropoutAndBlocksOfOne(TransportPromises):
    make = staticmethod(lambda: InProcess(block=1, dropout=0.5))
