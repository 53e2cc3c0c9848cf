"""Krum and multi-Krum: by hand, and the definition in loops as an oracle."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.krum import Krum


def block(values: np.ndarray) -> Updates:
    """Clients whose deltas (C, 6) lie in two parameters."""
    dense = {"a": values[:, :4].reshape(-1, 2, 2).astype(np.float32), "b": values[:, 4:].astype(np.float32)}
    return Updates(np.arange(1.0, len(values) + 1), dense, clients=np.arange(len(values)))


def plainly(values: np.ndarray, attackers: int, select: int) -> np.ndarray:
    """The paper's words, one client after another."""
    scores = []
    for mine in range(len(values)):
        others = [np.sum((values[mine] - values[k]) ** 2) for k in range(len(values)) if k != mine]
        scores.append(sum(sorted(others)[: len(values) - attackers - 2]))
    return np.asarray(np.mean([values[k] for k in np.argsort(scores, kind="stable")[:select]], axis=0))


def test_five_on_a_line_by_hand() -> None:
    # Two neighbours each: 1 + 4, 1 + 1, 1 + 4, 81 + 64, and the far one. The middle of the first three wins.
    said = np.zeros((5, 6))
    said[:, 0] = [0, 1, 2, 10, 1000]
    total, _ = Krum(attackers=0.2).fold(iter([block(said)]), {})
    assert total.dense["a"][0].tolist() == [[1, 0], [0, 0]]
    assert total.weights.tolist() == [5]


@pytest.mark.parametrize(("select", "chosen"), [(1, 1), (3, 3), (0, 8), (50, 8)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_definition_in_loops_agrees(select: int, chosen: int, seed: int) -> None:
    values = Draws(seed).normal("w", np.arange(10 * 6)).reshape(10, 6).astype(np.float32)
    values[[2, 7]] += 1000
    total, _ = Krum(attackers=0.2, select=select).fold(iter([block(values)]), {})
    got = np.concatenate([total.dense["a"].reshape(-1), total.dense["b"].reshape(-1)])
    np.testing.assert_allclose(got, plainly(values.astype(np.float64), 2, chosen), rtol=1e-5, atol=1e-6)


def test_each_row_is_chosen_among_those_who_touched_it() -> None:
    # Rows 1 and 2 of two columns: four clients touch the first, three the second, and client 3 lies about the first.
    ids = [[1, 2], [1, 2], [1, 2], [1]]
    said = np.array([[0, 0], [5, 5], [1, 0], [6, 5], [2, 0], [90, 90], [500, 500]], dtype=np.float32)
    rows = Rows(np.cumsum([0, *map(len, ids)]), np.concatenate([np.array(each) for each in ids]), said)
    total, _ = Krum().fold(iter([Updates(np.ones(4), rows={"item": rows}, clients=np.arange(4))]), {})
    assert total.rows["item"].row_ids.tolist() == [1, 2]
    assert total.rows["item"].row_deltas.tolist() == [[1, 0], [5, 5]]
    assert total.rows["item"].row_weights is not None
    assert total.rows["item"].row_weights.tolist() == [4, 3]


def test_a_negative_number_cannot_be_chosen() -> None:
    with pytest.raises(RecipeError, match=r"aggregator\.select must be at least 0"):
        Krum(select=-1)
