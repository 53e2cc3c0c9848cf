"""Evaluation: the cases, the two protocols and the baseline, on populations small enough to count by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.recipe import EvaluationSettings
from fedtower.plugins.datasets.movielens.dataset import MovieLens
from fedtower.recsys import metrics
from fedtower.recsys.evaluation import Cases, ItemPop, evaluate, make_cases, sample_negatives
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.population import HeldOut
from fedtower.recsys.splits import make_split
from fedtower.recsys.vocabulary import Vocabulary

DRAWS = Draws(7)
SAMPLED = EvaluationSettings(protocol="sampled", negatives=3, k=(1, 2), batch_size=512)
FULL = replace(SAMPLED, protocol="full")


def table(histories: list[list[int]], num_items: int, given: HeldOut | None = None) -> EventTable:
    """A population whose clients touched these items, in this order."""
    rows = [(client, item, time) for client, items in enumerate(histories) for time, item in enumerate(items)]
    clients, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    users = Vocabulary(np.arange(len(histories)), "user")
    return EventTable.build(
        "small",
        users=users,
        items=Vocabulary(np.arange(num_items), "item"),
        client_rows=clients,
        item_rows=items,
        times=times,
        given=given,
    )


def leave_one_out(population: EventTable, validation: bool = False) -> Any:
    return make_split("leave_one_out", population, validation=validation, draws=DRAWS)


@dataclass(frozen=True)
class Fixed:
    """Scores that are written down."""

    scores: np.ndarray[Any, Any]
    seen: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def score(self, clients: Any, cut: Any, candidates: Any) -> Any:
        self.seen.append((clients.tolist(), cut.tolist()))
        return self.scores[clients[:, None], np.maximum(candidates, 0)].astype(np.float32)

    def score_all(self, clients: Any, cut: Any) -> Any:
        return self.scores[clients].astype(np.float32)


class Spread:
    """Scores that look random and depend on client, cut and item."""

    def score(self, clients: Any, cut: Any, candidates: Any) -> Any:
        return DRAWS.uniform("spread", clients[:, None], cut[:, None], candidates).astype(np.float32)

    def score_all(self, clients: Any, cut: Any) -> Any:
        return self.score(clients, cut, np.arange(200)[None])


def some_population(clients: int = 60, items: int = 200) -> EventTable:
    lengths = 2 + DRAWS.integers(30, "lengths", np.arange(clients))
    return table([DRAWS.permutation(items, "history", c)[: lengths[c]].tolist() for c in range(clients)], items)


def test_a_case_is_a_held_out_event_and_how_many_came_before_it() -> None:
    population = table([[4, 0, 2], [1], [3, 1]], num_items=5)
    cases = make_cases(population, leave_one_out(population), np.array([2, 1, 0]), "test")
    assert (cases.clients.tolist(), cases.targets.tolist(), cases.cut.tolist()) == ([2, 0], [1, 2], [1, 2])


def test_validation_cases_are_other_events_than_test_cases() -> None:
    population = table([[4, 0, 2]], num_items=5)
    split = leave_one_out(population, validation=True)
    assert make_cases(population, split, np.array([0]), "validation").targets.tolist() == [0]
    assert make_cases(population, split, np.array([0]), "validation").cut.tolist() == [1]
    assert make_cases(population, split, np.array([0]), "test").targets.tolist() == [2]


def test_full_ranking_by_hand() -> None:
    # Client 0: the target 2 (score 5) loses to 3 (9) and to 4 (5, a tie); 0 and 1 (both 9) were touched before.
    # Client 1: the target 1 (score 9) wins against 0, 2, 3 and 4's other is touched.
    population = table([[0, 1, 2], [4, 1]], num_items=5)
    scores = np.array([[9.0, 9, 5, 9, 5], [1, 9, 1, 1, 99]])
    result = evaluate(Fixed(scores), population, leave_one_out(population), "test", FULL, DRAWS)
    assert (result.protocol_label, result.cases, result.users, result.role) == ("full ranking", 2, 2, "test")
    assert result.metrics["HR@1"] == result.metrics["HR@2"] == result.metrics["recall@1"] == 0.5
    assert result.metrics["NDCG@2"] == 0.5
    assert result.metrics["MRR"] == pytest.approx((1 / 3 + 1) / 2)
    assert result.metrics["GAUC"] == pytest.approx((0.25 + 1) / 2)
    # Everybody's top 1: 3 and 1; top 2: 3 and 2 (2 before 4, which ties), 1 and 0 (0 before 2 and 3).
    assert result.metrics["coverage@1"] == 2 / 5
    assert result.metrics["coverage@2"] == 4 / 5


def test_a_scorer_is_told_who_and_how_much_came_before() -> None:
    population = table([[0, 1, 2], [4, 1]], num_items=9)
    scorer = Fixed(np.zeros((2, 9)))
    evaluate(scorer, population, leave_one_out(population), "test", SAMPLED, DRAWS)
    assert scorer.seen == [([0, 1], [2, 1])]


@pytest.mark.parametrize("settings", [SAMPLED, FULL], ids=["sampled", "full"])
def test_an_oracle_is_right_and_a_constant_gains_nothing(settings: EvaluationSettings) -> None:
    population = some_population()
    split = leave_one_out(population)
    cases = make_cases(population, split, np.arange(60), "test")
    knows = np.zeros((60, 200))
    knows[cases.clients, cases.targets] = 1
    right = evaluate(Fixed(knows), population, split, "test", settings, DRAWS).metrics
    assert {right[name] for name in ("HR@1", "NDCG@2", "recall@1", "MRR", "AUC", "GAUC")} == {1.0}
    flat = evaluate(Fixed(np.zeros((60, 200))), population, split, "test", settings, DRAWS).metrics
    assert (flat["HR@1"], flat["NDCG@2"], flat["AUC"], flat["GAUC"]) == (0.0, 0.0, 0.5, 0.5)


@pytest.mark.parametrize("kind", ["leave_two_out", "random"])
@pytest.mark.parametrize("protocol", ["sampled", "full"])
@pytest.mark.parametrize("role", ["validation", "test"])
def test_the_batch_size_does_not_matter(kind: str, protocol: Any, role: Any) -> None:
    population = some_population()
    split = make_split(kind, population, validation=True, draws=DRAWS)
    settings = replace(SAMPLED, protocol=protocol, negatives=20)
    results = [
        evaluate(Spread(), population, split, role, replace(settings, batch_size=size), DRAWS) for size in (1, 7, 512)
    ]
    assert results[0] == results[1] == results[2]


def test_full_ranking_agrees_with_the_slow_obvious_way() -> None:
    population = some_population()
    split = make_split("random", population, validation=False, draws=DRAWS)
    scorer = Spread()
    ranks, lists = [], []
    cases = make_cases(population, split, np.arange(60), "test")
    for client, target, cut in zip(cases.clients, cases.targets, cases.cut, strict=True):
        scores = scorer.score_all(np.array([client]), np.array([cut]))[0]
        others = set(population.events(np.array([client])).items.tolist()) - {target}
        candidates = sorted(set(range(200)) - others, key=lambda item: (-scores[item], item))
        ranks.append(sum(scores[item] >= scores[target] for item in candidates if item != target))
        lists.append(candidates[:2])
    result = evaluate(scorer, population, split, "test", FULL, DRAWS)
    assert result.cases == len(ranks) > result.users
    assert result.metrics["HR@2"] == metrics.hit_rate(np.array(ranks), 2)
    assert result.metrics["recall@2"] == pytest.approx(metrics.recall(np.array(ranks), cases.clients, 2))
    assert result.metrics["MRR"] == pytest.approx(metrics.mrr(np.array(ranks)))
    assert result.metrics["coverage@2"] == metrics.coverage(np.array(lists), 200)


def test_gauc_is_the_weighted_mean_over_users() -> None:
    # User 0 has two cases (AUC 1 and 0.5), user 1 has one (AUC 0): weighted by cases, (2 * .75 + 1 * 0) / 3.
    events = table([[0, 1], [2]], num_items=4)
    split = replace(leave_one_out(events), kind="time", edges=(np.inf, -1.0))
    scores = np.array([[5.0, 2, 1, 3], [9, 9, 0, 9]])
    result = evaluate(Fixed(scores), events, split, "test", FULL, DRAWS)
    assert result.cases == 3
    assert result.metrics["GAUC"] == pytest.approx((2 * 0.75 + 1 * 0.0) / 3)


def test_negatives_are_different_items_that_the_client_never_touched() -> None:
    population = some_population()
    cases = make_cases(population, leave_one_out(population, validation=True), np.arange(60), "validation")
    for case, drawn in enumerate(sample_negatives(population, cases, 40, DRAWS)):
        touched = population.events(cases.clients[case : case + 1]).items
        assert len(set(drawn.tolist())) == 40
        assert not set(drawn.tolist()) & {*touched.tolist(), -1}


def test_negatives_belong_to_the_case_and_not_to_the_batch() -> None:
    population = some_population()
    cases = make_cases(population, leave_one_out(population), np.arange(60), "test")
    together = sample_negatives(population, cases, 20, DRAWS)
    alone = [sample_negatives(population, case, 20, DRAWS)[0] for case in cases.batches(1)]
    assert together.tolist() == np.array(alone).tolist()
    assert together.tolist() != sample_negatives(population, cases, 20, Draws(8)).tolist()


def test_negatives_are_uniform() -> None:
    population = table([[0, 1]] * 4000, num_items=102)
    cases = Cases(np.arange(4000), np.ones(4000, dtype=np.int64), np.ones(4000, dtype=np.int64))
    drawn = np.bincount(sample_negatives(population, cases, 10, DRAWS).ravel(), minlength=102)
    # 400 expected of each of 100 items, standard deviation 19.
    assert drawn[:2].tolist() == [0, 0]
    assert abs(drawn[2:] - 400).max() < 5 * 19


@hypothesis_settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 40))
def test_where_little_is_left_all_that_is_left_is_drawn(items: int, touched: int, count: int) -> None:
    touched = min(touched, items - 1) + 1
    population = table([list(range(touched))], num_items=items)
    cases = Cases(np.array([0]), np.array([0]), np.array([0]))
    drawn = sample_negatives(population, cases, count, DRAWS)[0]
    found = drawn[drawn >= 0].tolist()
    assert len(found) == len(set(found)) == min(count, items - touched)
    assert set(found) <= set(range(touched, items))
    assert (drawn[len(found) :] == -1).all()


def test_a_client_who_touched_everything_is_ranked_against_nobody() -> None:
    population = table([[0, 1]], num_items=2)
    result = evaluate(Fixed(np.zeros((1, 2))), population, leave_one_out(population), "test", SAMPLED, DRAWS)
    assert result.metrics["HR@1"] == 1
    assert "AUC" not in result.metrics


def test_sampled_figures_say_so() -> None:
    population = some_population()
    result = evaluate(Spread(), population, leave_one_out(population), "test", SAMPLED, DRAWS)
    assert result.protocol_label == "sampled, 3 negatives"
    assert not [name for name in result.metrics if name.startswith("coverage")]


def test_given_negatives_are_used_and_said_to_be_given() -> None:
    held_out = HeldOut(np.arange(2), np.array([2, 1]), np.array([[3, 4], [0, -1]]))
    population = table([[0, 1, 2], [1, 4]], num_items=6, given=held_out)
    split = make_split("ncf", population, validation=True, draws=DRAWS)
    # Item 5 would win, but it is not among the negatives; client 1's target ties with its only negative.
    scores = np.array([[0.0, 0, 2, 3, 1, 9], [1, 1, 0, 0, 0, 9]])
    result = evaluate(Fixed(scores), population, split, "test", SAMPLED, DRAWS)
    assert result.protocol_label == "given negatives (NCF)"
    assert (result.metrics["HR@1"], result.metrics["HR@2"]) == (0.0, 1.0)
    validation = evaluate(Fixed(scores), population, split, "validation", SAMPLED, DRAWS)
    assert validation.protocol_label == "sampled, 3 negatives"


def test_a_target_among_its_given_negatives_ties_with_itself() -> None:
    held_out = HeldOut(np.arange(1), np.array([2]), np.array([[3, 2]]))
    population = table([[0, 1, 2]], num_items=6, given=held_out)
    split = make_split("ncf", population, validation=False, draws=DRAWS)
    result = evaluate(Fixed(np.array([[0.0, 0, 1, 0, 0, 0]])), population, split, "test", SAMPLED, DRAWS)
    assert (result.metrics["HR@1"], result.metrics["HR@2"]) == (0.0, 1.0)


def test_only_the_asked_clients_are_ranked() -> None:
    population = some_population()
    split = leave_one_out(population)
    result = evaluate(Spread(), population, split, "test", SAMPLED, DRAWS, clients=np.array([3, 1]))
    assert (result.cases, result.users) == (2, 2)


def test_nothing_to_rank_is_an_error() -> None:
    population = table([[0], [1]], num_items=3)
    with pytest.raises(DataError, match="none out for any of 2 clients"):
        evaluate(Fixed(np.zeros((2, 3))), population, leave_one_out(population), "test", SAMPLED, DRAWS)


def test_scores_that_are_no_numbers_are_refused() -> None:
    population = some_population()
    scores = np.full((60, 200), np.nan)
    for settings in (SAMPLED, FULL):
        with pytest.raises(metrics.ScoreError):
            evaluate(Fixed(scores), population, leave_one_out(population), "test", settings, DRAWS)


def test_popularity_counts_training_events_only() -> None:
    population = table([[0, 1, 2], [0, 2, 1], [3]], num_items=5)
    baseline = ItemPop.count(population, leave_one_out(population), batch_size=2)
    assert baseline.counts.tolist() == [2, 1, 1, 1, 0]
    assert baseline.score(np.array([0]), np.array([0]), np.array([[0, 4, -1]])).tolist() == [[2.0, 0.0, -np.inf]]


def test_popularity_ranks_by_hand() -> None:
    # Targets: 2 for clients 0 and 1; counts of training events: 0 three times, 3 twice, 1 and 2 once.
    population = table([[0, 3, 2], [0, 3, 2], [0, 1], [2, 1]], num_items=4)
    split = leave_one_out(population)
    baseline = ItemPop.count(population, split)
    assert baseline.counts.tolist() == [3, 0, 1, 2]
    result = evaluate(baseline, population, split, "test", FULL, DRAWS)
    # Candidates: 1 and 2 (rank 0); the same; 1, 2 and 3 with the target 1 (rank 2); 0, 1 and 3 with the target 1 (rank
    # 2).
    assert result.metrics["HR@1"] == 0.5
    assert result.metrics["MRR"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4)


def test_popularity_on_the_exact_ncf_split_has_its_published_figures(shared_data: Path) -> None:
    population = MovieLens(version="1m", path=shared_data / "ml-1m").load(draws=DRAWS, progress=lambda text: None)
    split = make_split("ncf", population, validation=False, draws=DRAWS)
    baseline = ItemPop.count(population, split)
    assert baseline.counts.sum() == 994_169
    result = evaluate(baseline, population, split, "test", EvaluationSettings(), DRAWS)
    assert (result.protocol_label, result.cases, result.users) == ("given negatives (NCF)", 6040, 6040)
    assert round(result.metrics["HR@10"], 3) == 0.452
    assert round(result.metrics["NDCG@10"], 3) == 0.253
    sampled = EvaluationSettings(negatives=99)
    validated = make_split("ncf", population, validation=True, draws=DRAWS)
    drawn = evaluate(baseline, population, validated, "validation", sampled, DRAWS)
    assert drawn.protocol_label == "sampled, 99 negatives"
    assert 0.4 < drawn.metrics["HR@10"] < 0.52
