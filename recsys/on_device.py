"""What a device does with its one shard: it makes batches of it, and ranks its held-out items with the forward graph.

Everything here needs only numpy and the bundle's engine. Rows come by id from a :class:`~fedtower.core.rows.RowReader`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtower.core.client import ClientData
from fedtower.core.draws import Draws
from fedtower.core.rows import RowReader
from fedtower.recsys import metrics
from fedtower.recsys.batches import SequenceData
from fedtower.recsys.device import BundleScorer
from fedtower.recsys.evaluation import MetricSum, Role, evaluate_sums
from fedtower.recsys.examples import ExampleData, Examples
from fedtower.recsys.history import Split, look_back, make_split
from fedtower.recsys.shards import Shard, ShardedExamples, ShardedHistories, opened

if TYPE_CHECKING:
    from fedtower.core.recipe import EvaluationSettings

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Held:
    """What one device holds of a person, and the draws of the federation that it takes part in."""

    shard: Shard
    draws: Draws

    @property
    def client(self) -> IntArray:
        """The device's client, (1,)."""
        return np.array([self.shard.client], dtype=np.int64)

    @property
    def num_examples(self) -> int:
        """How many training examples there are: labelled ones, or events."""
        data = opened(None, [self.shard])
        if isinstance(data, ShardedExamples):
            return len(data.examples(self.client).labels)
        return int(np.count_nonzero(data.roles(self.client) == 0))

    def data(self) -> ClientData:
        """The shard as a client's data: its batches are those that a simulation makes of it, to the bit."""
        data = opened(None, [self.shard])
        if isinstance(data, ShardedExamples):
            return ExampleData(data, self.draws)
        return SequenceData(data, self._split(data), self.draws)

    def judge(
        self,
        scorer: BundleScorer,
        rows: RowReader | None,
        own: Mapping[str, FloatArray],
        role: Role,
        settings: EvaluationSettings,
    ) -> dict[str, MetricSum]:
        """Sums of metrics over the device's held-out items of a role, and of how many; nothing if it has none.

        ``own`` are the parameters that it judges with in place of those that were sent. Of classes, a device that has
        some is one case, whose figures are those of the classes that it trains on, as often as it has them.
        """
        data = opened(None, [self.shard])
        if isinstance(data, ShardedExamples):
            held = data.held_out(role)
            if own and data.num_classes:
                return self._of_known_classes(scorer, rows, own, data, held)
            if not len(held.labels):
                return {}
            figures = metrics.of_classes if data.num_classes else metrics.of_clicks
            means, count = figures(_logits(scorer, rows, own, held), held.labels), len(held.labels)
            # An AUC is no mean over examples: that of all devices' examples cannot be told from theirs.
            return {name: MetricSum(mean * count, count) for name, mean in means.items() if name != "AUC"}
        assert rows is not None  # a model of histories has rows of items
        split = self._split(data)
        ranking = ShardScorer(scorer, rows, own, data, split, role)
        return evaluate_sums(ranking, data, split, role, settings, self.draws, self.client)

    def _of_known_classes(
        self,
        scorer: BundleScorer,
        rows: RowReader | None,
        own: Mapping[str, FloatArray],
        data: ShardedExamples,
        held: Examples,
    ) -> dict[str, MetricSum]:
        known = data.examples(self.client).labels
        shown = _chosen(held, np.flatnonzero(np.isin(held.labels, known)))
        if not len(shown.labels):
            return {}
        figures = metrics.of_known_classes(_logits(scorer, rows, own, shown), shown.labels, known)
        return {name: MetricSum(value, 1) for name, value in figures.items()}

    def _split(self, data: ShardedHistories) -> Split:
        return make_split("given", data, validation=True, draws=self.draws)


@dataclass(frozen=True, eq=False)
class ShardScorer:
    """A :class:`~fedtower.recsys.evaluation.Scorer` of one device: rows are fetched by id, scores come from the forward
    graph.
    """

    scorer: BundleScorer
    rows: RowReader
    own: Mapping[str, FloatArray]
    data: ShardedHistories
    split: Split
    role: Role

    def score(self, clients: IntArray, cut: IntArray, candidates: IntArray) -> FloatArray:
        """Scores (M, N) of the candidates (M, N), where -1 is padding and scores minus infinity."""
        manifest = self.scorer.bundle.manifest
        assert manifest.rows is not None
        length = manifest.settings.history_length
        items, count = look_back(self.data, self.split, self.role, clients, cut, length)
        out = np.full(candidates.shape, -np.inf, dtype=np.float32)
        user = self.data.user_features(clients)
        for case in range(len(clients)):
            history, real = items[case, : count[case]], candidates[case] >= 0
            needed, where = np.unique(np.concatenate([history, candidates[case][real]]), return_inverse=True)
            fetched = self.rows.fetch(manifest.rows.source, needed)[where]
            seen, wanted = fetched[: len(history)], fetched[len(history) :]
            out[case, real] = self.scorer.score(seen, user[case], wanted, self.own)
        return out

    def score_all(self, clients: IntArray, cut: IntArray) -> FloatArray:
        """Scores (M, I) of the whole catalogue: every row of it is fetched."""
        everything = np.broadcast_to(
            np.arange(self.data.num_items, dtype=np.int64), (len(clients), self.data.num_items)
        )
        return self.score(clients, cut, everything)


def _chosen(held: Examples, at: IntArray) -> Examples:
    """The examples ``at`` (n,) of one client."""
    offsets = np.array([0, len(at)], dtype=np.int64)
    return Examples(held.clients, offsets, held.dense[at], held.categories[at], held.labels[at])


def _logits(scorer: BundleScorer, rows: RowReader | None, own: Mapping[str, FloatArray], held: Examples) -> FloatArray:
    """The logits of labelled examples, (E,) or (E, K), in batches of the size that the graph was made for."""
    manifest = scorer.bundle.manifest
    size = manifest.settings.batch_size
    out = []
    for start in range(0, len(held.labels), size):
        at = np.minimum(np.arange(start, start + size), len(held.labels) - 1)  # the last batch repeats its last example
        real = min(size, len(held.labels) - start)
        slots = {}
        if manifest.rows is not None:
            assert rows is not None
            ids, where = np.unique(held.categories[at], return_inverse=True)
            fetched = rows.fetch(manifest.rows.source, ids)
            slots = {"category": fetched[where.reshape(held.categories[at].shape)]}
        inputs = {"dense": held.dense[at], "label": held.labels[at], "weight": np.ones(size, dtype=np.float32)}
        used = {port.name for port in manifest.graphs["forward"].inputs if port.role == "input"}
        logits = scorer.logits(slots, {name: value for name, value in inputs.items() if name in used}, own)
        out.append(logits[:real])
    return np.concatenate(out)
