"""Task: what kind of data a run is on, and so how it is batched and judged. There are two: histories, and examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.client import ClientData
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import Plan
from fedtower.core.recipe import DataSection, Recipe
from fedtower.core.runtime import Work
from fedtower.core.settings import toml_value
from fedtower.recsys import metrics
from fedtower.recsys.attacks import Siege
from fedtower.recsys.batches import SequenceData, training_events
from fedtower.recsys.evaluation import Evaluation, ItemPop, Role, evaluate
from fedtower.recsys.examples import ExampleCard, ExampleData, Examples, ExampleSet, batches_of
from fedtower.recsys.exposure import exposure
from fedtower.recsys.history import Moment
from fedtower.recsys.labels_told import by_own_classes, has_own, logits_of
from fedtower.recsys.learned import Learned
from fedtower.recsys.losses import check_labels
from fedtower.recsys.models import ExampleSchema, Schema
from fedtower.recsys.personal import PersonalScorer
from fedtower.recsys.population import DataCard, Population, blocks
from fedtower.recsys.public import PartOfExamples, part_of, set_apart
from fedtower.recsys.scorer import ModelScorer
from fedtower.recsys.splits import Split, make_split

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Ranking = Literal["sampled", "full"]
BLOCK = 4096
"""Clients whose data is looked at together, to be counted."""


class Task(Protocol):
    """Everything that depends on the kind of data."""

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        ...

    @property
    def card(self) -> DataCard | ExampleCard:
        """The data card."""
        ...

    @property
    def schema(self) -> Schema | ExampleSchema:
        """What a model has to know of the data."""
        ...

    @property
    def headline(self) -> tuple[str, ...]:
        """The metrics that a reader looks at first."""
        ...

    @property
    def has_validation(self) -> bool:
        """Whether something is held out to tune on."""
        ...

    @property
    def batch_axis(self) -> int:
        """What a batch of :meth:`central` can be cut along: 0 its users, 1 its examples."""
        ...

    def client_data(self) -> ClientData:
        """The clients' data as work."""
        ...

    @property
    def examples_held(self) -> IntArray:
        """How many examples each client trains on in one epoch, (C,)."""
        ...

    def features(self, ids: IntArray) -> FloatArray:
        """The features of the rows of ``ids``, (n, F), for the cloud tower."""
        ...

    @property
    def public(self) -> Task | None:
        """The same task on the public data of the cloud's own, if some was set apart."""
        ...

    @property
    def central_steps(self) -> int:
        """How many steps :meth:`central` makes of an epoch."""
        ...

    def central(self, epoch: int, start: int = 0) -> Iterator[Work]:
        """The steps of one epoch of standalone training, from step ``start`` on: work of one step a client, all of them
        one batch.
        """
        ...

    def judge(self, learned: Learned, role: Role, ranking: Ranking | None = None) -> Evaluation:
        """What the model reaches on the held-out data of a role, by the recipe's protocol or by the one given."""
        ...

    def final(self, learned: Learned) -> Iterator[tuple[str, Evaluation]]:
        """The final figures on the test data, and a baseline's beside them."""
        ...


def make_task(data: Population | ExampleSet, recipe: Recipe, draws: Draws) -> Task:
    """The task of a data set, told by what it has; the public data that the recipe sets apart is a task of its own.

    Raises:
        RecipeError: the recipe asks for what this kind of data does not have.
    """
    share = recipe.rows.public.share
    if isinstance(data, ExampleSet):
        check_labels(recipe.local.loss, data.num_classes)
        _refuse_histories(recipe, data.card.name)
        if not share:
            return Labelled(data, recipe, draws)
        stay, public = (PartOfExamples(data, members) for members in set_apart(data.num_clients, share, draws))
        return Labelled(stay, recipe, draws, Labelled(public, recipe, _draws_of_public(draws)))
    split = make_split(
        recipe.data.split,
        data,
        validation=recipe.data.validation,
        test_fraction=recipe.data.test_fraction,
        draws=draws,
    )
    if not share:
        return Histories(data, recipe, draws, split)
    # One rule for both, made of the whole: by time, what is public ends where the clients' training does.
    ours, theirs = (part_of(data, members) for members in set_apart(data.num_clients, share, draws))
    public_task = Histories(theirs, recipe, _draws_of_public(draws), replace(split, population=theirs))
    return Histories(ours, recipe, draws, replace(split, population=ours), public_task)


def whose_models(recipe: Recipe) -> str:
    """With what clients judge where ``evaluation.personal`` is set, in words."""
    return "models fine-tuned" if recipe.local.ditto is None else "each client's own model"


def _refuse_histories(recipe: Recipe, name: str) -> None:
    """Raise RecipeError where a recipe splits histories, or says what is drawn beside them, and the data holds labelled
    examples.
    """
    for field in fields(DataSection):
        if field.default is not MISSING and getattr(recipe.data, field.name) != field.default:
            raise RecipeError(
                f"data.{field.name} = {toml_value(getattr(recipe.data, field.name))} says how histories are split, but "
                f"{name!r} holds labelled examples, of which the data set itself says what is held out; leave "
                f"data.{field.name} out"
            )
    if recipe.local.negatives_from != "untouched":
        raise RecipeError(
            f"local.negatives_from = {recipe.local.negatives_from!r} says which items are drawn as negatives, but "
            f"{name!r} holds labelled examples, for which none are drawn; leave it out"
        )


def _draws_of_public(draws: Draws) -> Draws:
    """Draws of its own: users of the public data and clients are both numbered from 0."""
    return Draws(int(draws.bits("public data")))


@dataclass(frozen=True)
class Histories:
    """Histories of items: the next one is to be found."""

    population: Population
    recipe: Recipe
    draws: Draws
    split: Split
    public: Histories | None = None
    siege: Siege | None = None

    @property
    def num_clients(self) -> int:
        """How many users there are."""
        return self.population.num_clients

    @property
    def card(self) -> DataCard:
        """The data card."""
        return self.population.card

    @property
    def schema(self) -> Schema:
        """Items and features."""
        population = self.population
        return Schema(
            num_items=population.num_items,
            num_user_features=population.num_user_features,
            num_item_features=population.num_item_features,
            history_length=self.recipe.local.history_length,
        )

    @property
    def headline(self) -> tuple[str, ...]:
        """The first list length's hit rate and gain, and under an attack its exposure."""
        names = ("HR", "NDCG") if self.siege is None else ("HR", "NDCG", "ER")
        return tuple(f"{name}@{self.recipe.evaluation.k[0]}" for name in names)

    @property
    def has_validation(self) -> bool:
        """Whether the split holds validation items out."""
        return self.split.validation

    @property
    def batch_axis(self) -> int:
        """A batch is of many users."""
        return 0

    def client_data(self) -> ClientData:
        """Stretches of histories.

        Raises:
            RecipeError: a share of an epoch was asked for, which there is not of histories.
        """
        if self.recipe.local.share < 1.0:
            raise RecipeError(
                "local.share is for labelled examples; of histories, local.steps says how much a visit is"
            )
        data = SequenceData(self.population, self.split, self.draws)
        return data if self.siege is None else self.siege.data(data)

    @cached_property
    def examples_held(self) -> IntArray:
        """A target is every training event of a user but her first."""
        held = []
        for clients in blocks(self.num_clients, BLOCK):
            events = self.population.events(clients)
            held.append(training_events(events, self.split.parts(events).role).lengths)
        return np.maximum(np.concatenate(held) - 1, 0)

    def features(self, ids: IntArray) -> FloatArray:
        """The items' features."""
        return self.population.item_features(ids)

    @property
    def central_steps(self) -> int:
        """Users by ``standalone.users_per_batch``."""
        return -(-self.num_clients // self.recipe.standalone.users_per_batch)

    def central(self, epoch: int, start: int = 0) -> Iterator[Work]:
        """Every user once, with one batch of targets each."""
        local = replace(self.recipe.local, steps=1, epochs=None, head_first=0)
        if local.loss == "in_batch_softmax":
            local = replace(local, negatives=1)  # the batch's other items are its negatives
        data, size = self.client_data(), self.recipe.standalone.users_per_batch
        order = self.draws.permutation(self.num_clients, "epoch", epoch)
        for at in range(start * size, len(order), size):
            yield data.work(Plan(epoch, {}, local), np.sort(order[at : at + size]))

    def scorer(self, learned: Learned, moment: Moment) -> ModelScorer:
        """The model as evaluation and recommendation see it."""
        about = (learned, self.population, self.split, self.recipe.local.history_length, moment)
        return ModelScorer(*about) if learned.tuned is None else PersonalScorer(*about, learned.tuned)

    def judge(self, learned: Learned, role: Role, ranking: Ranking | None = None) -> Evaluation:
        """Held-out items ranked among others."""
        return self._evaluate(self.scorer(learned, role), role, ranking)

    def final(self, learned: Learned) -> Iterator[tuple[str, Evaluation]]:
        """By the recipe's protocol and over the whole catalogue, beside item popularity."""
        rankings: list[Ranking] = [self.recipe.evaluation.protocol, "full"]
        popularity, scorer = ItemPop.count(self.population, self.split), self.scorer(learned, "test")
        for ranking in dict.fromkeys(rankings):
            yield "ItemPop", self._evaluate(popularity, "test", ranking)
            yield "model", self._evaluate(scorer, "test", ranking)

    def _evaluate(self, scorer: ModelScorer | ItemPop, role: Role, ranking: Ranking | None) -> Evaluation:
        settings, siege = self.recipe.evaluation, self.siege
        if ranking is not None:
            settings = replace(settings, protocol=ranking)
        judges = None if siege is None else siege.honest(self.num_clients)
        found = evaluate(scorer, self.population, self.split, role, settings, self.draws, judges)
        if siege is not None and judges is not None:
            about = (self.population, self.split, role, settings, judges, siege.market.promoted)
            shown = exposure(scorer, *about)
            label = f"{found.protocol_label}, honest users"
            found = replace(found, metrics={**found.metrics, **shown}, protocol_label=label)
        if not settings.personal or self.recipe.mode != "simulated":
            return found
        return replace(found, protocol_label=f"{found.protocol_label}, {whose_models(self.recipe)}")


@dataclass(frozen=True)
class Labelled:
    """Labelled examples: the label is to be told."""

    examples: ExampleSet
    recipe: Recipe
    draws: Draws
    public: Labelled | None = None

    @property
    def num_clients(self) -> int:
        """How many clients hold examples."""
        return self.examples.num_clients

    @property
    def card(self) -> ExampleCard:
        """The data card."""
        return self.examples.card

    @property
    def schema(self) -> ExampleSchema:
        """Shapes, cardinalities and classes."""
        return ExampleSchema(self.examples.dense_shape, self.examples.cardinalities, self.examples.num_classes)

    @property
    def headline(self) -> tuple[str, ...]:
        """Of classes the accuracy, of a label that is 0 or 1 the AUC, and the loss."""
        return ("accuracy", "logloss") if self.examples.num_classes else ("AUC", "logloss")

    @property
    def has_validation(self) -> bool:
        """Whether there are examples to tune on."""
        return len(self.examples.held_out("validation").labels) > 0

    @property
    def batch_axis(self) -> int:
        """A batch is of many examples, whoever's."""
        return 1

    def client_data(self) -> ExampleData:
        """Shuffled batches.

        Raises:
            RecipeError: the categories were counted over the rows of all clients, which in a federated run nobody has.
        """
        if self.examples.counted_over_everyone:
            raise RecipeError(
                "this data numbers its categories by a vocabulary that was counted over the rows of all clients, and "
                "so tells what they hold: let it hash them (of criteo: data.categories = 'hashed'), or set "
                "mode = 'standalone'"
            )
        return ExampleData(self.examples, self.draws)

    @cached_property
    def examples_held(self) -> IntArray:
        """Labelled examples."""
        held = [self.examples.examples(clients).lengths for clients in blocks(self.num_clients, BLOCK)]
        return np.concatenate(held)

    def features(self, ids: IntArray) -> FloatArray:
        """Categories have none."""
        return np.zeros((len(ids), 0), dtype=np.float32)

    @property
    def central_steps(self) -> int:
        """Examples by ``standalone.batch_size``."""
        return -(-len(self._pooled.labels) // self.recipe.standalone.batch_size)

    def central(self, epoch: int, start: int = 0) -> Iterator[Work]:
        """Every example of every client once, in batches of ``standalone.batch_size``."""
        pooled, size = self._pooled, self.recipe.standalone.batch_size
        order = self.draws.permutation(len(pooled.labels), "epoch", epoch)
        for first in range(start * size, len(order), size):
            at = order[first : first + size][None, None, :]
            yield batches_of(pooled, at, np.ones(1, dtype=np.int64), bool(self.examples.cardinalities))

    @cached_property
    def _pooled(self) -> Examples:
        """All clients' examples as one client's."""
        held = self.examples.examples(np.arange(self.num_clients, dtype=np.int64))
        return replace(held, clients=np.zeros(1, dtype=np.int64), offsets=np.array([0, len(held.labels)]))

    def judge(self, learned: Learned, role: Role, ranking: Ranking | None = None) -> Evaluation:
        """Every held-out example's label told; by clients with models of their own, those of the classes they know.

        Raises:
            RecipeError: another protocol was asked for: there is nothing to rank.
        """
        if ranking is not None:
            raise RecipeError(
                f"the protocol {ranking!r} ranks items, and this data holds labelled examples: leave --protocol out"
            )
        size = self.recipe.evaluation.batch_size
        if self.examples.num_classes and has_own(learned):
            return by_own_classes(learned, self.examples, role, size)
        held = self.examples.held_out(role)
        everything = np.arange(len(held.labels), dtype=np.int64)
        return self._figures(logits_of(learned, learned.shared(), held, everything, size), held.labels, role)

    def final(self, learned: Learned) -> Iterator[tuple[str, Evaluation]]:
        """The model, beside what always says the training data's mean."""
        held, labels = self.examples.held_out("test"), self._pooled.labels
        if self.examples.num_classes:
            share = np.bincount(labels.astype(np.int64), minlength=self.examples.num_classes) / len(labels)
            constant = np.tile(np.log(np.maximum(share, 1e-12)), (len(held.labels), 1))
        else:
            rate = float(np.clip(labels.mean(), 1e-6, 1 - 1e-6))
            constant = np.full(len(held.labels), np.log(rate / (1 - rate)))
        yield "base rate", self._figures(constant, held.labels, "test")
        yield "model", self.judge(learned, "test")

    def _figures(self, logits: NDArray[np.floating], labels: FloatArray, role: Role) -> Evaluation:
        figures = metrics.of_classes(logits, labels) if self.examples.num_classes else metrics.of_clicks(logits, labels)
        return Evaluation(role, "held-out examples", figures, cases=len(labels), users=0)
