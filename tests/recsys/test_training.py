"""Training: both modes begin with the same bits, go on from a snapshot, and do not care how clients are visited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtower.core.checkpoint import read_attachments, read_checkpoint, write_checkpoint
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.testing.states import everything
from fedtower.recsys.training import Federated, Setting, Training, assemble

SettingOf = Callable[..., Setting]

MODES: dict[str, Callable[[Setting], Training]] = {"simulated": Federated, "standalone": Standalone}


def train(training: Training, rounds: int) -> None:
    for report, _ in zip(training.rounds(), range(rounds), strict=False):
        if report.round == rounds:
            return


def part_of(snapshot: Mapping[str, Any], *groups: str) -> dict[str, Any]:
    return {name: value for name, value in snapshot.items() if name.startswith(groups)}


def test_both_modes_begin_with_the_same_bits(setting_of: SettingOf) -> None:
    snapshots = [everything(make(setting_of({"mode": mode}))) for mode, make in MODES.items()]
    ours, theirs = (
        part_of(snapshot, "parameters/", "tables/table", "tables/tower", "clients/") for snapshot in snapshots
    )
    assert {name.split("/")[0] for name in ours} == {"parameters", "tables", "clients"}
    assert_same_bits(ours, theirs)


def test_another_seed_begins_with_other_bits(setting_of: SettingOf) -> None:
    one, other = (Federated(setting_of({"seed": seed})).snapshot() for seed in (1, 2))
    assert (one["tables/table/item"] != other["tables/table/item"]).all()
    assert (one["parameters/first.weight"] != other["parameters/first.weight"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_training_again_gives_the_same_bits(setting_of: SettingOf, mode: str) -> None:
    one, other = (MODES[mode](setting_of({"mode": mode})) for _ in range(2))
    torch.manual_seed(1)
    train(one, 2)
    torch.manual_seed(2)  # nothing may look at the global generator
    train(other, 2)
    assert_same_bits(everything(one), everything(other))


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_restored_training_goes_on_bit_for_bit(setting_of: SettingOf, mode: str, before: int, tmp_path: Path) -> None:
    changes = {"mode": mode, "server.lr": 0.01, "standalone.decay": "linear"}
    straight, stopped, resumed = (MODES[mode](setting_of(changes)) for _ in range(3))
    train(straight, 4)
    if before:
        train(stopped, before)
    write_checkpoint(tmp_path, before, stopped.snapshot(), keep=1, attachments=stopped.attachments())
    train(resumed, 2)  # what it did before it was restored is forgotten
    resumed.restore(read_checkpoint(tmp_path, before), read_attachments(tmp_path, before))
    assert_same_bits(everything(resumed), everything(stopped))
    train(resumed, 4)
    assert_same_bits(everything(resumed), everything(straight))
    written = len(everything(straight)["clients/user_vector.clients"])
    assert 0 < written <= 60


@pytest.mark.parametrize("mode", MODES)
def test_a_snapshot_holds_all_that_moves(setting_of: SettingOf, mode: str) -> None:
    training = MODES[mode](setting_of({"mode": mode}))
    train(training, 1)
    before = {name: np.array(value) for name, value in everything(training).items()}
    train(training, 2)
    after = everything(training)
    assert sorted(after) == sorted(before)
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    # User features may leave a group without a client; everything else moves in a round.
    assert {name for name in before if name not in moved} <= {"clients/user_vector.clients"}


def test_the_same_bits_whatever_the_width_of_a_block(setting_of: SettingOf) -> None:
    snapshots = []
    for block in (1, 5, 32):
        training = Federated(setting_of({"transport.block": block, "rows.average": "touched"}, epochs=1))
        train(training, 2)
        snapshots.append(everything(training))
    assert_same_bits(snapshots[0], snapshots[1])
    assert_same_bits(snapshots[0], snapshots[2])


def test_bytes_do_not_depend_on_the_width_of_a_block(setting_of: SettingOf) -> None:
    told = []
    for block in (1, 32):
        reports = Federated(setting_of({"transport.block": block}, epochs=1)).rounds()
        told.append([replace(next(reports), seconds=0.0) for _ in range(2)])
    assert told[0] == told[1]


def test_frozen_rows_leave_tables_and_cloud_tower_as_they_were(setting_of: SettingOf) -> None:
    training = Federated(setting_of({"rows.train": "frozen"}))
    before = part_of(everything(training), "tables/")
    train(training, 2)
    assert_same_bits(part_of(everything(training), "tables/"), before)


def test_what_clients_kept_in_a_checkpoint_of_before_is_read(setting_of: SettingOf) -> None:
    whole, resumed = (Federated(setting_of()) for _ in range(2))
    train(whole, 2)
    resumed.restore(everything(whole))  # there it lay among the arrays
    assert_same_bits(everything(resumed), everything(whole))


def test_a_snapshot_of_a_run_without_a_users_vector_is_refused(setting_of: SettingOf) -> None:
    without = Federated(setting_of({"model.user_vector": False}))
    with pytest.raises(CheckpointError, match=r"no client state 'user_vector'.*resume with the recipe"):
        Federated(setting_of()).restore(without.snapshot())


def test_a_device_that_is_not_there_is_refused_with_what_there_is(setting_of: SettingOf) -> None:
    for device in ("cuda:63", "tpu"):
        with pytest.raises(RecipeError, match=rf'device = "{device}" is not there.*torch .* sees .*fedtower doctor'):
            assemble(setting_of({"device": device}))


def test_torch_gets_as_many_threads_as_the_recipe_says(setting_of: SettingOf) -> None:
    before = torch.get_num_threads()
    try:
        assemble(setting_of({"threads": 2}))
        assert torch.get_num_threads() == 2
        assemble(setting_of())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_recipe_s_bounds_are_checked(setting_of: SettingOf) -> None:
    training = Federated(setting_of({"checks.max_norm": 1e-9, "transforms": []}))
    before = everything(training)
    report = next(training.rounds())
    assert (report.clients, set(report.refused)) == (0, {"norm"})
    after = everything(training)
    assert int(after.pop("round")) == 1
    before.pop("round")
    assert_same_bits(after, before)
