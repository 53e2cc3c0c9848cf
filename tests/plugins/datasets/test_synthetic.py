import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.plugins.datasets.synthetic import Synthetic, SyntheticPopulation
from fedtower.recsys.testing.dataset import DatasetPromises

SMALL = Synthetic(users=120, items=300, mean_events=40.0)


class TestPromises(DatasetPromises):
    make = partial(Synthetic, users=120, items=300, mean_events=40.0)


def load(dataset: Synthetic = SMALL, seed: int = 7) -> SyntheticPopulation:
    return dataset.load(draws=Draws(seed), progress=lambda text: None)


ALONE = {
    client: (block.items.tolist(), block.times.tolist(), block.ratings.tolist())
    for client in range(SMALL.users)
    for block in [load().events(np.array([client]))]
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, SMALL.users - 1), max_size=300))
def test_a_client_has_the_same_events_in_any_block(clients: list[int]) -> None:
    events = load().events(np.array(clients, dtype=np.int64))
    for place, client in enumerate(clients):
        part = slice(*events.offsets[place : place + 2])
        assert ALONE[client] == (
            events.items[part].tolist(),
            events.times[part].tolist(),
            events.ratings[part].tolist(),
        )


def test_the_card_counts_what_is_generated() -> None:
    population = load()
    events = population.events(np.arange(SMALL.users))
    card = population.card
    assert card.interactions == len(events.items)
    assert card.first_time is not None
    assert card.last_time is not None
    assert card.first_time <= events.times.min()
    assert events.times.max() <= card.last_time


def test_activity_is_log_normal_within_its_limits() -> None:
    population = load(Synthetic(users=50_000))
    activity = population.activity(np.arange(50_000))
    assert activity.min() == 20
    assert activity.max() == 1_500  # half of the catalogue
    assert abs(activity.mean() - 165) < 5
    assert abs(np.median(activity) - 100) < 5


def test_another_seed_gives_another_population() -> None:
    one, other = (load(seed=seed).events(np.arange(50)) for seed in (1, 2))
    assert len(one.items) != len(other.items) or (one.items != other.items).any()


def test_the_catalogue_has_a_long_tail() -> None:
    population = load(Synthetic(users=500, items=2_000, mean_events=100.0))
    events = population.events(np.arange(500))
    counts = np.sort(np.bincount(events.items, minlength=2_000))[::-1]
    assert counts[:200].sum() > 3 * 0.1 * counts.sum()
    assert counts[1_000:].sum() < 0.25 * counts.sum()


def hit_rate(population: SyntheticPopulation, scores: NDArray[np.float64], draws: Draws) -> float:
    """HR@10 of the last item of each client among 99 others, by scores (clients, items)."""
    events = population.events(np.arange(population.num_clients))
    hits = []
    for client in range(population.num_clients):
        mine = events.items[slice(*events.offsets[client : client + 2])]
        others = np.setdiff1d(np.arange(population.num_items), mine)
        others = others[draws.permutation(len(others), "others", client)[:99]]
        hits.append((scores[client, others] >= scores[client, mine[-1]]).sum() < 10)
    return float(np.mean(hits))


@pytest.mark.parametrize("taste", [0.0, 1.0])
def test_who_knows_the_taste_gains_exactly_when_there_is_taste(taste: float) -> None:
    population = load(Synthetic(users=1_000, items=1_000, mean_events=60.0, taste=taste))
    events = population.events(np.arange(1_000))
    popular = np.bincount(np.delete(events.items, events.offsets[1:] - 1), minlength=1_000).astype(np.float64)
    # The genre of the item before the last is that of the session more often than not.
    genres = population.catalogue.genres
    same = genres[events.items[events.offsets[1:] - 2]][:, None] == genres[None, :]
    by_popularity = hit_rate(population, np.tile(popular, (1_000, 1)), Draws(1))
    by_taste = hit_rate(population, popular * np.where(same, 12.0, 1.0), Draws(1))
    assert 0.28 < by_popularity < 0.55
    if taste:
        assert by_taste > 1.5 * by_popularity
    else:
        assert by_taste < by_popularity


def test_groups_tell_something_of_taste() -> None:
    population = load(Synthetic(users=2_000, items=1_000, mean_events=60.0))
    clients = np.arange(2_000)
    events = population.events(clients)
    counts = np.zeros((8, 20))
    np.add.at(counts, (population.groups(clients)[events.owners], population.catalogue.genres[events.items]), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert (shares.max(axis=1) > 0.1).all()  # a genre's share would be 0.05 if groups told nothing


def test_titles_are_all_different_and_name_the_genre() -> None:
    population = load(Synthetic(users=10, items=4_000))
    titles = [population.item_title(item) for item in range(4_000)]
    assert len(set(titles)) == 4_000
    assert all(title is not None and title.endswith(")") for title in titles)


def test_a_million_clients_take_no_memory_until_asked_for() -> None:
    population = load(Synthetic(users=1_000_000))
    clients = np.array([0, 999_999, 123_456])
    assert population.events(clients).lengths.tolist() == population.activity(clients).tolist()
    assert population.client_index("u999999") == 999_999
    assert 160_000_000 < population.card.interactions < 170_000_000


def test_only_recent_blocks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtower.plugins.datasets.synthetic._CACHED_EVENTS", 3_000)
    population = load()
    for start in range(100):
        population.events(np.arange(start, start + 20))
    assert sum(len(block.items) for block in population._recent.values()) <= 3_000


def test_a_cohort_is_quick() -> None:
    population = load(Synthetic(users=10_000, items=3_000))
    population.events(np.arange(200))
    started = time.process_time()
    for block in range(1, 6):
        population.events(np.arange(200 * block, 200 * block + 200))
    # 8 ms each on an idle core; the limit leaves room for a slow one.
    assert time.process_time() - started < 5 * 0.1


def test_a_user_is_known_by_name_or_number() -> None:
    assert load().client_index("u17") == load().client_index("17") == 17


@pytest.mark.parametrize("name", ["u120", "u-1", "uu1", "u1x", "", "u²"])
def test_an_unknown_user_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="the generated users are u0 to u119"):
        load().client_index(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"users": 0}, "users must be 1 to 1,000,000, but is 0"),
        ({"users": 1_000_001}, "users must be"),
        ({"items": 199}, "items must be at least 200"),
        ({"taste": 1.1}, "taste must be 0 to 1, but is 1.1"),
        ({"mean_events": 20.0}, "mean_events must be more than 20 and at most 750"),
        ({"items": 300, "mean_events": 165.0}, "at most 75 with 300 items"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**wrong)  # type: ignore[arg-type]
