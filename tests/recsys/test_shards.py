"""Shards hold what the data held, for all clients together and for one by itself; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core.cli import call
from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.runtime import Work
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.datasets.mnist.dataset import MNIST
from fedtower.plugins.datasets.mnist.example import write as write_digits
from fedtower.plugins.datasets.shards.dataset import Shards
from fedtower.plugins.datasets.synthetic import Synthetic
from fedtower.recsys.batches import SequenceData
from fedtower.recsys.bundle import write_tensors
from fedtower.recsys.examples import ExampleData, ExampleSet
from fedtower.recsys.shards import ShardedExamples, ShardedHistories, opened, read_shard, write_shards
from fedtower.recsys.splits import Split, make_split

DRAWS = Draws(11)
LOCAL = LocalSettings(steps=2, batch_size=8, negatives=5, history_length=6)


def quiet(*told: object) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def histories() -> tuple[Any, Split]:
    data = Synthetic(users=12, items=210, mean_events=25).load(draws=DRAWS, progress=quiet)
    return data, make_split("random", data, validation=True, draws=DRAWS)


@pytest.fixture(scope="module")
def folder(histories: tuple[Any, Split], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards") / "all"
    write_shards(place, *histories, np.arange(12), quiet)
    return place


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ExampleSet:
    settings = write_digits(tmp_path_factory.mktemp("digits"))
    return MNIST(**{**settings, "path": Path(settings["path"])}).load(draws=DRAWS, progress=quiet)


def same_work(one: Work, other: Work) -> None:
    assert_same_bits(one.clients, other.clients)
    assert_same_bits(one.steps, other.steps)
    for name, value in one.inputs.items():
        assert_same_bits(np.asarray(value), np.asarray(other.inputs[name]))
    for name, value in one.slots.items():
        assert_same_bits(np.asarray(value), np.asarray(other.slots[name]))
    for name, needed in one.row_ids.items():
        assert_same_bits(needed.ids, other.row_ids[name].ids)


def test_all_shards_give_the_work_of_the_data(folder: Path, histories: tuple[Any, Split]) -> None:
    data, split = histories
    loaded = Shards(folder).load(draws=DRAWS, progress=quiet)
    assert isinstance(loaded, ShardedHistories)
    given = make_split("given", loaded, validation=True, draws=Draws(99))
    clients = np.array([2, 5, 11])
    plan = Plan(3, {}, LOCAL)
    same_work(
        SequenceData(data, split, DRAWS).work(plan, clients), SequenceData(loaded, given, DRAWS).work(plan, clients)
    )
    assert_same_bits(loaded.item_features(np.arange(210)), data.item_features(np.arange(210)))
    assert [loaded.user_name(client) for client in range(12)] == [data.user_name(client) for client in range(12)]
    assert loaded.client_index(data.user_name(7)) == 7
    assert loaded.item_name(4) == data.item_name(4)


@pytest.mark.parametrize("negatives_from", ["untouched", "untrained"])
def test_a_device_that_has_one_shard_gets_the_work_of_its_client(
    folder: Path, histories: tuple[Any, Split], negatives_from: Any
) -> None:
    data, split = histories
    shard = read_shard(folder / "client-000005.safetensors")
    alone = opened(None, [shard])
    assert isinstance(alone, ShardedHistories)
    given = make_split("given", alone, validation=True, draws=DRAWS)
    one, plan = np.array([5]), Plan(3, {}, replace(LOCAL, negatives=400, negatives_from=negatives_from))
    work = SequenceData(alone, given, DRAWS).work(plan, one)
    same_work(SequenceData(data, split, DRAWS).work(plan, one), work)
    held_out = alone.events(one).items[given.parts(alone.events(one)).role != 0]
    assert np.isin(held_out, work.row_ids["item"].ids).all() == (negatives_from == "untrained")
    with pytest.raises(IndexError, match="client 4 here: these are the shards of client 5"):
        alone.events(np.array([4]))


def test_labelled_examples_come_back_and_every_held_out_one_is_somebodys(digits: ExampleSet, tmp_path: Path) -> None:
    write_shards(tmp_path / "all", digits, None, np.arange(12), quiet)
    loaded = Shards(tmp_path / "all").load(draws=DRAWS, progress=quiet)
    assert isinstance(loaded, ShardedExamples)
    plan, clients = Plan(2, {}, replace(LOCAL, loss="cross_entropy")), np.array([1, 8])
    same_work(ExampleData(digits, DRAWS).work(plan, clients), ExampleData(loaded, DRAWS).work(plan, clients))
    for role in ("validation", "test"):
        assert_same_bits(loaded.held_out(role).labels, digits.held_out(role).labels)
        assert_same_bits(loaded.held_out(role).dense, digits.held_out(role).dense)
    alone = opened(None, [read_shard(tmp_path / "all" / "client-000008.safetensors")])
    assert isinstance(alone, ShardedExamples)
    one = np.array([8])
    same_work(ExampleData(digits, DRAWS).work(plan, one), ExampleData(alone, DRAWS).work(plan, one))
    assert (alone.dense_shape, alone.num_classes) == (digits.dense_shape, digits.num_classes)


def test_a_damaged_shard_is_refused_whatever_the_damage(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "client-000003.safetensors").read_bytes()
    draws, path, refused = np.random.default_rng(5), tmp_path / "client-000003.safetensors", 0
    for _ in range(300):
        damaged = bytearray(whole[: draws.integers(len(whole) // 2, len(whole) + 1)])
        for at in draws.integers(0, len(damaged), 4):
            damaged[at] = draws.integers(256)
        path.write_bytes(damaged)
        with suppress(DataError):
            read_shard(path)
            continue
        refused += 1
    assert refused > 200  # a rating or a time may change and still be one


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("items", np.array([1, 1]), "twice"),
        ("items", np.array([1, 210]), "from 0 to 209"),
        ("items", np.array([-1, 3]), "from 0 to 209"),
        ("role", np.array([0, 3], dtype=np.uint8), "from 0 to 2"),
        ("times", np.array([5, 4]), "order of their times"),
        ("ratings", np.array([1.0, 2.0]), "float32"),
        ("user", np.zeros((1, 2), np.float32), "'user'"),
    ],
)
def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path, name: str, value: Any, said: str) -> None:
    def write(arrays: Mapping[str, Any]) -> Path:
        about = np.frombuffer(json.dumps({"format": 1, **shard.about}).encode(), dtype=np.uint8)
        write_tensors(tmp_path / "one.safetensors", {**arrays, "about": about})
        return tmp_path / "one.safetensors"

    two = {"items": np.array([1, 2]), "times": np.array([1, 2]), "ratings": np.ones(2, np.float32)}
    shard = read_shard(folder / "client-000003.safetensors")
    arrays = {**shard.arrays, **two, "role": np.zeros(2, np.uint8)}
    read_shard(write(arrays))
    with pytest.raises(DataError, match=said):
        read_shard(write({**arrays, name: value}))


def test_shards_of_two_folders_do_not_mix(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in folder.iterdir():
        (mixed / path.name).write_bytes(path.read_bytes())
    (mixed / "client-000002.safetensors").write_bytes((folder / "client-000003.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"is of client 3 .* should be of client 2"):
        Shards(mixed).load(draws=DRAWS, progress=quiet)
    (mixed / "population.safetensors").unlink()
    with pytest.raises(DataError, match=r"population\.safetensors"):
        Shards(mixed).load(draws=DRAWS, progress=quiet)


def test_roles_are_given_only_where_they_are() -> None:
    data = Synthetic(users=12, items=210, mean_events=25).load(draws=DRAWS, progress=quiet)
    with pytest.raises(DataError, match="split = 'given' needs data whose events came with their roles"):
        make_split("given", data, validation=True, draws=DRAWS)


def test_the_command_writes_a_folder_once_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, small = tmp_path / "shards", ["-o", "data.users=30", "-o", "data.items=220", "-o", "data.mean_events=25"]
    asked = ["data", "shard", "dssm-synthetic", str(place), "-n", "4", *small]
    assert call(asked) == 0
    said = capsys.readouterr().out
    assert "4 clients in" in said
    assert f"-o data.name=shards -o data.path={place}" in said
    assert sorted(path.name for path in place.iterdir()) == [
        *[f"client-{number:06d}.safetensors" for number in range(4)],
        "population.safetensors",
    ]
    recipe = load_recipe("dssm-synthetic", ["data.name=shards", f"data.path={place}"], discover())
    assert recipe.data.part.settings["path"] == str(place)
    assert call(asked) == DataError.exit_code
    assert "is not empty" in " ".join(capsys.readouterr().err.split())
    assert call(["data", "shard", "dssm-synthetic", str(tmp_path / "more"), "-n", "31", *small]) != 0
    assert "more than the 30 clients" in " ".join(capsys.readouterr().err.split())
