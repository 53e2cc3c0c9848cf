"""A held-out item that reaches training is caught, whichever way it came, and the run stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core.cli import call
from fedtower.core.draws import Draws
from fedtower.core.errors import LeakError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds
from fedtower.recsys import batches
from fedtower.recsys.batches import SequenceData, refuse_held_out
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.history import TEST, TRAIN, VALIDATION, Events, SplitParts

PopulationOf = Callable[..., EventTable]

DRAWS = Draws(1)
LOCAL = LocalSettings(epochs=1, batch_size=4, negatives=500, history_length=3)
UNTRAINED = replace(LOCAL, negatives_from="untrained")


@dataclass(frozen=True)
class Careless:
    """A split that holds the last event out and does not look whether its item is there twice."""

    def parts(self, events: Events) -> SplitParts:
        role = np.zeros(len(events.items), dtype=np.int8)
        role[events.offsets[1:] - 1] = TEST
        return SplitParts(role)


@dataclass(frozen=True)
class WithRepeats:
    """A population that gives a client an item twice, as no data set may."""

    table: EventTable
    histories: tuple[tuple[int, ...], ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def events(self, clients: Any) -> Events:
        items = np.array([item for client in clients for item in self.histories[client]], dtype=np.int64)
        offsets = np.cumsum([0, *(len(self.histories[client]) for client in clients)])
        return Events(clients, offsets, items, np.arange(len(items)), np.ones(len(items), np.float32))


def work(population_of: PopulationOf, *items: int, local: LocalSettings = LOCAL) -> Any:
    """A visit of one client with these events, the last of them held out."""
    population: Any = WithRepeats(population_of([[0]], 60), (items,))
    split: Any = Careless()
    return SequenceData(population, split, DRAWS).work(Plan(1, {}, local), np.array([0]))


def test_without_a_leak_nothing_is_caught(population_of: PopulationOf) -> None:
    assert work(population_of, 1, 2, 3, 4, 9).steps.tolist() == [1]


def test_a_held_out_item_in_the_history_is_caught(population_of: PopulationOf) -> None:
    with pytest.raises(LeakError, match="item row 9 is held out for client 0"):
        work(population_of, 9, 2, 3, 4, 9)  # the first event is never a target


def test_a_held_out_item_as_a_target_is_caught(population_of: PopulationOf) -> None:
    with pytest.raises(LeakError, match="item row 9 is held out for client 0"):
        work(population_of, 1, 2, 3, 9, 9)  # the last training event is in nobody's history


def test_a_held_out_item_among_the_negatives_is_caught(
    population_of: PopulationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all_items(events: Events, num_items: int, steps: int, count: int, draws: Draws, round: int) -> Any:
        """Negatives by somebody who forgot what the client touched."""
        return draws.integers(num_items, "negatives", np.arange(steps * count).reshape(1, steps, count))

    monkeypatch.setattr(batches, "uniform_negatives", of_all_items)
    with pytest.raises(LeakError, match="as a history item, a target or a negative"):
        work(population_of, 1, 2, 3, 4, 9)


@pytest.mark.parametrize(("local", "left_out"), [(LOCAL, {1, 2, 3, 4, 9}), (UNTRAINED, {1, 2, 3, 4})])
def test_negatives_are_all_items_but_those_touched_or_but_those_trained_on(
    population_of: PopulationOf, local: LocalSettings, left_out: set[int]
) -> None:
    made = work(population_of, 1, 2, 3, 4, 9, local=local)
    drawn = made.row_ids["item"].ids[made.slots["negatives"]]
    assert set(drawn.ravel().tolist()) == set(range(60)) - left_out
    assert set(made.row_ids["item"].ids[made.slots["history"]].ravel().tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("items", [(9, 2, 3, 4, 9), (1, 2, 3, 9, 9)], ids=["history", "target"])
def test_where_negatives_may_be_held_out_histories_and_targets_may_not(
    population_of: PopulationOf, items: tuple[int, ...]
) -> None:
    with pytest.raises(LeakError, match="item row 9 is held out for client 0"):
        work(population_of, *items, local=UNTRAINED)


def test_a_client_without_training_events_may_be_given_what_is_held_out_for_it(population_of: PopulationOf) -> None:
    def visits(*histories: tuple[int, ...]) -> Any:
        population: Any = WithRepeats(population_of([[0]] * len(histories), 12), histories)
        split: Any = Careless()
        return SequenceData(population, split, DRAWS).work(Plan(1, {}, UNTRAINED), np.arange(len(histories)))

    made = visits((7,), (1, 2, 3, 9))
    assert made.examples.tolist() == [0, 2]
    assert made.row_ids["item"].of(0).tolist() == list(range(12))
    assert made.row_ids["item"].of(1).tolist() == list(range(12))
    assert visits((7,)).row_ids["item"].ids.tolist() == list(range(12))
    with pytest.raises(LeakError, match="item row 9 is held out for client 1"):
        visits((7,), (9, 2, 3, 9))


@pytest.mark.parametrize("role", [TEST, VALIDATION])
def test_only_the_clients_own_held_out_items_count(role: int) -> None:
    items = np.array([5, 6, 7, 8], dtype=np.int64)
    events = Events(np.array([30, 31]), np.array([0, 2, 4]), items, items, np.ones(4, np.float32))
    roles = np.array([TRAIN, role, TRAIN, role], dtype=np.int8)
    refuse_held_out(events, roles, RowIds(np.array([0, 3, 5]), np.array([5, 7, 8, 6, 7])))
    with pytest.raises(LeakError, match="item row 8 is held out for client 31"):
        refuse_held_out(events, roles, RowIds(np.array([0, 2, 4]), np.array([5, 7, 7, 8])))


def test_row_ids_beyond_every_touched_item_are_no_leak() -> None:
    # Keys of (client, item) must not run into each other: client 1's held-out item 1 is not client 0's item 5.
    events = Events(np.arange(2), np.array([0, 1, 2]), np.array([3, 1]), np.arange(2), np.ones(2, np.float32))
    refuse_held_out(events, np.array([TEST, TEST], dtype=np.int8), RowIds(np.array([0, 2, 3]), np.array([5, 7, 0])))


PLANTED = '''
from dataclasses import dataclass, replace

import numpy as np

from fedtower.core.hooks import hookimpl
from fedtower.plugins.datasets.synthetic import Synthetic, SyntheticPopulation


class Leaky(SyntheticPopulation):
    """The first event of every client is its last one once more."""

    def events(self, clients):
        events = super().events(clients)
        items = events.items.copy()
        items[events.offsets[:-1]] = items[events.offsets[1:] - 1]
        return replace(events, items=items)


@dataclass(frozen=True)
class Planted(Synthetic):
    def load(self, *, draws, progress):
        return Leaky(self, draws)


@hookimpl
def fedtower_register(registry):
    registry.dataset("planted", "fedtower_plugins:Planted", summary="a leak on purpose")
'''


@pytest.mark.parametrize("mode", ["simulated", "standalone"])
def test_a_run_on_data_with_a_planted_leak_stops_with_the_exit_code_for_data(
    run_root: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    (run_root / "fedtower_plugins.py").write_text(PLANTED, "utf-8")
    options = [f"--option={key}={str(value).lower()}" for key, value in small.items()]
    code = call(["run", "dssm-synthetic", *options, "-o", "data.name=planted", "-o", f"mode={mode}"])
    said = capsys.readouterr()
    assert code == 3, said.err
    assert "is held out for client" in " ".join(said.err.split())
    assert "Traceback" not in said.err
    assert not list(run_root.glob("runs/*/checkpoints/*"))
