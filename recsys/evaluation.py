"""Evaluation: held-out items ranked among others, by a protocol that the result names.

Two protocols. *Sampled* ranks a target among items drawn from those that the user never touched (or among the
negatives that came with the data). *Full* ranks it among the whole catalogue, less what the user otherwise touched.
Sampled figures are higher and order models differently (Krichene and Rendle, 2020,
https://doi.org/10.1145/3394486.3403226): compare like with like only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.recsys import metrics
from fedtower.recsys.population import Population, blocks
from fedtower.recsys.splits import TEST, TRAIN, VALIDATION, Split

if TYPE_CHECKING:
    from fedtower.core.recipe import EvaluationSettings

IntArray = NDArray[np.int64]
ScoreArray = NDArray[np.float32]
Role = Literal["validation", "test"]

_ROLES: dict[Role, int] = {"validation": VALIDATION, "test": TEST}


@dataclass(frozen=True)
class Cases:
    """Held-out items to rank, one a row.

    Shape:
        clients ``(M,)``, targets ``(M,)`` item rows, cut ``(M,)`` how many of the client's events come before the
        target in time: the history that a model may look at is those events, except other held-out ones.
    """

    clients: IntArray
    targets: IntArray
    cut: IntArray

    def __len__(self) -> int:
        return len(self.clients)

    def batches(self, size: int) -> Iterator[Cases]:
        """The cases in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield Cases(self.clients[rows], self.targets[rows], self.cut[rows])


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on the held-out items of one role.

    ``protocol_label`` says how the figures came about and belongs wherever they are shown; ``metrics`` maps names such
    as ``HR@10`` to figures, in the order in which they are shown.
    """

    role: Role
    protocol_label: str
    metrics: dict[str, float]
    cases: int
    users: int


class MetricSum(NamedTuple):
    """A metric's sum over some held-out items (or users), and how many there were."""

    total: float
    cases: int


class Scorer(Protocol):
    """Whatever can say how much a client would like an item: a trained model, or a baseline.

    Scores are float32, comparable within a row, and must not depend on which other cases are in the call.
    """

    def score(self, clients: IntArray, cut: IntArray, candidates: IntArray) -> ScoreArray:
        """Scores ``(M, N)`` of the item rows ``candidates`` (M, N), where -1 is padding and scores minus infinity."""
        ...

    def score_all(self, clients: IntArray, cut: IntArray) -> ScoreArray:
        """Scores ``(M, I)`` of the whole catalogue."""
        ...


def evaluate(
    scorer: Scorer,
    population: Population,
    split: Split,
    role: Role,
    settings: EvaluationSettings,
    draws: Draws,
    clients: IntArray | None = None,
) -> Evaluation:
    """Rank every held-out item of ``clients`` (default: of everyone), and average.

    The result depends on the seed of ``draws`` and on the data, never on ``settings.batch_size``, which only bounds
    the memory: a batch of scores is at most that many rows. AUC pools the scores of all cases; GAUC is the AUC of a
    case's target against the case's own candidates, averaged within each user and then over users weighted by their
    cases (:func:`fedtower.recsys.metrics.gauc` with cases for impressions), which for one case a user is the
    definition to the letter. Coverage needs whole rankings, so only the full protocol has it.

    Raises:
        DataError: there is no held-out item to rank.
        ScoreError: the model's scores are not finite.
    """
    everyone = np.arange(population.num_clients, dtype=np.int64) if clients is None else clients
    protocol = _protocol(population, split, role, settings, draws)
    tally = _Tally(population.num_items, coverage_at=settings.k if settings.protocol == "full" else ())
    _rank_all(tally, protocol, scorer, population, split, role, settings, everyone)
    if not tally.cases:
        raise DataError(
            f"expected {role} items to rank, but the split {split.kind!r} holds none out for any of {len(everyone)} "
            "clients: their histories are too short for it, or it makes no such part; choose another data.split"
        )
    return Evaluation(role, protocol.label, tally.metrics(settings.k), tally.cases, tally.users)


def evaluate_sums(
    scorer: Scorer,
    population: Population,
    split: Split,
    role: Role,
    settings: EvaluationSettings,
    draws: Draws,
    clients: IntArray,
) -> dict[str, MetricSum]:
    """What ``clients`` add to each figure of :func:`evaluate` that is a mean: a sum, and of how many.

    Added up over all clients they give its HR, NDCG, recall, MRR and GAUC. A device says no more than this of its held
    out items; the AUC over pooled scores and the coverage would need what it ranked, and are left out.
    """
    tally = _Tally(population.num_items, coverage_at=())
    protocol = _protocol(population, split, role, settings, draws)
    _rank_all(tally, protocol, scorer, population, split, role, settings, clients)
    return tally.sums(settings.k) if tally.cases else {}


def _protocol(
    population: Population, split: Split, role: Role, settings: EvaluationSettings, draws: Draws
) -> _Full | _Sampled | _Given:
    if settings.protocol == "full":
        return _Full()
    given = split.kind == "ncf" or (split.kind == "given" and population.held_out(np.zeros(0, np.int64)) is not None)
    return _Given() if role == "test" and given else _Sampled(settings.negatives, draws)


def _rank_all(
    tally: _Tally,
    protocol: _Full | _Sampled | _Given,
    scorer: Scorer,
    population: Population,
    split: Split,
    role: Role,
    settings: EvaluationSettings,
    clients: IntArray,
) -> None:
    for batch in case_batches(population, split, clients, role, settings.batch_size):
        tally.add(batch, *protocol.rank(scorer, population, batch))


def case_batches(population: Population, split: Split, clients: IntArray, role: Role, size: int) -> Iterator[Cases]:
    """The cases of ``clients``, at most ``size`` at a time, of so many clients at most."""
    for start in range(0, len(clients), size):
        yield from make_cases(population, split, clients[start : start + size], role).batches(size)


def make_cases(population: Population, split: Split, clients: IntArray, role: Role) -> Cases:
    """One case for each event of ``clients`` that has this role, in the order of clients and then of time."""
    events = population.events(clients)
    held_out = np.flatnonzero(split.parts(events).where(_ROLES[role]))
    return Cases(events.clients[events.owners[held_out]], events.items[held_out], events.positions[held_out])


def sample_negatives(population: Population, cases: Cases, count: int, draws: Draws) -> IntArray:
    """``count`` different items for each case, drawn uniformly from those that its client never touched.

    Keyed by client and target only, so the same case always meets the same negatives. A draw that hits an item which
    was touched or drawn before is rejected, and the next attempt counts. Where there are not so many items, the rest
    is -1.

    Shape:
        ``(M, count)``
    """
    touched = _Touched(population, cases.clients)
    untouched = population.num_items - touched.counts
    # Rejection is slow where little is left to find: there, all items are put in random order and the first untouched
    # ones taken.
    scarce = untouched < np.maximum(4 * count, population.num_items // 4)
    negatives = np.full((len(cases), count), -1, dtype=np.int64)
    rows, attempts = np.flatnonzero(~scarce), count + count // 4 + 8
    while len(rows):
        key = (cases.clients[rows, None], cases.targets[rows, None], np.arange(attempts, dtype=np.int64))
        drawn = draws.integers(population.num_items, "evaluation/negatives", *key)
        accepted = _first_occurrence(drawn) & ~touched.contains(rows, drawn)
        place = np.cumsum(accepted, axis=1) - 1
        row, attempt = np.nonzero(accepted & (place < count))
        negatives[rows[row], place[row, attempt]] = drawn[row, attempt]
        rows, attempts = rows[place[:, -1] < count - 1], attempts * 2
    items = np.arange(population.num_items, dtype=np.int64)
    for case in np.flatnonzero(scarce):
        keys = draws.bits("evaluation/negatives", int(cases.clients[case]), int(cases.targets[case]), items)
        shuffled = np.argsort(keys, kind="stable")
        found = shuffled[~touched.contains(np.array([case]), shuffled[None])[0]][:count]
        negatives[case, : len(found)] = found
    return negatives


@dataclass(frozen=True)
class ItemPop:
    """The baseline that gives everyone the same list: items by how many training events they have.

    Shape:
        counts ``(I,)``
    """

    counts: ScoreArray

    @classmethod
    def count(cls, population: Population, split: Split, batch_size: int = 4096) -> ItemPop:
        """Count the training events of the whole population, ``batch_size`` clients at a time."""
        counts = np.zeros(population.num_items, dtype=np.int64)
        for clients in blocks(population.num_clients, batch_size):
            events = population.events(clients)
            counts += np.bincount(events.items[split.parts(events).where(TRAIN)], minlength=population.num_items)
        return cls(counts.astype(np.float32))

    def score(self, clients: IntArray, cut: IntArray, candidates: IntArray) -> ScoreArray:
        """The candidates' counts."""
        return np.where(candidates < 0, np.float32(-np.inf), self.counts[candidates])

    def score_all(self, clients: IntArray, cut: IntArray) -> ScoreArray:
        """Everybody's counts, the same for each client."""
        return np.broadcast_to(self.counts, (len(clients), len(self.counts)))


class _Sampled:
    """Ranks a target among drawn negatives."""

    def __init__(self, count: int, draws: Draws) -> None:
        self.count, self.draws = count, draws
        self.label = f"sampled, {count} negatives"

    def rank(self, scorer: Scorer, population: Population, cases: Cases) -> tuple[ScoreArray, ScoreArray, ScoreArray]:
        return _among(scorer, cases, sample_negatives(population, cases, self.count, self.draws))


class _Given:
    """Ranks a target among the negatives that came with the data, exactly as they came.

    156 of the NCF paper's 597,960 negatives for MovieLens 1M are the user's target itself. Such a one ties with the
    target and so counts against it: ItemPop's HR@10 is .452 with them and .453 without.
    """

    label = "given negatives (NCF)"

    def rank(self, scorer: Scorer, population: Population, cases: Cases) -> tuple[ScoreArray, ScoreArray, ScoreArray]:
        given = population.held_out(cases.clients)
        assert given is not None, "a split of kind ncf is only made where the data came with one"
        return _among(scorer, cases, given.negatives)


def _among(scorer: Scorer, cases: Cases, negatives: IntArray) -> tuple[ScoreArray, ScoreArray, ScoreArray]:
    """The scores of the targets, of the negatives, and of both."""
    candidates = np.concatenate([cases.targets[:, None], negatives], axis=1)
    scores = np.where(candidates < 0, np.float32(-np.inf), scorer.score(cases.clients, cases.cut, candidates))
    return scores[:, 0], scores[:, 1:], scores


class _Full:
    """Ranks a target among all items but those of the client's other events."""

    label = "full ranking"

    def rank(self, scorer: Scorer, population: Population, cases: Cases) -> tuple[ScoreArray, ScoreArray, ScoreArray]:
        everything = np.array(scorer.score_all(cases.clients, cases.cut), dtype=np.float32)
        rows = np.arange(len(cases))
        target_scores = everything[rows, cases.targets]
        everything[_Touched(population, cases.clients).pairs()] = -np.inf
        others = everything.copy()
        everything[rows, cases.targets] = target_scores
        return target_scores, others, everything


class _Touched:
    """Which items the clients of some cases have touched, in any role."""

    def __init__(self, population: Population, clients: IntArray) -> None:
        distinct, self._owner = np.unique(clients, return_inverse=True)
        self._events = population.events(distinct)
        self._num_items = population.num_items
        self._keys = np.unique(self._events.owners * self._num_items + self._events.items)
        self.counts = np.bincount(self._keys // self._num_items, minlength=len(distinct))[self._owner]

    def contains(self, cases: IntArray, items: IntArray) -> NDArray[np.bool_]:
        """Whether the client of each of ``cases`` (m,) touched each of ``items`` (m, n)."""
        keys = self._owner[cases, None] * self._num_items + items
        found = np.searchsorted(self._keys, keys)
        return np.asarray(self._keys[np.minimum(found, len(self._keys) - 1)] == keys)

    def pairs(self) -> tuple[IntArray, IntArray]:
        """(case, item) of every item that the case's client touched."""
        starts, lengths = self._events.offsets[:-1][self._owner], self._events.lengths[self._owner]
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)
        return np.repeat(np.arange(len(lengths)), lengths), self._events.items[positions]


class _Tally:
    """What is kept of each case: its rank, its AUC and its user; and sums that do not grow with the cases."""

    def __init__(self, num_items: int, coverage_at: tuple[int, ...]) -> None:
        self._ranks: list[IntArray] = []
        self._aucs: list[NDArray[np.float64]] = []
        self._users: list[IntArray] = []
        self._pooled = metrics.PooledAUC()
        self._listed = {k: np.zeros(num_items, dtype=np.bool_) for k in coverage_at}

    def add(self, cases: Cases, target_scores: ScoreArray, other_scores: ScoreArray, all_scores: ScoreArray) -> None:
        self._ranks.append(metrics.ranks(target_scores, other_scores))
        self._aucs.append(_case_auc(target_scores, other_scores))
        self._users.append(cases.clients)
        self._pooled.add(target_scores, other_scores)
        if self._listed:
            lists = metrics.top_lists(all_scores, max(self._listed))
            for k, listed in self._listed.items():
                listed[lists[:, :k][lists[:, :k] >= 0]] = True

    @property
    def cases(self) -> int:
        return sum(map(len, self._ranks))

    @property
    def users(self) -> int:
        return len(np.unique(np.concatenate(self._users)))

    def metrics(self, ks: tuple[int, ...]) -> dict[str, float]:
        ranks, users, aucs = np.concatenate(self._ranks), np.concatenate(self._users), np.concatenate(self._aucs)
        figures = {f"HR@{k}": metrics.hit_rate(ranks, k) for k in ks}
        figures |= {f"NDCG@{k}": metrics.ndcg(ranks, k) for k in ks}
        figures |= {f"recall@{k}": metrics.recall(ranks, users, k) for k in ks}
        figures |= {"MRR": metrics.mrr(ranks)}
        compared = ~np.isnan(aucs)
        if compared.any():
            # Each user's mean, weighted by the user's cases, is the mean over all cases.
            figures |= {"AUC": self._pooled.value(), "GAUC": float(np.mean(aucs[compared]))}
        figures |= {f"coverage@{k}": float(np.mean(listed)) for k, listed in self._listed.items()}
        return figures

    def sums(self, ks: tuple[int, ...]) -> dict[str, MetricSum]:
        ranks, users, aucs = np.concatenate(self._ranks), np.concatenate(self._users), np.concatenate(self._aucs)
        cases, people = len(ranks), len(np.unique(users))
        compared = ~np.isnan(aucs)
        sums = {f"HR@{k}": MetricSum(metrics.hit_rate(ranks, k) * cases, cases) for k in ks}
        sums |= {f"NDCG@{k}": MetricSum(metrics.ndcg(ranks, k) * cases, cases) for k in ks}
        sums |= {f"recall@{k}": MetricSum(metrics.recall(ranks, users, k) * people, people) for k in ks}
        sums |= {"MRR": MetricSum(metrics.mrr(ranks) * cases, cases)}
        return sums | {"GAUC": MetricSum(float(np.sum(aucs[compared])), int(np.count_nonzero(compared)))}


def _case_auc(target_scores: ScoreArray, other_scores: ScoreArray) -> NDArray[np.float64]:
    """The AUC of each target against the case's own candidates, a tie counting half; not a number without any."""
    candidates = np.count_nonzero(~np.isneginf(other_scores), axis=1)
    losses = np.count_nonzero(other_scores > target_scores[:, None], axis=1)
    ties = np.count_nonzero(other_scores == target_scores[:, None], axis=1)
    return np.where(candidates > 0, 1.0 - (losses + 0.5 * ties) / np.maximum(candidates, 1), np.nan)


def _first_occurrence(drawn: IntArray) -> NDArray[np.bool_]:
    """Whether each entry of a row is the first of its value."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    first = np.ones(drawn.shape, dtype=np.bool_)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first
