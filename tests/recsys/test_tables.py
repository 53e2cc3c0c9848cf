"""CloudTables against numpy: what is fetched, what a step does, what is refused, and what a snapshot holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.checkpoint import read_checkpoint, write_checkpoint
from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, RecipeError, UpdateError
from fedtower.core.plan import RowSettings
from fedtower.core.testing.promises import Untouched, assert_same_bits
from fedtower.plugins.models.dssm.model import ItemTower
from fedtower.recsys.models import CloudTower, Declared, SharedTower, Table
from fedtower.recsys.processes import Processes
from fedtower.recsys.tables import CloudTables, RowOutOfRange
from fedtower.recsys.tables.cloud import drawn

DRAWS = Draws(2)
ROWS, DIM, FEATURES = 20, 8, 3
ADAGRAD = RowSettings(optimizer="rowwise_adagrad", lr=0.1, tower_lr=0.01)
SGD = replace(ADAGRAD, optimizer="sgd")

Deltas = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float32]]]


class SideBySide(CloudTower):
    """The rows of all tables as they are: what goes back are their own gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        return rows


def features(ids: Any) -> Any:
    return DRAWS.normal("features", ids[:, None], np.arange(FEATURES)[None]).astype(np.float32)


def declared(tower: CloudTower, *tables: Table) -> Declared:
    """A model's cloud part; nothing is on the device."""
    return Declared(shared=SharedTower(), tables=tables, cloud=tower)


def plain(settings: RowSettings = ADAGRAD, seed: int = 1, **changes: Any) -> CloudTables:
    """Two tables side by side, with no tower to speak of."""
    tables = (Table("item", ROWS, DIM, 0.5), Table("extra", ROWS, 4, 0.5))
    generator = torch.Generator().manual_seed(seed)
    return CloudTables(declared(SideBySide(DIM + 4), *tables), features, settings, generator, **changes)


def towered(settings: RowSettings = ADAGRAD, seed: int = 1) -> CloudTables:
    """dssm's: a table, a bias, and a tower with a hidden layer."""
    generator = torch.Generator().manual_seed(seed)
    tower = ItemTower(DIM, FEATURES, 6, generator)
    tables = (Table("item", ROWS, DIM, 0.5), Table("item_bias", ROWS, 4, 0.1))
    return CloudTables(declared(tower, *tables), features, settings, generator)


def ids_of(step: int, count: int = 7) -> NDArray[np.int64]:
    return np.sort(DRAWS.permutation(ROWS, "ids", step)[:count])


def deltas_of(step: int, width: int, count: int = 7) -> Deltas:
    ids = ids_of(step, count)
    return {"item": (ids, DRAWS.normal("delta", step, ids[:, None], np.arange(width)[None]).astype(np.float32))}


def weights(tables: CloudTables, name: str) -> NDArray[np.float32]:
    return np.asarray(tables.snapshot()[f"table/{name}"])


def test_what_is_fetched_is_what_the_tables_hold() -> None:
    tables = plain()
    ids = np.array([3, 0, 19, 3], dtype=np.int64)
    rows = tables.fetch("item", ids)
    assert rows.dtype == np.float32
    assert_same_bits(rows, np.concatenate([weights(tables, "item")[ids], weights(tables, "extra")[ids]], axis=1))


def test_through_a_tower_comes_what_the_tower_says() -> None:
    tables, ids = towered(), np.array([3, 0, 19], dtype=np.int64)
    held = np.concatenate([weights(tables, "item")[ids], weights(tables, "item_bias")[ids]], axis=1)
    with torch.no_grad():
        expected = tables.tower(torch.from_numpy(held), torch.from_numpy(features(ids)))
    np.testing.assert_allclose(tables.fetch("item", ids), expected.numpy(), rtol=1e-6)


def test_nothing_asked_for_is_nothing_fetched() -> None:
    assert plain().fetch("item", np.zeros(0, dtype=np.int64)).shape == (0, DIM + 4)


def test_tables_begin_as_drawn_from_the_generator() -> None:
    large = CloudTables(
        declared(SideBySide(12), Table("item", 20_000, 8, 0.05), Table("item_bias", 20_000, 4, 0.0)),
        features,
        ADAGRAD,
        torch.Generator().manual_seed(3),
    )
    drawn = weights(large, "item")
    assert abs(float(drawn.mean())) < 0.001
    assert float(drawn.std()) == pytest.approx(0.05, rel=0.02)
    assert not weights(large, "item_bias").any()
    assert_same_bits(weights(plain(seed=4), "item"), weights(plain(seed=4), "item"))
    assert (weights(plain(seed=4), "item") != weights(plain(seed=5), "item")).all()


@pytest.mark.parametrize("num_rows", [1, 5, 64, 65, 127, 128, 129, 1000])
def test_values_drawn_some_rows_at_a_time_are_those_drawn_at_once(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtower.recsys.tables.cloud._DRAWN", 64)
    parts = list(drawn(Table("item", num_rows, 4, 0.3), torch.Generator().manual_seed(5)))
    whole = torch.empty(num_rows, 4).normal_(0.0, 0.3, generator=torch.Generator().manual_seed(5))
    assert [start for start, _ in parts] == np.cumsum([0, *(len(values) for _, values in parts)])[:-1].tolist()
    assert torch.equal(torch.cat([values for _, values in parts]), whole)
    assert max(len(values) for _, values in parts) < 2 * 64 + 1


@pytest.mark.parametrize("wrong", [-1, ROWS, 2**40])
def test_a_row_that_is_not_there_is_refused_and_nothing_moves(wrong: int) -> None:
    tables = plain()
    before = tables.snapshot()
    ids = np.array([2, wrong], dtype=np.int64)
    said = rf"row ids of 'item' go from 0 to 19, but {wrong} was asked for"
    with pytest.raises(RowOutOfRange, match=said):
        tables.fetch("item", ids)
    with pytest.raises(RowOutOfRange, match=said):
        tables.apply({"item": (ids, np.ones((2, DIM + 4), np.float32))}, 1.0)
    assert_same_bits(tables.snapshot(), before)
    assert issubclass(RowOutOfRange, UpdateError)


def test_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(RowOutOfRange, match="no rows of 'itme' here"):
        plain().fetch("itme", np.array([1]))


def rowwise_adagrad(weight: Any, moment: Any, gradient: Any, lr: float, eps: float) -> None:
    """One step by hand: a row's squared gradients are averaged over its columns."""
    moment += np.square(gradient).mean(axis=1)
    weight -= lr * gradient / (np.sqrt(moment)[:, None] + eps)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_steps_are_those_of_the_optimiser_by_hand(optimizer: Any) -> None:
    tables = plain(replace(ADAGRAD, optimizer=optimizer))
    expected = {name: weights(tables, name).astype(np.float64) for name in ("item", "extra")}
    moments = {name: np.zeros(ROWS) for name in expected}
    for step, lr_scale in enumerate([1.0, 1.0, 0.5, 2.0, 0.1, 1.0]):
        deltas = deltas_of(step, DIM + 4)
        tables.apply(deltas, lr_scale)
        ids, delta = deltas["item"]
        for name, columns in (("item", slice(0, DIM)), ("extra", slice(DIM, None))):
            weight, moment = expected[name][ids], moments[name][ids]
            gradient = -delta[:, columns].astype(np.float64)
            if optimizer == "sgd":
                weight -= 0.1 * lr_scale * gradient
            else:
                rowwise_adagrad(weight, moment, gradient, 0.1 * lr_scale, ADAGRAD.eps)
            expected[name][ids], moments[name][ids] = weight, moment
        for name, weight in expected.items():
            np.testing.assert_allclose(weights(tables, name), weight, atol=1e-6)
    assert tables.generation == 6


def test_a_delta_is_downhill() -> None:
    tables = plain(SGD)
    before = weights(tables, "item").copy()
    tables.apply({"item": (np.array([4]), np.ones((1, DIM + 4), np.float32))}, 1.0)
    np.testing.assert_allclose(weights(tables, "item")[4] - before[4], 0.1, atol=1e-6)


def test_rows_that_nobody_touched_stay() -> None:
    tables = plain()
    before = weights(tables, "item").copy()
    tables.apply(deltas_of(0, DIM + 4), 1.0)
    moved = (weights(tables, "item") != before).any(axis=1)
    assert np.flatnonzero(moved).tolist() == ids_of(0).tolist()


def test_learning_rates_of_its_own_win_over_the_settings() -> None:
    tables = plain(SGD, row_lr=0.7)
    before = weights(tables, "item").copy()
    tables.apply({"item": (np.array([4]), np.ones((1, DIM + 4), np.float32))}, 1.0)
    np.testing.assert_allclose(weights(tables, "item")[4] - before[4], 0.7, atol=1e-6)


@pytest.mark.parametrize("deltas", [{}, {"item": (np.zeros(0, np.int64), np.zeros((0, 9), np.float32))}])
def test_a_step_without_deltas_moves_no_table(deltas: Deltas) -> None:
    tables = towered()
    tables.apply(deltas_of(0, DIM + 1), 1.0)
    before = tables.snapshot()
    tables.apply(deltas, 1.0)
    after = tables.snapshot()
    assert after.pop("generation") == before.pop("generation") + 1
    assert_same_bits(
        {name: after[name] for name in after if "adam" not in name and "tower" not in name},
        {name: before[name] for name in before if "adam" not in name and "tower" not in name},
    )


def test_the_tower_is_stepped_as_by_direct_autograd_and_adam() -> None:
    # Minus the delta is the gradient of the row: the loss sum(rows * -delta) has exactly that one.
    tables = towered(SGD)
    twin = ItemTower(DIM, FEATURES, 6, torch.Generator().manual_seed(1))
    item = torch.from_numpy(weights(tables, "item").copy()).requires_grad_()
    bias = torch.from_numpy(weights(tables, "item_bias").copy()).requires_grad_()
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    sgd = torch.optim.SGD([item, bias], lr=0.1)
    for step, lr_scale in enumerate([1.0, 0.5, 2.0, 1.0]):
        deltas = deltas_of(step, DIM + 1)
        ids, delta = deltas["item"]
        adam.param_groups[0]["lr"], sgd.param_groups[0]["lr"] = 0.01 * lr_scale, 0.1 * lr_scale
        adam.zero_grad()
        sgd.zero_grad()
        rows = twin(torch.cat([item[ids], bias[ids]], dim=1), torch.from_numpy(features(ids)))
        torch.autograd.backward((rows * torch.from_numpy(-delta)).sum())
        adam.step()
        sgd.step()
        tables.apply(deltas, lr_scale)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(tables.tower.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights(tables, "item"), item.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(weights(tables, "item_bias"), bias.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("settings", [ADAGRAD, SGD], ids=["adagrad", "sgd"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_restored_one_continues_bit_for_bit(settings: RowSettings, before: int, tmp_path: Any) -> None:
    straight, stopped = towered(settings), towered(settings)
    for step in range(before):
        straight.apply(deltas_of(step, DIM + 1), 1.0 - 0.1 * step)
        stopped.apply(deltas_of(step, DIM + 1), 1.0 - 0.1 * step)
    write_checkpoint(tmp_path, 1, stopped.snapshot(), keep=1)
    resumed = towered(settings, seed=99)
    for step in range(2):  # whatever it did before it was restored is forgotten
        resumed.apply(deltas_of(step, DIM + 1), 3.0)
    resumed.restore(read_checkpoint(tmp_path, 1))
    assert_same_bits(resumed.snapshot(), straight.snapshot())
    for step in range(before, 6):
        for tables in (straight, resumed):
            tables.apply(deltas_of(step, DIM + 1), 1.0 - 0.1 * step)
        assert_same_bits(resumed.snapshot(), straight.snapshot())
    assert_same_bits(resumed.fetch("item", np.arange(ROWS)), straight.fetch("item", np.arange(ROWS)))


def test_a_snapshot_is_a_copy() -> None:
    tables = towered()
    tables.apply(deltas_of(0, DIM + 1), 1.0)
    with Untouched(tables.snapshot()) as _, Untouched(snapshot := tables.snapshot()):
        tables.apply(deltas_of(1, DIM + 1), 1.0)
        tables.restore(snapshot)
        tables.apply(deltas_of(2, DIM + 1), 1.0)


def test_a_snapshot_of_another_shape_is_refused() -> None:
    small = plain().snapshot()
    small["table/item"] = small["table/item"][:-1]
    with pytest.raises(CheckpointError, match=r"'table/item' has shape \(19, 8\), but this model has \(20, 8\)"):
        plain().restore(small)


@pytest.mark.parametrize("name", ["generation", "table/extra"])
def test_a_snapshot_of_another_model_is_refused(name: str) -> None:
    lacking = plain().snapshot()
    del lacking[name]
    with pytest.raises(CheckpointError, match=f"holds no '{name}': it belongs to another model"):
        plain().restore(lacking)


def test_the_size_is_that_of_all_tables() -> None:
    assert plain().num_bytes == ROWS * (DIM + 4) * 4


def test_several_processes_keep_their_tables_on_cpus() -> None:
    with pytest.raises(RecipeError, match='device = "cuda:0": tables are spread over processes on their CPUs'):
        plain(device="cuda:0", processes=Processes(0, 2))


def test_importing_the_tables_warns_of_nothing_and_leaves_logging_alone() -> None:
    program = (
        "import logging, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import fedtower.recsys.tables\n"
        "    from fedtower.core.plan import RowSettings\n"
        "print([str(each.message) for each in caught], logging.root.handlers, logging.root.level)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[] [] 30\n", "")
