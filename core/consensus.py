"""Consensus: what the clients of a cohort say together, by a rule that has to hear all of them.

The shared parameters are one question, put to everybody; each row of a table is another, put to those who touched it:
over all clients, nearly everybody would answer 0 for nearly every row. A rule answers many questions at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import refuse_repeated_rows, refuse_unfit
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.updates import Rows, Updates, flat, stack

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

CoordinateRule = Callable[[FloatArray], FloatArray]
"""Of what t clients say to each of m questions, (m, t, d), the answers, (m, d): each coordinate by itself."""

VectorRule = Callable[[FloatArray, FloatArray], FloatArray]
"""Of the squared distances between what they say, (m, t, t), and their weights, (m, t), each one's share of the answer,
(m, t), which sum to 1.
"""

ROOM = 1 << 22  # numbers that are looked at at a time


def gathered(blocks: Iterable[Updates], weights: Literal["examples", "equal"] = "equal") -> Updates:
    """The clients with weight, all of them held in memory, in the order of their ids; with ``equal`` each weighs 1.

    Raises:
        UpdateError: nobody has weight; or an update that is not fit to be folded.
        ShapeMismatch: clients that do not send what the first ones sent.
    """
    cohort = stack(block for block in blocks if len(block))
    refuse_unfit(cohort, cohort.weights)
    _refuse_not_finite(cohort)
    for table, part in cohort.rows.items():
        refuse_repeated_rows(table, part, part.owners, cohort)
    order = np.arange(len(cohort)) if cohort.clients is None else np.argsort(cohort.clients, kind="stable")
    order = order[cohort.weights[order] > 0]
    if not len(order):
        raise UpdateError("there is nothing to fold: no client sent an update with a positive weight")
    if len(order) < len(cohort) or np.any(order[1:] < order[:-1]):
        cohort = cohort.pick(order)
    return cohort if weights == "examples" else replace(cohort, weights=np.ones(len(cohort)))


def assumed(share: float, clients: int) -> int:
    """How many of so many clients are taken to be attackers: ``share`` of them, rounded up, and always fewer than half.

    >>> [assumed(0.1, clients) for clients in (1, 2, 3, 10, 11)]
    [0, 0, 1, 1, 2]
    """
    return min(int(np.ceil(share * clients - 1e-9)), (clients - 1) // 2)


def refuse_rule(share: float, rows_least: int) -> None:
    """Raise RecipeError for a share of attackers or a number of clients that no rule can work with."""
    if not 0 <= share < 0.5:
        raise RecipeError(
            f"aggregator.attackers must be at least 0 and below 0.5, not {share}: no rule outvotes half of the clients"
        )
    if rows_least < 1:
        raise RecipeError(f"aggregator.rows_least must be at least 1, not {rows_least}: nobody touched the other rows")


@dataclass(frozen=True)
class Consensus:
    """The total of a cohort that was :func:`gathered`. A row that fewer than ``rows_least`` clients touched is left out
    of it, and so stays as it is.
    """

    cohort: Updates
    rows_least: int = 1

    def by_coordinate(self, rule: CoordinateRule) -> Updates:
        """Each coordinate by itself."""
        dense = {}
        for name, delta in self.cohort.dense.items():
            answers = [rule(part[None])[0] for part in _pieces(delta)]
            dense[name] = np.concatenate(answers).astype(np.float32).reshape(1, *delta.shape[1:])
        return self._total(dense, lambda said, _: rule(said))

    def by_vector(self, rule: VectorRule) -> Updates:
        """All shared parameters as one vector, and each row as one."""
        cohort = self.cohort
        products = np.zeros((len(cohort), len(cohort)))
        for delta in cohort.dense.values():
            for part in _pieces(delta):
                products += part @ part.T
        shares = rule(_squared_distances(products[None]), cohort.weights[None])[0]
        dense = {
            name: np.concatenate([shares @ part for part in _pieces(delta)])
            .astype(np.float32)
            .reshape(1, *delta.shape[1:])
            for name, delta in cohort.dense.items()
        }
        return self._total(dense, lambda said, weights: _mixed(said, weights, rule))

    def _total(
        self,
        dense: Mapping[str, NDArray[np.float32]],
        answer: Callable[[FloatArray, FloatArray], FloatArray],
    ) -> Updates:
        cohort = self.cohort
        rows = {table: self._of_rows(part, answer) for table, part in cohort.rows.items()}
        return Updates(weights=cohort.weights.sum(keepdims=True), dense=dense, rows=rows)

    def _of_rows(self, part: Rows, answer: Callable[[FloatArray, FloatArray], FloatArray]) -> Rows:
        weight_of = self.cohort.weights[part.owners]
        ids, answers, weights = [part.row_ids[:0]], [part.row_deltas[:0]], [weight_of[:0]]
        for rows, entries in _questions(part, self.rows_least):
            ids.append(rows)
            weights.append(weight_of[entries].sum(axis=1))
            answers.append(answer(part.row_deltas[entries].astype(np.float64), weight_of[entries]).astype(np.float32))
        row_ids = np.concatenate(ids)
        order = np.argsort(row_ids)
        offsets = np.array([0, len(row_ids)], dtype=np.int64)
        return Rows(offsets, row_ids[order], np.concatenate(answers)[order], np.concatenate(weights)[order])


def _questions(part: Rows, least: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Rows (m,) that equally many clients touched, ``least`` or more, and the entries of those who did, (m, t), in the
    order of the cohort.
    """
    order = np.lexsort((part.owners, part.row_ids))
    ids, starts, counts = np.unique(part.row_ids[order], return_index=True, return_counts=True)
    for count in np.unique(counts[counts >= least]).tolist():
        rows = np.flatnonzero(counts == count)
        width = max(ROOM // (count * max(count, *part.row_deltas.shape[1:])), 1)
        for start in range(0, len(rows), width):
            some = rows[start : start + width]
            yield ids[some], order[starts[some][:, None] + np.arange(count)]


def _pieces(delta: NDArray[np.float32]) -> Iterator[FloatArray]:
    """A parameter's deltas as the columns of (n, P), some at a time, in double precision."""
    vectors = flat(delta)
    width = max(ROOM // len(vectors), 1)
    for start in range(0, vectors.shape[1], width):
        yield vectors[:, start : start + width].astype(np.float64)


def _squared_distances(products: FloatArray) -> FloatArray:
    """Of the inner products (m, t, t) of vectors the squares of their distances, (m, t, t)."""
    squares = np.diagonal(products, axis1=1, axis2=2)
    # The products are rounded: the distance of equal vectors may come out a little below 0.
    distances: FloatArray = np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0.0)
    distances[:, np.arange(squares.shape[1]), np.arange(squares.shape[1])] = 0.0
    return distances


def _mixed(said: FloatArray, weights: FloatArray, rule: VectorRule) -> FloatArray:
    """The vectors (m, t, d) by the shares that a rule gives them, (m, d)."""
    shares = rule(_squared_distances(said @ said.transpose(0, 2, 1)), weights)
    mixed: FloatArray = (shares[:, None, :] @ said)[:, 0]
    return mixed


def _refuse_not_finite(cohort: Updates) -> None:
    for name, delta in cohort.dense.items():
        unfit = np.any(~np.isfinite(flat(delta)), axis=1)
        if unfit.any():
            raise _not_finite(name, cohort, unfit)
    for table, part in cohort.rows.items():
        bad = np.any(~np.isfinite(part.row_deltas), axis=1)
        if bad.any():
            whose = np.isin(np.arange(len(cohort)), part.owners[bad])
            raise _not_finite(f"rows of {table}", cohort, whose)


def _not_finite(name: str, cohort: Updates, unfit: NDArray[np.bool_]) -> UpdateError:
    return UpdateError(
        f"the update of {name!r} by {cohort.who(unfit)} is not finite; refuse it before it is folded (a plugin's "
        f"accept_update), or lower local.lr if it is everybody's"
    )
