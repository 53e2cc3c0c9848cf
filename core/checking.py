"""Checking: what an update must be before it counts. Plain functions over a block, and a typed reason for each refusal.

Whoever takes updates in asks the same questions: a round of a simulation, and the server's door before it says that an
update was accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GRID, LIMIT
from fedtower.core.cohort import Cohort
from fedtower.core.errors import RecipeError
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.updates import Rows, Updates

Mask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


class Reason(StrEnum):
    """Why an update does not count."""

    NOT_ASKED = "not_asked"
    REPEATED = "repeated"
    OTHER_ROUND = "other_round"
    STALE = "stale"
    UNDECODABLE = "undecodable"
    WRONG_NAMES = "wrong_names"
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    WEIGHT = "weight"
    NUM_EXAMPLES = "num_examples"
    NOT_FINITE = "not_finite"
    TOO_LARGE = "too_large"
    NORM = "norm"
    ROW_REPEATED = "row_repeated"
    ROW_NOT_LEASED = "row_not_leased"
    SURPLUS = "surplus"
    PLUGIN = "plugin"


WORDS: Mapping[Reason, str] = {
    Reason.NOT_ASKED: "it is not of the cohort",
    Reason.REPEATED: "an update of it has come already",
    Reason.OTHER_ROUND: "its update is of another round",
    Reason.STALE: "its update was trained from a version that is too old (asynchronous.max_staleness)",
    Reason.UNDECODABLE: "its bytes are not what the transforms send; are client and server of one version?",
    Reason.WRONG_NAMES: "it sent other parameters or tables than the plan's; is it on an older plan?",
    Reason.WRONG_SHAPE: "it sent parameters in other shapes than the plan's; is it on an older plan?",
    Reason.WRONG_DTYPE: "its deltas are not 32-bit floats",
    Reason.WEIGHT: "its weight is not a number, or negative",
    Reason.NUM_EXAMPLES: "it says it has more examples than checks.max_examples",
    Reason.NOT_FINITE: "its update is not finite; if it is everybody's, lower local.lr",
    Reason.TOO_LARGE: "its update is too large to sum exactly; if it is everybody's, lower local.lr or add 'clip'",
    Reason.NORM: "its update is longer than checks.max_norm; if it is everybody's, add 'clip' or raise the bound",
    Reason.ROW_REPEATED: "it sent a row more than once",
    Reason.ROW_NOT_LEASED: "it sent rows that it was not given",
    Reason.SURPLUS: "the round had all the updates that it needed when this one came",
    Reason.PLUGIN: "a plugin's accept_update refused it",
}


@dataclass(frozen=True)
class CheckSettings:
    """What an update may be at most, besides what it must be."""

    max_norm: float | None = field(
        default=None, metadata={"help": "refuse an update (all deltas as one vector) longer than this"}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "refuse an update that says it was made from more examples than this"}
    )

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_examples"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise RecipeError(f"checks.{name} must be above 0, not {bound}; leave it out to set no bound")


@dataclass(frozen=True)
class Leased:
    """What each client of a block was given of a table: the rows, and how wide one is."""

    rows: RowIds
    width: int


def check(
    block: Updates,
    plan: Plan,
    cohort: Cohort | None,
    settings: CheckSettings,
    leased: Mapping[str, Leased] | None = None,
    stalest: int | None = None,
) -> list[Reason | None]:
    """For each client of a decoded block the first reason to refuse its update, or ``None``.

    ``cohort`` are those who were asked; ``None`` where who reached them has seen to that. ``leased`` is what the
    clients of the block were given, by table, in the order of the block; ``None`` where that is not known. ``stalest``
    is how many rounds behind the plan's an update may be; ``None`` wants the plan's own.
    """
    verdict: list[Reason | None] = [None] * len(block)
    wrong = _form(block, plan, leased)
    if wrong is not None:  # a block has one form: what does not fit can be looked at no further
        return [wrong] * len(block)
    for reason, refused in _refusals(block, plan, cohort, settings, leased or {}, stalest).items():
        if np.any(refused):
            verdict = [held or (reason if bad else None) for held, bad in zip(verdict, refused, strict=True)]
    return verdict


def _form(block: Updates, plan: Plan, leased: Mapping[str, Leased] | None) -> Reason | None:
    """The reason for which nobody's update in this block can be used: names, shapes, types."""
    known = block.rows.keys() <= (leased.keys() if leased is not None else block.rows.keys())
    if block.encoded:
        return Reason.UNDECODABLE
    if block.dense.keys() != plan.parameters.keys() or not known or (block.rows and not plan.train_rows):
        return Reason.WRONG_NAMES
    if any(delta.shape[1:] != plan.parameters[name].shape for name, delta in block.dense.items()):
        return Reason.WRONG_SHAPE
    widths = {table: (given.width,) for table, given in (leased or {}).items()}
    if any(part.row_deltas.shape[1:] != widths.get(t, part.row_deltas.shape[1:]) for t, part in block.rows.items()):
        return Reason.WRONG_SHAPE
    deltas = [*block.dense.values(), *(part.row_deltas for part in block.rows.values())]
    return None if all(delta.dtype == np.float32 for delta in deltas) else Reason.WRONG_DTYPE


def _refusals(
    block: Updates,
    plan: Plan,
    cohort: Cohort | None,
    settings: CheckSettings,
    leased: Mapping[str, Leased],
    stalest: int | None,
) -> dict[Reason, Mask]:
    """For each reason the clients (C,) that it is true of; what comes first is said first."""
    nobody = np.zeros(len(block), dtype=bool)
    unfit = ~np.isfinite(block.weights) | (block.weights < 0)
    weights = np.where(unfit, 0.0, block.weights)
    norm = None if settings.max_norm is None else block.norms
    reach = _reach(block, norm)
    down = block.metrics.get("bytes_down", np.zeros(len(block)))
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite is too large, and what is NaN not finite
        too_large = weights * np.fmax(reach, 1.0) > _share(_MOST_AT_LIMIT if cohort is None else len(cohort))
    strange = {name: part for name, part in block.rows.items() if name not in leased or not _same(part, leased[name])}
    refusals = {
        Reason.NOT_ASKED: nobody if block.clients is None or cohort is None else cohort.places(block.clients) < 0,
        **_of_other_rounds(block, plan, stalest),
        Reason.WEIGHT: unfit,
        Reason.NUM_EXAMPLES: nobody if settings.max_examples is None else block.weights > settings.max_examples,
        Reason.NOT_FINITE: ~np.isfinite(reach) | ~np.isfinite(down) | (down < 0),
        Reason.TOO_LARGE: too_large,
    }
    if norm is not None and settings.max_norm is not None:
        refusals[Reason.NORM] = ~(norm <= settings.max_norm)
    for table, part in strange.items():
        given = part.row_ids >= 0 if table not in leased else _given(part, leased[table].rows)
        for reason, entries in ((Reason.ROW_REPEATED, _repeated(part)), (Reason.ROW_NOT_LEASED, ~given)):
            refusals[reason] = refusals.get(reason, nobody) | _owners_of(part, entries)
    return refusals


def _of_other_rounds(block: Updates, plan: Plan, stalest: int | None) -> dict[Reason, Mask]:
    """Whose update is of a round that does not count here, (C,), by reason."""
    if stalest is None:
        return {Reason.OTHER_ROUND: np.zeros(len(block), bool) if block.rounds is None else block.rounds != plan.round}
    if block.rounds is None:  # what nobody can place cannot be discounted
        return {Reason.OTHER_ROUND: np.ones(len(block), dtype=bool)}
    return {Reason.OTHER_ROUND: block.rounds > plan.round, Reason.STALE: block.rounds < plan.round - stalest}


_MOST_AT_LIMIT = 1024


def _share(clients: int) -> float:
    """How large weight times delta of one client may be. If none of up to 1,024 is larger, their sum on the grid fills
    half of its range at most; a larger cohort is not held to less, because so many are not at the limit together.
    """
    return LIMIT * GRID / (2 * min(max(clients, 1), _MOST_AT_LIMIT))


def _reach(block: Updates, norm: FloatArray | None = None) -> FloatArray:
    """How large no delta of each client is, (C,): their ``norm``, where it is known, or the largest of the block, where
    that is harmless, and else of each client by itself; NaN where one is not a number.
    """
    if norm is not None and np.all(norm <= 1.0):  # no number is larger, and none is NaN
        return norm
    arrays = [*block.dense.values(), *(part.row_deltas for part in block.rows.values())]
    largest = max((_largest(array.reshape(1, -1))[0] for array in arrays), default=0.0, key=_nan_first)
    if largest <= 1.0:  # one pass at the speed of memory; a second one only where something may be wrong
        return np.full(len(block), largest)
    reach = np.zeros(len(block))
    for delta in block.dense.values():
        reach = np.maximum(reach, _largest(delta.reshape(len(block), -1)))
    for part in block.rows.values():
        with np.errstate(invalid="ignore"):  # NaN is what is looked for
            np.maximum.at(reach, part.owners, _largest(part.row_deltas.reshape(len(part.row_deltas), -1)))
    return reach


def _largest(values: NDArray[np.float32]) -> FloatArray:
    """The largest of each line of (n, m), without its sign; NaN where one is not a number."""
    most, least = values.max(axis=1, initial=0.0), values.min(axis=1, initial=0.0)
    return np.asarray(np.maximum(most, -least), dtype=np.float64)


def _nan_first(value: float) -> float:
    return np.inf if np.isnan(value) else value


def _owners_of(part: Rows, entries: Mask) -> Mask:
    """The clients (C,) to whom one of the ``entries`` (R,) belongs."""
    found = np.zeros(len(part.offsets) - 1, dtype=bool)
    if np.any(entries):
        found[part.owners[entries]] = True
    return found


def _same(part: Rows, given: Leased) -> bool:
    """Whether the rows are just those that were given, as runtimes leave them."""
    return np.array_equal(part.row_ids, given.rows.ids) and np.array_equal(part.offsets, given.rows.offsets)


def _repeated(part: Rows) -> Mask:
    """The entries (R,) whose row the same client has sent already."""
    owners, again = part.owners, np.zeros(len(part.row_ids), dtype=bool)
    if np.all((part.row_ids[1:] > part.row_ids[:-1]) | (owners[1:] > owners[:-1])):
        return again  # sorted within each client, as runtimes leave them
    order = np.lexsort((part.row_ids, owners))
    ids, owners = part.row_ids[order], owners[order]
    again[order[1:]] = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1])
    return again


def _given(part: Rows, given: RowIds) -> Mask:
    """The entries (R,) whose row was given to the client that sent it."""
    span = int(given.ids.max(initial=-1)) + 1
    within = (part.row_ids >= 0) & (part.row_ids < span)
    owners = np.repeat(np.arange(len(given.offsets) - 1, dtype=np.int64), np.diff(given.offsets))
    keys = part.owners * span + np.where(within, part.row_ids, 0)
    return within & np.isin(keys, owners * span + given.ids)
