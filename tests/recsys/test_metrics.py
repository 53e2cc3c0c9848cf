"""The metrics by hand, against scikit-learn and torchmetrics, and by law."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtower.recsys import metrics

scores_of_cases = arrays.arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(2, 12)), elements=st.integers(-6, 6))


def ranks_of(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks with the first column as the target."""
    return metrics.ranks(scores[:, 0], scores[:, 1:])


# By hand.


def test_a_tie_counts_against_the_target() -> None:
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    assert ranks_of(scores).tolist() == [0, 1, 2, 2]


def test_padding_outranks_nobody() -> None:
    assert metrics.ranks(np.array([-5.0]), np.array([[-np.inf, -9.0, 3.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("target", "other"), [(np.nan, 0.0), (0.0, np.nan), (np.inf, 0.0), (0.0, np.inf), (-np.inf, 0.0)]
)
def test_scores_that_cannot_be_compared_are_refused(target: float, other: float) -> None:
    with pytest.raises(metrics.ScoreError, match="diverged"):
        metrics.ranks(np.array([target]), np.array([[other]]))


def test_hit_rate_by_hand() -> None:
    assert metrics.hit_rate(np.array([0, 9, 10, 99]), k=10) == 0.5


def test_ndcg_by_hand() -> None:
    assert metrics.ndcg(np.array([0, 1, 10]), k=10) == pytest.approx((1 + 1 / np.log2(3) + 0) / 3)


def test_mrr_by_hand() -> None:
    assert metrics.mrr(np.array([0, 1, 3])) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_recall_weighs_users_and_not_cases() -> None:
    assert metrics.recall(np.array([0, 0, 0, 50, 50]), np.array([3, 3, 3, 3, 8]), k=10) == pytest.approx(
        (3 / 4 + 0) / 2
    )


def test_auc_by_hand() -> None:
    assert metrics.auc(np.array([1, 1, 0, 0]), np.array([4.0, 2.0, 3.0, 1.0])) == 3 / 4


def test_gauc_weights_users_by_their_entries_and_leaves_out_those_without_both_labels() -> None:
    labels, users = np.array([1, 0, 1, 0, 0, 0, 1, 1]), np.array([5, 5, 6, 6, 6, 6, 7, 7])
    scores = np.array([2.0, 1.0, 2.0, 3.0, 1.0, 1.0, 0.0, 9.0])
    assert metrics.gauc(labels, scores, users) == pytest.approx((2 * 1 + 4 * 2 / 3) / 6)


def test_logloss_by_hand() -> None:
    assert metrics.logloss(np.array([1, 0]), np.log([3.0, 3.0])) == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)


def test_logloss_of_a_certain_and_wrong_prediction_is_large_and_finite() -> None:
    assert metrics.logloss(np.array([0, 1]), np.array([800.0, -800.0])) == 800.0


def test_coverage_by_hand() -> None:
    assert metrics.coverage(np.array([[0, 1, 2], [2, 1, -1]]), num_items=12) == 0.25


def test_equal_scores_are_listed_in_column_order() -> None:
    scores = np.array([[1.0, 3.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert metrics.top_lists(scores, 3).tolist() == [[1, 2, 3], [4, 0, 1]]


def test_a_list_longer_than_the_candidates_ends_in_padding() -> None:
    assert metrics.top_lists(np.array([[-np.inf, 1.0, 2.0]]), 5).tolist() == [[2, 1, -1, -1, -1]]


def test_a_list_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 0"):
        metrics.hit_rate(np.array([0]), k=0)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        metrics.mrr(np.array([], dtype=np.int64))


def test_one_sided_labels_have_no_auc() -> None:
    with pytest.raises(ValueError, match="the same"):
        metrics.auc(np.array([1, 1]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="no user has both"):
        metrics.gauc(np.array([1, 0]), np.array([0.0, 1.0]), np.array([1, 2]))
    assert np.isnan(metrics.PooledAUC().value())


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        metrics.auc(np.array([1, -1]), np.array([0.0, 1.0]))


# Against other libraries.


def test_auc_and_logloss_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import log_loss, roc_auc_score

    random = np.random.default_rng(1)
    labels, logits = random.integers(0, 2, 500), random.normal(size=500).round(1)
    assert metrics.auc(labels, logits) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert metrics.logloss(labels, logits) == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), abs=1e-12)


def test_gauc_is_the_weighted_mean_of_scikit_learns_auc_of_each_user() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(2)
    users, labels, scores = random.integers(0, 30, 600), random.integers(0, 2, 600), random.normal(size=600).round(1)
    groups = [users == user for user in np.unique(users)]
    expected = np.average([roc_auc_score(labels[g], scores[g]) for g in groups], weights=[g.sum() for g in groups])
    assert metrics.gauc(labels, scores, users) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_ranking_metrics_are_those_of_torchmetrics(k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

    random = np.random.default_rng(3)
    # Distinct scores: torchmetrics leaves the order of ties to the sort.
    scores = random.permuted(np.tile(np.arange(60.0), (40, 1)), axis=1)
    ranks = ranks_of(scores)
    relevant = torch.zeros(scores.shape, dtype=torch.int64)
    relevant[:, 0] = 1
    rows = torch.arange(len(scores)).repeat_interleave(scores.shape[1])

    def theirs(metric: Any) -> float:
        return float(metric(torch.from_numpy(scores).flatten(), relevant.flatten(), indexes=rows))

    assert metrics.hit_rate(ranks, k) == pytest.approx(theirs(RetrievalHitRate(top_k=k)), abs=1e-6)
    assert metrics.recall(ranks, np.arange(len(ranks)), k) == pytest.approx(theirs(RetrievalRecall(top_k=k)), abs=1e-6)
    assert metrics.ndcg(ranks, k) == pytest.approx(theirs(RetrievalNormalizedDCG(top_k=k)), abs=1e-6)
    assert metrics.mrr(ranks) == pytest.approx(theirs(RetrievalMRR()), abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_ndcg_is_that_of_scikit_learn(k: int) -> None:
    from sklearn.metrics import ndcg_score

    random = np.random.default_rng(4)
    scores = random.permuted(np.tile(np.arange(20.0), (30, 1)), axis=1)
    relevant = np.zeros(scores.shape)
    relevant[:, 0] = 1
    assert metrics.ndcg(ranks_of(scores), k) == pytest.approx(ndcg_score(relevant, scores, k=k), abs=1e-12)


def test_top_lists_are_those_of_a_stable_sort() -> None:
    scores = np.random.default_rng(5).integers(0, 9, (50, 30)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 7, 30):
        assert metrics.top_lists(scores, k).tolist() == expected[:, :k].tolist()


def test_the_pooled_auc_is_the_exact_one_to_six_digits() -> None:
    random = np.random.default_rng(6)
    positives, negatives = random.normal(0.5, 1, 3000).astype(np.float32), random.normal(0, 1, 20000).astype(np.float32)
    pooled = metrics.PooledAUC()
    pooled.add(positives, negatives)
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    assert pooled.value() == pytest.approx(metrics.auc(labels, np.concatenate([positives, negatives])), abs=2e-6)


# By law.


@settings(deadline=None)
@given(scores_of_cases)
def test_a_monotone_transform_of_the_scores_changes_no_rank(scores: np.ndarray[Any, Any]) -> None:
    assert ranks_of(scores.astype(np.float64)).tolist() == ranks_of(np.exp(scores / 3.0) * 7 - 2).tolist()


@settings(deadline=None)
@given(scores_of_cases, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_changes_no_rank(scores: np.ndarray[Any, Any], random: Any) -> None:
    others = list(range(1, scores.shape[1]))
    random.shuffle(others)
    assert ranks_of(scores[:, [0, *others]]).tolist() == ranks_of(scores).tolist()


@settings(deadline=None)
@given(scores_of_cases)
def test_a_rank_is_the_place_in_a_list_that_puts_the_target_last_among_equals(scores: np.ndarray[Any, Any]) -> None:
    for row, rank in zip(scores.tolist(), ranks_of(scores), strict=True):
        listed = sorted(range(len(row)), key=lambda column: (-row[column], column == 0))
        assert listed.index(0) == rank


@settings(deadline=None)
@given(scores_of_cases)
def test_a_model_that_knows_nothing_is_ranked_last(scores: np.ndarray[Any, Any]) -> None:
    assert (ranks_of(np.zeros_like(scores)) == scores.shape[1] - 1).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(-3, 3)), min_size=1, max_size=60))
def test_auc_counts_pairs(entries: list[tuple[int, bool, int]]) -> None:
    users, labels, scores = (np.array(column) for column in zip(*entries, strict=True))

    def counted(chosen: np.ndarray[Any, Any]) -> float | None:
        positives, negatives = scores[chosen & labels], scores[chosen & ~labels]
        pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
        return float(np.mean(pairs)) if pairs else None

    everyone = counted(np.ones(len(users), dtype=bool))
    if everyone is None:
        return
    assert metrics.auc(labels, scores) == pytest.approx(everyone)
    pooled = metrics.PooledAUC()
    for user in np.unique(users):
        of_user = users == user
        pooled.add(scores[labels & of_user], scores[~labels & of_user])
    assert pooled.value() == pytest.approx(everyone)
    by_user = [(counted(users == user), np.sum(users == user)) for user in np.unique(users)]
    both = [(value, size) for value, size in by_user if value is not None]
    if both:
        expected = sum(value * size for value, size in both) / sum(size for _, size in both)
        assert metrics.gauc(labels, scores, users) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 40))
def test_figures_are_shares_and_grow_with_k(ranks: list[int], k: int) -> None:
    r = np.array(ranks)
    for figure in (metrics.hit_rate, metrics.ndcg):
        assert 0 <= figure(r, k) <= figure(r, k + 1) <= 1
    assert metrics.ndcg(r, k) <= metrics.hit_rate(r, k)
    assert metrics.recall(r, np.arange(len(r)), k) == pytest.approx(metrics.hit_rate(r, k))
