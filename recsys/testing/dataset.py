"""What every data set promises."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.testing.promises import Promises, assert_same_bits, not_promised
from fedtower.recsys.examples import ExampleDataset, ExampleSet
from fedtower.recsys.history import Dataset, Events, Population

ROLES: tuple[Literal["validation", "test"], ...] = ("validation", "test")


class DatasetPromises(Promises):
    """``make`` gives a data set that can be loaded where the tests run; the first fifty clients are looked at.

    It holds histories or labelled examples; what it gives says which.
    """

    @pytest.fixture
    def data(self) -> Population | ExampleSet:
        """What the data set holds, loaded with seed 7."""
        return self.load()

    @pytest.fixture
    def population(self, data: Population | ExampleSet) -> Population:
        """The population; of a data set of examples there is nothing to prove."""
        if isinstance(data, ExampleSet):
            not_promised("this data set holds labelled examples")
        return data

    @pytest.fixture
    def examples(self, data: Population | ExampleSet) -> ExampleSet:
        """The examples; of a data set of histories there is nothing to prove."""
        if not isinstance(data, ExampleSet):
            not_promised("this data set holds histories")
        return data

    def load(self) -> Population | ExampleSet:
        """Load the data anew."""
        told: list[str] = []
        dataset: Dataset | ExampleDataset = self.made()
        data = dataset.load(draws=Draws(7), progress=told.append)
        assert all(isinstance(message, str) for message in told)
        return data

    # Of histories

    def test_somebody_is_there_and_the_card_says_so(self, population: Population) -> None:
        assert population.num_clients > 0
        assert population.num_items > 0
        assert (population.card.users, population.card.items) == (population.num_clients, population.num_items)
        assert population.card.interactions >= len(population.events(_some(population)).items)
        assert population.card.name

    def test_events_are_in_time_order_and_of_known_items(self, population: Population) -> None:
        clients = _some(population)
        events = population.events(clients)
        assert_same_bits(events.clients, clients)
        assert events.offsets[0] == 0
        assert events.offsets[-1] == len(events.items) == len(events.times) == len(events.ratings)
        assert np.all((events.items >= 0) & (events.items < population.num_items))
        assert np.all(np.isfinite(events.ratings))
        later = np.diff(events.times) >= 0
        assert np.all(later | (np.diff(events.owners) > 0)), "a client's events are given oldest first"

    def test_a_client_has_no_item_twice(self, population: Population) -> None:
        events = population.events(_some(population))
        pairs = np.stack([events.owners, events.items], axis=1)
        assert len(np.unique(pairs, axis=0)) == len(pairs), "a held-out item could be in training too"

    def test_who_else_is_asked_for_does_not_matter(self, population: Population) -> None:
        clients = _some(population)[:7][::-1]
        together = population.events(clients)
        for place, client in enumerate(clients):
            alone = population.events(np.array([client]))
            assert_same_bits(_client(alone, 0), _client(together, place), f"the events of client {client}")

    def test_nobody_is_an_answer_too(self, population: Population) -> None:
        nobody = np.zeros(0, dtype=np.int64)
        assert len(population.events(nobody)) == 0
        assert population.user_features(nobody).shape == (0, population.num_user_features)
        assert population.item_features(nobody).shape == (0, population.num_item_features)

    def test_loading_again_gives_the_same(self, population: Population) -> None:
        again = self.load()
        assert not isinstance(again, ExampleSet)
        clients = _some(population)
        assert_same_bits(_all(again.events(clients)), _all(population.events(clients)))
        assert_same_bits(again.user_features(clients), population.user_features(clients))

    def test_features_are_finite_and_as_wide_as_said(self, population: Population) -> None:
        clients, items = _some(population), np.arange(min(population.num_items, 50), dtype=np.int64)
        for features, shape in (
            (population.user_features(clients), (len(clients), population.num_user_features)),
            (population.item_features(items), (len(items), population.num_item_features)),
        ):
            assert features.shape == shape
            assert features.dtype == np.float32
            assert np.all(np.isfinite(features))

    def test_a_user_is_found_by_name(self, population: Population) -> None:
        for client in _some(population):
            assert population.client_index(population.user_name(int(client))) == client
        with pytest.raises(DataError):
            population.client_index("nobody is called this")

    def test_items_have_names_of_their_own(self, population: Population) -> None:
        items = range(min(population.num_items, 50))
        assert len({population.item_name(item) for item in items}) == len(items)
        assert all(population.item_title(item) is None or population.item_title(item) for item in items)

    def test_a_client_that_is_not_there_is_refused(self, population: Population) -> None:
        for stranger in (-1, population.num_clients):
            with pytest.raises((DataError, IndexError)):
                population.events(np.array([stranger]))

    def test_what_it_holds_out_itself_is_of_known_items(self, population: Population) -> None:
        held = population.held_out(_some(population))
        if held is not None:
            known = population.num_items
            assert np.all((held.items >= -1) & (held.items < known))
            assert np.all((held.negatives >= -1) & (held.negatives < known))
            assert not np.any((held.negatives == held.items[:, None]) & (held.items[:, None] >= 0))

    # Of labelled examples

    def test_there_are_examples_and_the_card_says_how_many(self, examples: ExampleSet) -> None:
        assert examples.num_clients > 0
        assert examples.card.clients == examples.num_clients
        everyone = examples.examples(np.arange(examples.num_clients, dtype=np.int64))
        counts = len(everyone.labels), *(len(examples.held_out(role).labels) for role in ROLES)
        assert counts == (examples.card.training, examples.card.validation, examples.card.test)
        assert counts[0] > 0
        assert counts[-1] > 0, "there is nothing to judge a model on"
        assert examples.card.name

    def test_examples_are_of_the_shapes_and_values_that_are_said(self, examples: ExampleSet) -> None:
        clients = _some(examples)
        held = examples.examples(clients)
        assert_same_bits(held.clients, clients)
        edges = np.concatenate([[0], np.cumsum(examples.cardinalities)]).astype(np.int64)
        for each in (held, *(examples.held_out(role) for role in ROLES)):
            count = int(each.offsets[-1])
            assert each.offsets[0] == 0
            assert np.all(np.diff(each.offsets) >= 0)
            assert each.dense.shape == (count, *examples.dense_shape)
            assert each.labels.shape == (count,)
            assert each.dense.dtype == each.labels.dtype == np.float32
            assert each.categories.shape == (count, len(examples.cardinalities))
            assert np.issubdtype(each.categories.dtype, np.int64)
            assert np.all(np.isfinite(each.dense))
            assert np.all((each.categories >= edges[:-1]) & (each.categories < edges[1:])), "a row of another field"
            assert set(each.labels.tolist()) <= set(range(examples.num_classes or 2))

    def test_who_else_is_asked_for_changes_no_example(self, examples: ExampleSet) -> None:
        clients = _some(examples)[:7][::-1]
        together = examples.examples(clients)
        for place, client in enumerate(clients):
            part = slice(*together.offsets[place : place + 2])
            alone = examples.examples(np.array([client]))
            for name in ("dense", "categories", "labels"):
                assert_same_bits(getattr(alone, name), getattr(together, name)[part], f"{name} of client {client}")

    def test_nobody_has_no_examples(self, examples: ExampleSet) -> None:
        nobody = examples.examples(np.zeros(0, dtype=np.int64))
        assert (len(nobody.clients), nobody.offsets.tolist(), len(nobody.labels)) == (0, [0], 0)
        assert nobody.dense.shape == (0, *examples.dense_shape)

    def test_loading_again_gives_the_same_examples(self, examples: ExampleSet) -> None:
        again, clients = self.load(), _some(examples)
        assert isinstance(again, ExampleSet)
        pairs = [(again.examples(clients), examples.examples(clients))]
        pairs += [(again.held_out(role), examples.held_out(role)) for role in ROLES]
        for one, other in pairs:
            for name in ("offsets", "dense", "categories", "labels"):
                assert_same_bits(getattr(one, name), getattr(other, name), name)

    def test_examples_of_a_client_that_is_not_there_are_refused(self, examples: ExampleSet) -> None:
        for stranger in (-1, examples.num_clients):
            with pytest.raises((DataError, IndexError)):
                examples.examples(np.array([stranger]))


def _some(data: Population | ExampleSet) -> NDArray[np.int64]:
    return np.arange(min(data.num_clients, 50), dtype=np.int64)


def _client(events: Events, place: int) -> tuple[Any, ...]:
    part = slice(*events.offsets[place : place + 2])
    return events.items[part], events.times[part], events.ratings[part]


def _all(events: Events) -> tuple[Any, ...]:
    return events.clients, events.offsets, events.items, events.times, events.ratings
