"""Examples: labelled rows that clients hold, and what training and evaluation ask of a data set of them.

An example has a dense part (numbers, or an image), the rows of its categories, and a label. Categories of all fields
are numbered through, field after field, so that one id names one row. Everything here needs only numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import localise
from fedtower.core.runtime import Work
from fedtower.recsys.phases import phased
from fedtower.recsys.population import check_rows

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of C clients, one client's after another's.

    Shape:
        clients ``(C,)``, offsets ``(C+1,)``, dense ``(E, *shape)``, categories ``(E, F)`` row ids of ``category``,
        labels ``(E,)``: 0 and 1, or a class.
    """

    clients: IntArray
    offsets: IntArray
    dense: FloatArray
    categories: IntArray
    labels: FloatArray

    def __post_init__(self) -> None:
        if not len(self.dense) == len(self.categories) == len(self.labels) == self.offsets[-1]:
            raise DataError(
                f"examples need as many dense parts, categories and labels as the offsets say, but there are "
                f"{len(self.dense)}, {len(self.categories)} and {len(self.labels)} for {self.offsets[-1]}"
            )

    @property
    def lengths(self) -> IntArray:
        """How many examples each client has, ``(C,)``."""
        return np.diff(self.offsets)

    @cached_property
    def owners(self) -> IntArray:
        """The position 0 .. C-1 of every example's client, ``(E,)``."""
        return np.repeat(np.arange(len(self.clients), dtype=np.int64), self.lengths)

    def take(self, clients: IntArray) -> Examples:
        """The examples of the clients at these positions."""
        starts = self.offsets[clients]
        offsets = np.concatenate([[0], np.cumsum(self.offsets[clients + 1] - starts)]).astype(np.int64)
        at = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], np.diff(offsets))
        return Examples(self.clients[clients], offsets, self.dense[at], self.categories[at], self.labels[at])


@dataclass(frozen=True)
class ExampleCard:
    """What a reader wants to know of labelled examples before their figures."""

    name: str
    clients: int
    training: int
    validation: int
    test: int
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values."""
        return {
            "name": self.name,
            "clients": self.clients,
            "training examples": self.training,
            "validation examples": self.validation,
            "test examples": self.test,
            "extra": dict(self.extra),
        }


@runtime_checkable
class ExampleSet(Protocol):
    """All that training and evaluation ask of labelled examples: who holds which for training, and what is held out."""

    @property
    def num_clients(self) -> int: ...
    @property
    def dense_shape(self) -> tuple[int, ...]: ...
    @property
    def cardinalities(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def counted_over_everyone(self) -> bool: ...
    @property
    def card(self) -> ExampleCard: ...

    def examples(self, clients: IntArray) -> Examples:
        """The training examples of these clients."""

    def held_out(self, role: Literal["validation", "test"]) -> Examples:
        """The held-out examples, as one client's; they belong to nobody who trains."""


@runtime_checkable
class HeldOutByClients(Protocol):
    """A set of examples of which each client holds some out itself."""

    def held_out_by(self, client: int, role: Literal["validation", "test"]) -> Examples:
        """What this client holds out, as one client's."""


@dataclass(frozen=True, eq=False)
class ExampleTable:
    """A set of examples in memory.

    ``counted_over_everyone`` says that the categories' rows come from a vocabulary of all clients' values: to learn it
    is to leak it, so only standalone training may.
    """

    card: ExampleCard
    training: Examples
    validation: Examples
    test: Examples
    cardinalities: tuple[int, ...] = ()
    num_classes: int = 0
    counted_over_everyone: bool = False

    @property
    def num_clients(self) -> int:
        """How many clients hold training examples."""
        return len(self.training.clients)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of one example's dense part."""
        return tuple(self.training.dense.shape[1:])

    def examples(self, clients: IntArray) -> Examples:
        """The training examples of these clients."""
        return self.training.take(check_rows(clients, self.num_clients, "client"))

    def held_out(self, role: Literal["validation", "test"]) -> Examples:
        """The held-out examples."""
        return self.validation if role == "validation" else self.test


class ExampleDataset(Protocol):
    """The seam that a data set plugin of labelled examples fills."""

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> ExampleSet:
        """The examples; ``progress`` is told, in a few words, what takes long."""


@dataclass(frozen=True)
class ExampleData:
    """The clients of an example set as shuffled batches.

    A client's examples are an endless stream, every epoch of it shuffled anew, and a visit takes the part whose turn
    it is in that round. So a client that takes part in every round meets each example once before it meets one again:
    where values are rare, as in clicks, meeting some twice and some never costs much of what can be learnt.

    ``work()`` gives the inputs ``dense`` (C, S, B, *shape), ``label`` and ``weight`` (C, S, B), 0 for padding, and,
    where the data has categories, the slots ``category`` (C, S, B, F); and :func:`~fedtower.recsys.phases.phased`.
    """

    examples: ExampleSet
    draws: Draws

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """One visit of each client: its next examples, in an order of its own."""
        held = self.examples.examples(clients)
        work = batches_of(held, *self._places(held, plan.round, plan.local), bool(self.examples.cardinalities))
        return phased(work, plan.local)

    def _places(self, held: Examples, round: int, local: LocalSettings) -> tuple[IntArray, IntArray]:
        """Which example is at each place, (C, S, B), -1 for padding, and how many steps each client has, (C,)."""
        start, stop = _turn(held.lengths, round, local)
        steps = -(-(stop - start) // local.batch_size)
        at = np.full((len(held.clients), max(int(steps.max(initial=0)), 1), local.batch_size), -1, dtype=np.int64)
        epoch, length = start // np.maximum(held.lengths, 1), held.lengths[held.owners]
        rank = np.arange(len(held.owners), dtype=np.int64) - held.offsets[:-1][held.owners]
        while np.any((epoch * held.lengths < stop) & (held.lengths > 0)):
            key = self.draws.bits("examples", held.clients[held.owners], epoch[held.owners], rank)
            order = np.lexsort((key, held.owners))  # owners stay where they are: it is each one's examples that move
            place = epoch[held.owners] * length + rank
            taken = (place >= start[held.owners]) & (place < stop[held.owners])
            owner, place = held.owners[taken], (place - start[held.owners])[taken]
            at[owner, place // local.batch_size, place % local.batch_size] = order[taken]
            epoch = epoch + 1
        return at, steps


def _turn(lengths: IntArray, round: int, local: LocalSettings) -> tuple[IntArray, IntArray]:
    """Which part of its stream each client takes in a round: from where to where, both (C,)."""
    if local.epochs is None:
        size = np.minimum(lengths, (local.steps or 1) * local.batch_size)
        return (round - 1) * size, round * size
    # The tiny number keeps, say, three times a third of 30 examples from being 9.999.
    each = local.share * local.epochs * lengths + 1e-9
    return (each * (round - 1)).astype(np.int64), (each * round).astype(np.int64)


def batches_of(held: Examples, at: IntArray, steps: IntArray, with_categories: bool) -> Work:
    """The work of clients whose batches hold the examples ``at`` (C, S, B), -1 for padding."""
    real = at >= 0
    if not len(held.labels):  # there is nobody's example that padding could repeat
        held = Examples(
            held.clients,
            np.append(np.zeros(len(held.clients), dtype=np.int64), 1),
            np.zeros((1, *held.dense.shape[1:]), dtype=np.float32),
            np.zeros((1, held.categories.shape[1]), dtype=np.int64),
            np.zeros(1, dtype=np.float32),
        )
    # Padding repeats the first example of the visit, whose rows the client needs anyway.
    own = np.minimum(held.offsets[:-1], len(held.labels) - 1)
    first = np.where(real[:, 0, 0], at[:, 0, 0], own)[:, None, None]
    at = np.where(real, at, first)
    inputs = {"dense": held.dense[at], "label": held.labels[at], "weight": real.astype(np.float32)}
    examples = real.sum(axis=(1, 2)).astype(np.int64)
    if not with_categories:
        return Work(held.clients, steps, examples, inputs)
    ids = held.categories[at]
    needed, where = localise(ids.reshape(len(ids), -1))
    return Work(held.clients, steps, examples, inputs, {"category": where.reshape(ids.shape)}, {"category": needed})
