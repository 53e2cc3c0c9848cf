"""Public data: it is of nobody who is a client, it alone trains the rows, and the towers stand still meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtower
from fedtower.core.checkpoint import read_attachments, read_checkpoint, write_checkpoint
from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.plan import LocalSettings, Plan, PublicSettings, RowSettings
from fedtower.core.runtime import Work
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.examples import ExampleCard, Examples, ExampleTable
from fedtower.recsys.history import TEST, TRAIN
from fedtower.recsys.population import Events, HeldOut
from fedtower.recsys.public import PartOfExamples, PartOfPopulation, set_apart
from fedtower.recsys.public_rows import PublicRows, stream
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import Histories, Labelled, make_task
from fedtower.recsys.testing.examples import CLICKS, cases
from fedtower.recsys.testing.states import everything
from fedtower.recsys.training import Federated, Setting

SettingOf = Callable[..., Setting]

PUBLIC = {"rows.train": "public", "rows.public.share": 0.3, "rows.public.steps": 2}


def histories(setting: Setting) -> tuple[Histories, Histories]:
    """The clients' task, and that of the public data."""
    task = setting.task
    assert isinstance(task, Histories)
    assert task.public is not None
    return task, task.public


def names(task: Histories) -> set[str]:
    return {task.population.user_name(client) for client in range(task.num_clients)}


def tables(training: Federated | Standalone) -> dict[str, Any]:
    return {name: np.array(value) for name, value in training.snapshot().items() if name.startswith("tables/")}


def train(training: Federated | Standalone, rounds: int) -> None:
    list(islice(training.rounds(), rounds))


# Who is set apart


@pytest.mark.parametrize(("share", "count"), [(0.1, 4), (0.5, 20), (0.001, 1), (0.999, 39)])
def test_a_share_is_set_apart_and_everybody_is_on_one_side(share: float, count: int) -> None:
    stay, public = set_apart(40, share, Draws(1))
    assert (len(public), len(stay)) == (count, 40 - count)
    assert sorted([*stay, *public]) == list(range(40))
    assert (np.diff(stay) > 0).all()
    assert (np.diff(public) > 0).all()


def test_the_seed_chooses_who_it_is() -> None:
    one, again, other = (set_apart(1000, 0.1, Draws(seed))[1].tolist() for seed in (1, 1, 2))
    assert one == again != other
    with pytest.raises(DataError, match="two or more"):
        set_apart(1, 0.5, Draws(1))


def test_public_users_are_no_clients_and_no_figure_is_of_them(setting_of: SettingOf) -> None:
    ours, theirs = histories(setting_of(PUBLIC))
    assert (ours.num_clients, theirs.num_clients) == (42, 18)
    assert not names(ours) & names(theirs)
    assert names(ours) | names(theirs) == {f"u{client}" for client in range(60)}
    model = Federated(setting_of(PUBLIC)).learned()
    assert ours.judge(model, "test").users == 42
    assert "42 of the 60 are clients" in ours.card.extra["clients"]


def test_a_part_shows_its_own_clients_as_the_whole_has_them(population_of: Callable[..., EventTable]) -> None:
    whole = population_of([[0, 1], [2], [3, 4, 5], [6]], 8)
    given = HeldOut(np.arange(4), np.array([1, 2, 5, 6]), np.zeros((4, 2), dtype=np.int64))
    part = PartOfPopulation(replace(whole, given=given), np.array([1, 2]))
    events = part.events(np.array([1, 0]))
    assert (events.clients.tolist(), events.lengths.tolist(), events.items.tolist()) == ([1, 0], [3, 1], [3, 4, 5, 2])
    assert part.user_features(np.array([1])).tolist() == [[2, 1]]
    held = part.held_out(np.array([1, 0]))
    assert held is not None
    assert (held.clients.tolist(), held.items.tolist()) == ([1, 0], [5, 2])
    assert (part.user_name(1), part.client_index("2")) == ("2", 1)
    assert (part.item_name(3), part.num_items, part.num_clients) == ("3", 8, 2)
    with pytest.raises(DataError, match=r"'3' is no client of this run.*public\.share"):
        part.client_index("3")
    with pytest.raises(IndexError, match="no client 2"):
        part.events(np.array([2]))


def test_by_time_what_is_public_ends_where_the_clients_training_does(setting_of: SettingOf) -> None:
    newest, oldest = [], []
    for task in histories(setting_of({**PUBLIC, "data.split": "time"})):
        events = task.population.events(np.arange(task.num_clients))
        role = task.split.parts(events).role
        newest.append(events.times[role == TRAIN].max())
        oldest.append(events.times[role != TRAIN].min())
    assert max(newest) < min(oldest)


class Given:
    """A population whose events came with their roles: the first of a client is for the test."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def roles(self, clients: Any) -> Any:
        return np.where(self._whole.events(clients).positions == 0, TEST, TRAIN).astype(np.int8)


def test_roles_that_came_with_the_data_are_kept(setting_of: SettingOf) -> None:
    setting = setting_of({**PUBLIC, "data.split": "leave_one_out"})
    recipe = replace(setting.recipe, data=replace(setting.recipe.data, split="given"))
    whole = Given(histories(setting)[0].population.whole)  # type: ignore[attr-defined]
    task = make_task(whole, recipe, setting.draws)
    assert isinstance(task, Histories)
    for part in (task, task.public):
        assert part is not None
        events = part.population.events(np.array([3, 1]))
        assert (part.split.parts(events).role == TEST).tolist() == (events.positions == 0).tolist()


# What is trained on it


def real_items(work: Work) -> list[set[int]]:
    """The items of each user's history, without its padding, which repeats what is there."""
    return [
        set(work.row_ids["item"].of(user)[work.slots["history"][user].reshape(-1)].tolist())
        for user in range(len(work))
        if work.examples[user]
    ]


def test_the_steps_are_on_the_training_events_of_public_users(setting_of: SettingOf) -> None:
    _, task = histories(setting_of(PUBLIC))
    users = 0
    for work in task.central(1):
        events = task.population.events(work.clients)
        trained = events.items[task.split.parts(events).role == TRAIN]
        for user, items in enumerate(real_items(work)):
            mine = events.items[events.owners == user]
            assert items <= set(mine.tolist()) & set(trained.tolist())
            users += 1
    assert users == 18


@pytest.mark.parametrize("first", [1, 2, 5])
def test_what_a_step_takes_depends_on_its_number_alone(setting_of: SettingOf, first: int) -> None:
    for task in (histories(setting_of({**PUBLIC, "standalone.users_per_batch": 8}))[1], labelled().public):
        assert task is not None
        assert 3 <= task.central_steps <= 4
        straight = list(islice(stream(task, 0), first + 4))[first:]
        for one, other in zip(straight, islice(stream(task, first), 4), strict=True):
            assert_same_bits(dict(one.inputs), dict(other.inputs))
            assert_same_bits(dict(one.slots), dict(other.slots))


def test_rounds_take_one_step_after_another(setting_of: SettingOf, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**PUBLIC, "rows.public.warmup": 1, "standalone.users_per_batch": 8, "rounds": 3}
    setting = setting_of(settings)
    met: list[list[int]] = []
    monkeypatch.setattr(PublicRows, "_step", lambda self, work, parameters, lr_scale: met.append(work.clients.tolist()))
    list(Federated(setting).rounds())
    assert met == [work.clients.tolist() for work in islice(stream(histories(setting)[1], 0), 7)]
    assert sorted(met[0] + met[1] + met[2]) == list(range(18)), "an epoch has everybody once"


def test_a_public_user_and_a_client_of_the_same_number_share_no_draws(setting_of: SettingOf) -> None:
    ours, theirs = histories(setting_of(PUBLIC))
    local = replace(ours.recipe.local, steps=1, epochs=None)
    first = np.array([0], dtype=np.int64)
    works = [task.client_data().work(Plan(1, {}, local), first) for task in (ours, theirs)]
    drawn = [set(work.row_ids["item"].of(0)[work.slots["negatives"][0, 0]].tolist()) for work in works]
    assert len(drawn[0] & drawn[1]) < 10, "of 20 in 200 items"


class OtherClients:
    """A population in which the clients did something else: what another seed's did."""

    def __init__(self, whole: Any, other: Any, clients: set[int]) -> None:
        self._whole, self._other, self._clients = whole, other, clients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def events(self, clients: Any) -> Events:
        each = [
            (self._other if client in self._clients else self._whole).events(np.array([client])) for client in clients
        ]
        offsets = np.concatenate([[0], np.cumsum([len(one.items) for one in each])]).astype(np.int64)
        items, times, ratings = (
            np.concatenate([np.zeros(0, np.int64), *(getattr(one, name) for one in each)])
            for name in ("items", "times", "ratings")
        )
        return Events(clients, offsets, items.astype(np.int64), times.astype(np.int64), ratings.astype(np.float32))


@pytest.mark.parametrize("who", ["public", "device_updates"])
def test_no_event_of_a_client_trains_the_rows(setting_of: SettingOf, registry: Any, who: str) -> None:
    setting = setting_of({**PUBLIC, "rows.train": who, "server.lr": 0.0})  # rows see clients through towers that move
    load = registry.make("dataset", setting.recipe.data.part).load
    whole, other = (load(draws=Draws(seed), progress=print) for seed in (setting.recipe.seed, 7))
    clients = set(set_apart(60, 0.3, setting.draws)[0].tolist())
    task = make_task(OtherClients(whole, other, clients), setting.recipe, setting.draws)
    one, two = Federated(setting), Federated(replace(setting, task=task))
    train(one, 2)
    train(two, 2)
    same = all(np.array_equal(value, tables(two)[name]) for name, value in tables(one).items())
    assert same == (who == "public")


def test_a_step_moves_the_rows_as_central_training_does_and_the_towers_not(setting_of: SettingOf) -> None:
    rates = {"rows.lr": 0.1, "rows.tower_lr": 0.01, "standalone.row_lr": 0.1, "standalone.lr": 0.01, "local.lr": 0.5}
    setting = setting_of({**PUBLIC, **rates, "standalone.users_per_batch": 100, "rows.public.warmup": 1})
    _, public = histories(setting)
    central = Standalone(replace(setting, task=public))
    federated = Federated(setting)
    before = {name: value.copy() for name, value in federated.learned().parameters.items()}
    rows = federated._public
    assert rows is not None
    rows.warm_up(before, 1.0)
    assert_same_bits(dict(federated.learned().parameters), before)
    train(central, 1)
    assert_same_bits(tables(federated), tables(central))
    assert_same_bits(dict(rows.store.snapshot()), _own(central))
    assert rows.store.snapshot()["user_vector.values"].any()


def _own(training: Standalone) -> dict[str, Any]:
    return dict(training._model.store.snapshot())


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_restored_training_goes_on_bit_for_bit(setting_of: SettingOf, before: int, tmp_path: Path) -> None:
    changes = {**PUBLIC, "rows.public.warmup": 1, "standalone.users_per_batch": 8, "server.lr": 0.01}
    straight, stopped, resumed = (Federated(setting_of(changes)) for _ in range(3))
    train(straight, 4)
    if before:
        train(stopped, before)
    write_checkpoint(tmp_path, before, stopped.snapshot(), keep=1, attachments=stopped.attachments())
    train(resumed, 3)  # what it did before it was restored is forgotten
    resumed.restore(read_checkpoint(tmp_path, before), read_attachments(tmp_path, before))
    train(resumed, 4 - before)
    assert_same_bits(everything(resumed), everything(straight))
    assert straight.snapshot()["public/user_vector.values"].any()


def test_a_round_takes_its_steps_and_the_warm_up_comes_before_the_first(setting_of: SettingOf) -> None:
    training = Federated(setting_of({**PUBLIC, "rows.public.warmup": 3, "rounds": 3}))
    told = [int(training.snapshot()["tables/generation"]) for _ in training.rounds()]
    assert told == [5, 7, 9]


def test_a_warm_up_goes_before_rounds_in_which_devices_train_the_rows(setting_of: SettingOf) -> None:
    told = {}
    for train in ("device_updates", "frozen"):
        settings = {"rows.train": train, "rows.public.share": 0.3, "rows.public.warmup": 3, "rounds": 2}
        training = Federated(setting_of(settings))
        told[train] = [int(training.snapshot()["tables/generation"]) for _ in training.rounds()]
    assert told == {"device_updates": [4, 5], "frozen": [3, 3]}


def test_devices_send_no_rows(setting_of: SettingOf) -> None:
    sent = {}
    for train in ("public", "frozen", "device_updates"):
        training = Federated(setting_of({**PUBLIC, "rows.train": train}))
        towers = sum(value.nbytes for value in training.learned().parameters.values())
        report = next(training.rounds())
        sent[train] = (report.bytes_up, report.bytes_down)
    assert sent["public"] == sent["frozen"]
    assert sent["public"][0] == report.clients * (towers + 8) < sent["device_updates"][0]
    assert sent["public"][1] == sent["device_updates"][1]


def test_training_on_public_data_finds_more_than_rows_that_stand_still(setting_of: SettingOf) -> None:
    reached = {}
    for train in ("public", "frozen"):
        settings = {"data.users": 600, "rounds": 40, "local.batch_size": 32, "rows.lr": 0.1, "rows.public.steps": 4}
        training = Federated(setting_of({**PUBLIC, **settings, "model.user_vector": False, "rows.train": train}))
        list(training.rounds())
        reached[train] = training._setting.task.judge(training.learned(), "test").metrics["HR@10"]
    assert reached["public"] > reached["frozen"] + 0.05, reached


# Labelled examples


def labelled(*overrides: str, share: float = 0.4) -> Labelled:
    """Ten silos of four to thirteen clicks each."""
    draws, lengths = Draws(3), np.arange(4, 14)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.arange(offsets[-1], dtype=np.int64)[:, None]
    edges = np.concatenate([[0], np.cumsum(CLICKS.cardinalities)]).astype(np.int64)
    held = Examples(
        np.arange(len(lengths), dtype=np.int64),
        offsets,
        place.astype(np.float32).repeat(3, axis=1),  # an example's number, to know it by
        draws.integers(np.diff(edges)[None, :], "category", place, np.arange(3)[None, :]) + edges[:-1],
        draws.integers(2, "label", place[:, 0]).astype(np.float32),
    )
    card = ExampleCard("small", 10, len(place), 10, 10)
    recipe = fedtower.load_recipe("dlrm-criteo", ["standalone.batch_size=12", f"rows.public.share={share}", *overrides])
    task = make_task(ExampleTable(card, held, held, held, CLICKS.cardinalities), recipe, draws)
    assert isinstance(task, Labelled)
    return task


def test_a_public_silo_is_nobodys_and_its_examples_are_met_once_an_epoch() -> None:
    task = labelled()
    assert isinstance(task.examples, PartOfExamples)
    assert task.public is not None
    ours = task.examples.examples(np.arange(6)).dense[:, 0]
    met = np.concatenate([work.inputs["dense"][0, 0, :, 0] for work in task.public.central(1)])
    assert sorted([*ours, *met]) == list(range(85))
    assert not set(ours) & set(met)
    assert task.examples.held_out("test") is task.public.examples.held_out("test")
    assert "6 of the 10 are clients" in task.card.extra["clients"]


# What does not fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows.train": "public"}, r"rows\.train = \"public\" needs public data.*rows\.public\.share"),
        ({"rows.public.warmup": 3}, r"rows\.public\.warmup needs public data.*rows\.public\.share"),
        ({"rows.public.share": 1.0}, r"rows\.public\.share must be at least 0 and below 1, not 1\.0"),
        ({**PUBLIC, "rows.public.steps": 0}, r"rows\.public\.steps must be at least 1, not 0"),
        ({**PUBLIC, "rows.public.warmup": -1}, r"rows\.public\.warmup must be at least 0, not -1"),
        ({**PUBLIC, "rows.public.epochs": 1}, r"rows\.public\.epochs is not a setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting_of: SettingOf, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        setting_of(settings)


def test_a_model_without_rows_has_nothing_to_train_on_public_data() -> None:
    task, model = labelled().public, cases()["images"].model
    assert task is not None
    with pytest.raises(RecipeError, match="this model has none"):
        PublicRows(task, model, None, LocalSettings(steps=1, loss="bce"), PublicSettings(share=0.4))


def test_public_silos_without_examples_are_refused() -> None:
    task, model = labelled().public, replace(cases()["clicks"].model, on_device=())
    assert task is not None
    empty = replace(task, examples=PartOfExamples(task.examples, np.zeros(0, dtype=np.int64)))
    store = CloudTables(model, task.features, RowSettings(), torch.Generator())
    with pytest.raises(DataError, match=r"hold no examples to train on; set a larger share apart"):
        PublicRows(empty, model, store, LocalSettings(steps=1, loss="bce"), PublicSettings(share=0.4))


def test_what_each_client_keeps_cannot_be_trained_on_pooled_examples() -> None:
    task, model = labelled().public, cases()["clicks"].model
    assert task is not None
    store = CloudTables(model, task.features, RowSettings(), torch.Generator())
    with pytest.raises(RecipeError, match="own live on devices"):
        PublicRows(task, model, store, LocalSettings(steps=1, loss="bce"), PublicSettings(share=0.4))
