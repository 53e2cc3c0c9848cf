"""The figures of ranking and click prediction: vectorised functions of ranks, or of labels and scores.

A *case* is one held-out item (the target) of one user, ranked among candidates. A *rank* counts from 0, the best. Ties
count against the target, so that a model which gives every item the same score gains nothing by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import FedtowerError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class ScoreError(FedtowerError):
    """Scores that cannot be compared: not a number, or infinite."""

    exit_code = 9


def ranks(target_scores: NDArray[Any], other_scores: NDArray[Any]) -> IntArray:
    r"""The rank of each case's target: how many other candidates score at least as much.

    .. math:: r_m = \sum_n [s_{mn} \ge s_m]

    Padding among the others is minus infinity, which never outranks anybody.

    Shape:
        target_scores ``(M,)``, other_scores ``(M, N)`` -> ``(M,)``

    Raises:
        ScoreError: a score is not a number, a candidate's is plus infinity, or a target's is infinite.

    >>> ranks(np.array([0.5, 0.5]), np.array([[0.1, 0.9], [0.5, 0.1]]))
    array([1, 1])
    """
    check_scores(target_scores, other_scores)
    return np.asarray(np.count_nonzero(other_scores >= target_scores[:, None], axis=1), dtype=np.int64)


def check_scores(target_scores: NDArray[Any], other_scores: NDArray[Any]) -> None:
    """Raise ScoreError unless targets are finite and other candidates are finite or padding (minus infinity)."""
    bad_targets = np.count_nonzero(~np.isfinite(target_scores))
    bad_others = np.count_nonzero(np.isnan(other_scores) | (other_scores == np.inf))
    if bad_targets or bad_others:
        raise ScoreError(
            f"expected finite scores, but the model gave {bad_targets} of {target_scores.size} targets and "
            f"{bad_others} of {other_scores.size} other candidates a score that is not a number or infinite; the "
            "training has most likely diverged: lower the learning rates, or add the transform clip"
        )


def hit_rate(ranks: IntArray, k: int) -> float:
    r"""HR@K: the share of cases whose target is among the first K.

    .. math:: \frac1M \sum_m [r_m < K]

    He et al., 2017, https://arxiv.org/abs/1708.05031, section 4.1.

    Shape:
        ranks ``(M,)``

    >>> hit_rate(np.array([0, 3, 10]), k=10)
    0.6666666666666666
    """
    return float(np.mean(_first(ranks, k)))


def ndcg(ranks: IntArray, k: int) -> float:
    r"""NDCG@K of a single relevant item: a hit counts less the lower it stands.

    .. math:: \frac1M \sum_m \frac{[r_m < K]}{\log_2(r_m + 2)}

    Järvelin and Kekäläinen, 2002, https://doi.org/10.1145/582415.582418, with binary gain, whose ideal value is 1.

    Shape:
        ranks ``(M,)``

    >>> ndcg(np.array([0, 2, 10]), k=10)
    0.5
    """
    return float(np.mean(np.where(_first(ranks, k), 1.0 / np.log2(ranks + 2.0), 0.0)))


def mrr(ranks: IntArray) -> float:
    r"""Mean reciprocal rank, over the whole list.

    .. math:: \frac1M \sum_m \frac1{r_m + 1}

    Shape:
        ranks ``(M,)``

    >>> mrr(np.array([0, 1]))
    0.75
    """
    return float(np.mean(1.0 / (_some(ranks) + 1.0)))


def recall(ranks: IntArray, users: IntArray, k: int) -> float:
    r"""recall@K: the share of a user's held-out items that are among the first K, averaged over users.

    .. math:: \frac1{|U|} \sum_u \frac{|\{m \in u : r_m < K\}|}{|\{m \in u\}|}

    With one case a user it equals HR@K. Each held-out item is ranked by itself, the user's other ones being no
    candidates.

    Shape:
        ranks ``(M,)``, users ``(M,)`` whose case it is

    >>> recall(np.array([0, 99, 0]), np.array([7, 7, 8]), k=10)
    0.75
    """
    return float(np.mean(_mean_by(users, _first(ranks, k).astype(np.float64))[0]))


def auc(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    r"""The chance that a positive outscores a negative, a tie counting half.

    .. math:: \frac1{|P||N|} \sum_{p \in P, n \in N} [s_p > s_n] + \tfrac12 [s_p = s_n]

    The Mann-Whitney statistic; Fawcett, 2006, https://doi.org/10.1016/j.patrec.2005.10.010, section 7. A tie counts
    half here as everywhere else: "against the target" is a rule for ranks.

    Shape:
        labels ``(E,)`` 0 or 1, scores ``(E,)``

    Raises:
        ValueError: there is no positive, or no negative.
        ScoreError: a score is not a number or infinite.

    >>> auc(np.array([1, 0, 0]), np.array([0.5, 0.5, 0.1]))
    0.75
    """
    users = np.zeros(len(labels), dtype=np.int64)
    value, _ = _auc_by(users, labels, scores)
    if not value.size:
        raise ValueError(f"AUC compares positives with negatives, but all {len(labels)} labels are the same")
    return float(value[0])


class PooledAUC:
    """The AUC of more scores than fit in memory: a histogram of positives and one of negatives.

    A bin holds the float32 scores that share sign, exponent and the first 11 bits of the mantissa, and counts as a
    tie; so values that are less than one part in 4,096 apart may be taken as equal, which moves the figure in the
    sixth digit at most in practice, and not at all for whole numbers below 4,096. The counts are integers: neither the
    order nor the size of the batches matters.

    >>> pooled = PooledAUC()
    >>> pooled.add(np.array([0.5]), np.array([0.5, 0.1]))
    >>> pooled.value()
    0.75
    """

    _DROPPED_BITS = 12

    def __init__(self) -> None:
        bins = 1 << (32 - self._DROPPED_BITS)
        self.positives = np.zeros(bins, dtype=np.int64)
        self.negatives = np.zeros(bins, dtype=np.int64)

    def add(self, positives: NDArray[Any], negatives: NDArray[Any]) -> None:
        """Count scores of any shape; minus infinity is padding and not counted."""
        self.positives += self._histogram(positives)
        self.negatives += self._histogram(negatives)

    def value(self) -> float:
        """The AUC of all that was added; not a number while there are no positives or no negatives."""
        pairs = float(self.positives.sum()) * float(self.negatives.sum())
        below = np.cumsum(self.negatives) - self.negatives
        wins = np.sum(self.positives * (below + self.negatives / 2.0))
        return float(wins / pairs) if pairs else float("nan")

    def _histogram(self, scores: NDArray[Any]) -> IntArray:
        # Adding zero turns -0.0 into 0.0. Read as an integer, a positive float orders as it should and a negative one
        # backwards.
        words = (np.asarray(scores, dtype=np.float32)[~np.isneginf(scores)] + np.float32(0)).view(np.uint32)
        ordered = words ^ np.where(words >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
        return np.bincount(ordered >> self._DROPPED_BITS, minlength=len(self.positives)).astype(np.int64)


def gauc(labels: NDArray[Any], scores: NDArray[Any], users: IntArray) -> float:
    r"""AUC within each user, averaged with the number of the user's entries as weight.

    .. math:: \frac{\sum_u n_u \, \mathrm{AUC}_u}{\sum_u n_u}

    Zhou et al., 2018, https://arxiv.org/abs/1706.06978, section 6.3, "user weighted AUC", where :math:`n_u` counts the
    user's impressions. Users whose labels are all the same have no AUC and are left out of both sums.

    Shape:
        labels ``(E,)`` 0 or 1, scores ``(E,)``, users ``(E,)``

    Raises:
        ValueError: no user has both a positive and a negative.
        ScoreError: a score is not a number or infinite.

    >>> gauc(np.array([1, 0, 1, 0, 0, 1]), np.array([2.0, 1.0, 0.0, 1.0, 2.0, 9.0]), np.array([1, 1, 2, 2, 2, 3]))
    0.4
    """
    values, entries = _auc_by(users, labels, scores)
    if not values.size:
        raise ValueError("GAUC compares positives with negatives of one user, but no user has both")
    return float(np.average(values, weights=entries))


def logloss(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    r"""Mean negative log likelihood of binary labels, in nats, from logits (scores before the sigmoid).

    .. math:: \frac1E \sum_e \log(1 + e^{z_e}) - y_e z_e

    Computed from logits because a probability that was rounded to 0 or 1 has no logarithm.

    Shape:
        labels ``(E,)`` from 0 to 1, logits ``(E,)``

    Raises:
        ScoreError: a logit is not a number or infinite.

    >>> logloss(np.array([1, 0]), np.array([0.0, 0.0]))
    0.6931471805599453
    """
    logits = np.asarray(_some(logits), dtype=np.float64)
    check_scores(logits, logits[None, :0])
    return float(np.mean(np.logaddexp(0.0, logits) - np.asarray(labels) * logits))


def of_clicks(logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """The figures of a label that is 0 or 1: AUC and logloss."""
    return {"AUC": auc(labels, logits), "logloss": logloss(labels, logits)}


def of_classes(logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    r"""The figures of a label that is one of K classes: accuracy, and the mean negative log likelihood in nats.

    A tie counts against the label.

    Shape:
        logits ``(E, K)``, labels ``(E,)``

    >>> of_classes(np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([0, 1]))["accuracy"]
    0.5
    """
    logits = np.asarray(logits, dtype=np.float64)
    check_scores(logits.reshape(-1), logits.reshape(1, -1)[:, :0])
    own = logits[np.arange(len(logits)), labels.astype(np.int64)]
    outranked = np.count_nonzero(logits >= own[:, None], axis=1) > 1
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(axis=1)) - (own - logits.max(axis=1))
    return {"accuracy": float(np.mean(~outranked)), "logloss": float(np.mean(loss))}


def of_known_classes(logits: NDArray[Any], labels: NDArray[Any], known: NDArray[Any]) -> dict[str, float]:
    """The figures of :func:`of_classes` for somebody whose own examples are of the classes ``known``: those of each
    class by its share there. Classes of which there is no example here do not count; none, where that leaves none.

    Shape:
        logits ``(E, K)``, labels ``(E,)``, known ``(n,)``

    >>> told = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> of_known_classes(told, np.array([0, 0, 0]), np.array([0, 1]))["accuracy"]
    0.6666666666666666
    >>> of_known_classes(told, np.array([0, 1, 1]), np.array([0, 0, 0, 1]))["accuracy"]
    0.875
    """
    labels = labels.astype(np.int64)
    there = np.isin(np.arange(logits.shape[1]), labels)
    shares = np.where(there, np.bincount(known.astype(np.int64), minlength=logits.shape[1]), 0.0)
    classes = np.flatnonzero(shares)
    if not len(classes):
        return {}
    each = [of_classes(logits[labels == label], labels[labels == label]) for label in classes]
    weights = shares[classes] / shares.sum()
    return {name: float(np.dot(weights, [one[name] for one in each])) for name in each[0]}


def coverage(top_lists: IntArray, num_items: int) -> float:
    r"""Coverage@K: the share of the catalogue that is in somebody's list of K.

    .. math:: \frac1I \, \Bigl|\bigcup_m L_m\Bigr|

    Ge et al., 2010, https://doi.org/10.1145/1864708.1864761, "catalog coverage".

    Shape:
        top_lists ``(M, K)`` item rows, -1 is padding

    >>> coverage(np.array([[0, 1], [1, -1]]), num_items=4)
    0.5
    """
    return len(np.unique(top_lists[top_lists >= 0])) / num_items


def top_lists(scores: NDArray[Any], k: int) -> IntArray:
    """The K highest columns of each row, best first; equal scores in the order of their columns.

    Columns of minus infinity are no candidates: where fewer than K are left, the list ends in -1.

    Shape:
        scores ``(M, I)`` -> ``(M, K)``

    >>> top_lists(np.array([[0.1, 0.7, 0.7, 0.2], [0.5, -np.inf, -np.inf, -np.inf]]), k=2)
    array([[ 1,  2],
           [ 0, -1]])
    """
    _positive(k)
    cases, items = scores.shape
    width = min(k, items)
    # argpartition alone leaves it open which of several equal scores at the K-th place is taken: take those, in column
    # order.
    threshold = np.partition(scores, items - width, axis=1)[:, items - width, None]
    above, level = scores > threshold, scores == threshold
    taken = above | (level & (np.cumsum(level, axis=1) <= width - above.sum(axis=1, keepdims=True)))
    columns = np.nonzero(taken)[1].reshape(cases, width)
    chosen = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-chosen, axis=1, kind="stable")
    columns = np.where(np.isneginf(chosen), -1, columns)
    lists = np.full((cases, k), -1, dtype=np.int64)
    lists[:, :width] = np.take_along_axis(columns, order, axis=1)
    return lists


def _first(ranks: IntArray, k: int) -> NDArray[np.bool_]:
    _positive(k)
    return np.asarray(_some(ranks) < k)


def _positive(k: int) -> None:
    if k < 1:
        raise ValueError(f"a list has at least one place, so k = {k} makes no sense")


def _some(values: NDArray[Any]) -> NDArray[Any]:
    """The values, which must be some: the mean of nothing is not 0."""
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    return values


def _mean_by(groups: IntArray, values: FloatArray) -> tuple[FloatArray, IntArray]:
    """The mean of each group in the order of its number, and the size of each."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.bincount(group, weights=values) / sizes, sizes


def _auc_by(users: IntArray, labels: NDArray[Any], scores: NDArray[Any]) -> tuple[FloatArray, IntArray]:
    """The AUC of each user who has one, and how many entries each of them has: one sort for all users."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if len(scores) == 0:
        return np.empty(0), np.empty(0, dtype=np.int64)
    check_scores(scores, scores[None, :0])
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels are 0 or 1")
    order = np.lexsort((scores, users))
    users, positive, scores = users[order], labels[order].astype(np.float64), scores[order]
    new_user = np.concatenate(([True], users[1:] != users[:-1]))
    new_score = new_user | np.concatenate(([True], scores[1:] != scores[:-1]))
    user, tie = np.cumsum(new_user) - 1, np.cumsum(new_score) - 1
    # Positions are over all users: subtracting what came before the user leaves midranks within the user, from 1.
    starts = np.flatnonzero(new_score)
    midrank = (starts + np.append(starts[1:], len(scores)) - 1) / 2.0
    within = midrank[tie] - np.flatnonzero(new_user)[user] + 1.0
    positives = np.bincount(user, weights=positive)
    sizes = np.bincount(user)
    pairs = positives * (sizes - positives)
    wins = np.bincount(user, weights=positive * within) - positives * (positives + 1.0) / 2.0
    has_both = pairs > 0
    return wins[has_both] / pairs[has_both], sizes[has_both].astype(np.int64)
