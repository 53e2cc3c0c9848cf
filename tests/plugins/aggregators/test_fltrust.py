"""FLTrust: by hand, and what those get who point elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.errors import UpdateError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.fltrust import FLTrust

ROOT = Updates(np.ones(1), {"w": np.array([[2, 0]], dtype=np.float32)})


def folded(said: list[list[float]], root: Updates = ROOT) -> Updates:
    block = Updates(
        np.arange(1.0, len(said) + 1), {"w": np.array(said, dtype=np.float32)}, clients=np.arange(len(said))
    )
    return FLTrust().rooted(root).fold(iter([block]), {})[0]


def test_three_clients_by_hand() -> None:
    # Along the root, at 60 degrees to it and far too long, and against it: trusted by 1, 1/2 and not at all.
    total = folded([[4, 0], [500, 500 * np.sqrt(3)], [-7, 0]])
    np.testing.assert_allclose(total.dense["w"][0], [(2 + 0.5 * 1) / 1.5, 0.5 * np.sqrt(3) / 1.5], rtol=1e-6)
    np.testing.assert_allclose(total.weights, [1.5])


def test_nobody_is_longer_than_the_root() -> None:
    for said in ([[1e6, 1.0]], [[1e-6, 1e-7]], [[3.0, 3.0], [1e5, -1e5]]):
        assert np.linalg.norm(folded(said).dense["w"][0]) <= 2 * (1 + 1e-6)


def test_if_nobody_is_trusted_nothing_moves() -> None:
    total = folded([[-1, 0], [-3, 1], [0, 5]])
    assert total.dense["w"].tolist() == [[0, 0]]
    assert total.weights.tolist() == [1]
    assert folded([[0, 0]]).dense["w"].tolist() == [[0, 0]], "one that did not move points nowhere"
    still = Updates(np.ones(1), {"w": np.zeros((1, 2), dtype=np.float32)})
    assert folded([[1, 0]], still).dense["w"].tolist() == [[0, 0]], "and neither does such a root"


def test_rows_are_compared_where_both_touched_them() -> None:
    def rows(offsets: list[int], ids: list[int], deltas: list[float]) -> dict[str, Rows]:
        return {"item": Rows(np.array(offsets), np.array(ids), np.array(deltas, dtype=np.float32)[:, None])}

    # The root moves rows 3 and 5; the first client row 5 with it, the second row 3 against it, the third row 8.
    root = Updates(np.ones(1), rows=rows([0, 2], [3, 5], [3, 4]))
    block = Updates(np.ones(3), rows=rows([0, 2, 3, 4], [5, 8, 3, 8], [3, 4, -1, 9]))
    total, _ = FLTrust().rooted(root).fold(iter([block]), {})
    item = total.rows["item"]
    assert item.row_ids.tolist() == [5, 8], "only the first is trusted: by 3 * 4 / 25"
    np.testing.assert_allclose(item.row_deltas, [[3], [4]], rtol=1e-6)  # both are 5 long
    np.testing.assert_allclose(total.weights, [12 / 25], rtol=1e-6)


def test_without_the_server_s_own_update_nothing_is_folded() -> None:
    with pytest.raises(UpdateError, match="compares updates with one of the server's own, and was given none"):
        FLTrust().fold(iter([ROOT]), {})
