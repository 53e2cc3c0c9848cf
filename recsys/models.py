"""What a model declares: tables and towers with a Placement; everything that trains or serves it is written elsewhere,
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtower.core.errors import FedtowerError, RecipeError
from fedtower.recsys.losses import LABELLING, RANKING, loss_of


@dataclass(frozen=True)
class Schema:
    """What a model has to know of the data: sizes only."""

    num_items: int
    num_user_features: int
    num_item_features: int
    history_length: int


@dataclass(frozen=True)
class ExampleSchema:
    """What a model has to know of labelled examples: the shape of the dense part, the categories, the classes.

    ``cardinalities`` are the numbers of values of each categorical field; rows of ``category`` are numbered through all
    fields, one after another. ``num_classes`` is 0 for a label that is 0 or 1.
    """

    dense: tuple[int, ...]
    cardinalities: tuple[int, ...] = ()
    num_classes: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows all fields have together."""
        return sum(self.cardinalities)

    @property
    def num_dense(self) -> int:
        """How many numbers an example's dense part has."""
        return prod(self.dense)


def as_sequences(schema: Schema | ExampleSchema, model: str) -> Schema:
    """The schema of a data set of histories. Raises RecipeError when the data holds labelled examples."""
    if not isinstance(schema, Schema):
        raise RecipeError(
            f"the model {model!r} learns from histories of items, but the data set holds labelled examples; choose "
            f"another "
            f"model.name, or a data set such as synthetic or movielens"
        )
    return schema


def as_examples(schema: Schema | ExampleSchema, model: str) -> ExampleSchema:
    """The schema of a data set of labelled examples. Raises RecipeError when the data holds histories."""
    if not isinstance(schema, ExampleSchema):
        raise RecipeError(
            f"the model {model!r} learns from labelled examples, but the data set holds histories of items; choose "
            f"another "
            f"model.name, such as dssm, or a data set such as criteo"
        )
    return schema


def as_clicks(schema: Schema | ExampleSchema, model: str) -> ExampleSchema:
    """The schema of examples with categories and a label that is 0 or 1. Raises RecipeError for any other data."""
    schema = as_examples(schema, model)
    if not schema.cardinalities or schema.num_classes:
        raise RecipeError(
            f"the model {model!r} tells a label that is 0 or 1 from categories and numbers, but the data set has "
            f"{len(schema.cardinalities)} categorical fields and {schema.num_classes or 'no'} classes; choose a "
            f"model.name such as mlp, or a data set such as criteo"
        )
    return schema


def as_dense(schema: Schema | ExampleSchema, model: str) -> ExampleSchema:
    """The schema of examples without categories. Raises RecipeError for any other data."""
    schema = as_examples(schema, model)
    if schema.cardinalities:
        raise RecipeError(
            f"the model {model!r} has no rows for categories, but the data set has {len(schema.cardinalities)} "
            f"categorical fields; choose a model.name such as wide_deep or dlrm"
        )
    return schema


def as_images(schema: Schema | ExampleSchema, model: str, smallest: int) -> tuple[ExampleSchema, tuple[int, int, int]]:
    """The schema of classified images, at least ``smallest`` high and wide, and their channels, height and width.
    Raises RecipeError for any other data.
    """
    schema = as_dense(schema, model)
    shape = schema.dense if len(schema.dense) == 3 else (1, *schema.dense)
    if len(shape) != 3 or min(shape[1:]) < smallest or not schema.num_classes:
        raise RecipeError(
            f"the model {model!r} classifies images of {smallest} x {smallest} and more, but an example of this data "
            f"set has the shape {schema.dense} and {schema.num_classes or 'no'} classes; choose a model.name such as "
            f"mlp, or a data set such as mnist"
        )
    return schema, shape


@dataclass(frozen=True)
class Table:
    """An embedding table in the cloud, drawn from a normal distribution with deviation ``scale``; ``dim`` is a
    multiple of 4.
    """

    name: str
    num_rows: int
    dim: int
    scale: float

    def __post_init__(self) -> None:
        if self.dim % 4 or self.dim < 4:
            raise FedtowerError(
                f"the table {self.name!r} has dimension {self.dim}, but the tables' kernels need a multiple of 4; "
                f"round it up and let the "
                f"tower use what it needs"
            )


class CloudTower(nn.Module):
    """Computes the rows that devices see from the rows of tables: ``forward(rows (n, sum of dims), features (n, F)) ->
    (n, W)``.
    """

    width: int

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        """The rows as devices see them."""
        raise NotImplementedError


class PlainRows(CloudTower):
    """The rows of the tables side by side, as they are: no tower at all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        """The rows, unchanged."""
        return rows


class SharedTower(nn.Module):
    """What trains on the device. One call is one step's batch of B examples.

    Everything that is drawn or learnt is in the parameters; a tower has no buffers, no dropout, and does not know how
    it is run. Most towers are a :class:`SequenceTower` or an :class:`ExampleTower`.
    """

    def check_loss(self, loss: str) -> None:
        """Refuse a loss that this kind of tower does not have, before anything is trained.

        Raises:
            RecipeError: there is no such loss here.
        """

    def losses(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor], loss: str) -> Tensor:
        """The training loss of each example, ``(B,)``, from the rows of its slots and its inputs."""
        raise NotImplementedError


class SequenceTower(SharedTower):
    """From a history of rows to user vectors, and from those to scores: B targets in one stretch of T events.

    Slots are ``history`` (T, W) and ``negatives`` (N, W); inputs ``target`` (B,) and ``user`` (F,).
    """

    def represent(self, history: Tensor, target: Tensor, user: Tensor) -> Tensor:
        """The user as seen by each target: only the slots before ``target[b]`` may be looked at.

        Shape:
            history ``(T, W)``, oldest first; target ``(B,)``, 0 .. T; user ``(F,)`` -> ``(B, D)``
        """
        raise NotImplementedError

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """How well each item suits each user vector.

        Shape:
            vectors ``(B, D)``, rows ``(n, W)`` -> ``(B, n)``
        """
        raise NotImplementedError

    def check_loss(self, loss: str) -> None:
        """A loss over sampled negatives."""
        loss_of(RANKING, loss)

    def losses(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor], loss: str) -> Tensor:
        """How badly each target ranks among the negatives, given what came before it."""
        return loss_of(RANKING, loss)(*self.scores(slots, inputs))

    def scores(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores of the targets ``(B,)`` and of the negatives ``(B, N)``."""
        history, target = slots["history"], inputs["target"]
        vectors = self.represent(history, target, inputs["user"])
        # All slots are scored and the target's is picked by a mask: one product, and no gather in the exported graph.
        own = target[:, None] == torch.arange(history.shape[0], device=history.device)[None, :]
        positive = torch.where(own, self.score(vectors, history), 0.0).sum(dim=1)
        return positive, self.score(vectors, slots["negatives"])


@runtime_checkable
class InnerProduct(Protocol):
    """A sequence tower whose score is an inner product, ``score(v, r) = queries(v) @ keys(r).T``: the items that suit a
    user can then be looked up in an index. A bias of an item is one more dimension, in which every query is 1.
    """

    def queries(self, vectors: Tensor) -> Tensor:
        """User vectors ``(B, D)`` as an index is asked with them, ``(B, E)``."""
        ...

    def keys(self, rows: Tensor) -> Tensor:
        """Item rows ``(n, W)`` as an index holds them, ``(n, E)``."""
        ...


class ExampleTower(SharedTower):
    """From the features of examples to logits: B rows of a table, or B images.

    Slots are ``category`` (B, F, W), where the data has categories; inputs ``dense`` (B, ...) and ``label`` (B,).
    """

    def logits(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B,)`` for a label that is 0 or 1, ``(B, K)`` for one of K classes."""
        raise NotImplementedError

    def check_loss(self, loss: str) -> None:
        """A loss of labelled examples."""
        loss_of(LABELLING, loss)

    def losses(self, slots: Mapping[str, Tensor], inputs: Mapping[str, Tensor], loss: str) -> Tensor:
        """How far the logits are from the labels."""
        return loss_of(LABELLING, loss)(self.logits(slots, inputs), inputs["label"])


@dataclass(frozen=True)
class Declared:
    """A model's parts: tables and a tower in the cloud behind the rows of ``source``, a tower on the device.

    ``on_device`` names the parameters of ``shared`` that are each client's own and never leave it. A model without
    tables has no rows; of one with tables and without a ``cloud`` tower, devices see the tables' rows side by side.
    """

    shared: SharedTower
    tables: tuple[Table, ...] = ()
    cloud: CloudTower = field(default_factory=lambda: PlainRows(0))
    on_device: tuple[str, ...] = field(default=())
    source: str = "item"

    def __post_init__(self) -> None:
        if type(self.cloud) is PlainRows and not self.cloud.width:
            object.__setattr__(self, "cloud", PlainRows(sum(table.dim for table in self.tables)))

    @property
    def table_bytes(self) -> int:
        """The size of all tables: what a device without row selection would have to be sent."""
        return sum(4 * table.num_rows * table.dim for table in self.tables)

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """The shared parameters: what a plan carries."""
        return {name: array(value) for name, value in self.shared.named_parameters() if name not in self.on_device}

    def device_parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """The first value of the parameters that live on devices."""
        return {name: array(value) for name, value in self.shared.named_parameters() if name in self.on_device}


class Model(Protocol):
    """The seam of a model plugin: a frozen dataclass of settings that declares its parts for a data set."""

    def declare(self, schema: Schema | ExampleSchema, generator: torch.Generator) -> Declared:
        """Tables and towers, initialised from ``generator`` alone; :func:`as_sequences` and :func:`as_examples` say
        what data the model is for.
        """
        ...


def array(value: Tensor) -> NDArray[np.float32]:
    """A tensor's values, copied to numpy."""
    return value.detach().to("cpu", torch.float32).numpy().copy()


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, initialised as torch does (He et al., 2015, uniform), but from a generator that is handed in."""
    layer = nn.Linear(inputs, outputs)
    bound = 1.0 / max(inputs, 1) ** 0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def layers(widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers from the first width to the last, a ReLU after each."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [linear(inputs, outputs, generator), nn.ReLU()]
    return nn.Sequential(*modules)


def convolution(inputs: int, outputs: int, size: int, generator: torch.Generator, padding: int = 0) -> nn.Conv2d:
    """A convolution of ``size`` x ``size``, initialised as :func:`linear` is."""
    layer = nn.Conv2d(inputs, outputs, size, padding=padding)
    bound = 1.0 / (inputs * size * size) ** 0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        assert layer.bias is not None
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
