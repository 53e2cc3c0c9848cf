"""What every model promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings
from fedtower.core.testing.promises import Promises, assert_same_bits, not_promised
from fedtower.recsys.models import (
    Declared,
    ExampleSchema,
    ExampleTower,
    InnerProduct,
    Model,
    Schema,
    SequenceTower,
)
from fedtower.recsys.step import make_loss, make_step
from fedtower.recsys.testing.examples import BATCH, CLICKS, IMAGES, NEGATIVES, SCHEMA, SLOTS

Tensors = dict[str, Tensor]
SCHEMAS: dict[str, tuple[Schema | ExampleSchema, str]] = {
    "histories": (SCHEMA, "sampled_softmax"),
    "clicks": (CLICKS, "bce"),
    "images": (IMAGES, "cross_entropy"),
}


class ModelPromises(Promises):
    """``make`` gives a model: a frozen dataclass of settings with ``declare``.

    What data it is for is found out: the first of histories, clicks and images that it does not refuse.
    """

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Steps this small only lose by threads, and on a busy machine they lose seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def declare(self, seed: int = 1, schema: Schema | ExampleSchema | None = None) -> Declared:
        """The model's parts for a small data set."""
        model: Model = self.made()
        return model.declare(self.schema if schema is None else schema, torch.Generator().manual_seed(seed))

    @property
    def kind(self) -> str:
        """Which kind of data the model is for."""
        refused = self.refusals()
        suitable = [name for name in SCHEMAS if name not in refused]
        assert suitable, f"the model refuses every kind of data: {refused}"
        return suitable[0]

    @property
    def schema(self) -> Schema | ExampleSchema:
        """A small data set of that kind."""
        return SCHEMAS[self.kind][0]

    @property
    def loss(self) -> str:
        """A loss that goes with it."""
        return SCHEMAS[self.kind][1]

    def refusals(self) -> dict[str, str]:
        """What is said of each kind of data that the model is not for."""
        said = {}
        for name, (schema, _) in SCHEMAS.items():
            try:
                self.declare(schema=schema)
            except RecipeError as refusal:
                said[name] = str(refusal)
        return said

    def batch(self, declared: Declared, seed: int = 1) -> tuple[Tensors, Tensors]:
        """One step's slots and inputs."""
        return _batch(declared, self.schema, seed)

    def tower_on_histories(self, declared: Declared) -> SequenceTower:
        """The tower, where it reads histories; for a model that does not there is nothing to prove."""
        if self.kind != "histories":
            not_promised("this model reads no histories")
        assert isinstance(declared.shared, SequenceTower)
        return declared.shared

    def tower_on_examples(self, declared: Declared) -> ExampleTower:
        """The tower, where it reads examples."""
        if self.kind == "histories":
            not_promised("this model reads histories")
        assert isinstance(declared.shared, ExampleTower)
        return declared.shared

    # Of every model

    def test_data_that_it_is_not_for_is_refused_in_words(self) -> None:
        assert all(len(said) > 40 for said in self.refusals().values()), "a refusal says what to choose instead"

    def test_tables_and_parameters_have_names_of_their_own(self) -> None:
        declared = self.declare()
        names = [table.name for table in declared.tables]
        assert len(set(names)) == len(names)
        assert set(declared.on_device) <= {name for name, _ in declared.shared.named_parameters()}

    def test_there_is_a_row_for_every_id(self) -> None:
        declared, schema = self.declare(), self.schema
        num_ids = schema.num_items if isinstance(schema, Schema) else schema.num_rows
        assert declared.tables or not num_ids, "a model without a table has nothing to look an id up in"
        assert all(table.num_rows >= num_ids for table in declared.tables)
        if declared.tables:
            assert declared.source == ("item" if isinstance(schema, Schema) else "category")

    def test_it_starts_from_the_generator_alone(self) -> None:
        torch.manual_seed(0)
        one = self.declare(seed=5)
        torch.manual_seed(123)
        assert _same_start(one, self.declare(seed=5)), "the same generator gave another start"

    def test_a_tower_is_only_its_parameters(self) -> None:
        for tower in (self.declare().shared, self.declare().cloud):
            assert not list(tower.buffers()), "a buffer (of a batch norm, say) would be lost between visits"
            assert not [each for each in tower.modules() if "Dropout" in type(each).__name__], "dropout draws unseen"
            assert all(value.dtype == torch.float32 for value in tower.parameters())

    def test_the_cloud_computes_each_row_by_itself(self) -> None:
        declared, schema = self.declare(), self.schema
        if not declared.tables:
            not_promised("this model has no rows")
        num_features = schema.num_item_features if isinstance(schema, Schema) else 0
        rows, features = _rows(declared, 11), torch.randn(11, num_features, generator=_generator())
        together = declared.cloud(rows, features)
        assert together.shape == (11, declared.cloud.width)
        torch.testing.assert_close(declared.cloud(rows[4:5], features[4:5]), together[4:5])

    def test_every_parameter_learns(self) -> None:
        declared = self.declare()
        moved = {name: False for name, _ in declared.shared.named_parameters()}
        step = make_step(declared.shared, LocalSettings(steps=1, loss=self.loss))  # type: ignore[arg-type]
        start = _parameters(declared)
        for seed in range(5):
            after, _, slopes, _ = step(start, step.init(start), *self.batch(declared, seed), 1.0)
            for name, slope in slopes.items():
                assert slope.abs().sum() > 0, f"nothing goes back to the rows of {name!r}"
            moved = {name: was or not torch.equal(after[name], start[name]) for name, was in moved.items()}
        assert all(moved.values()), f"{[name for name, was in moved.items() if not was]} never moved"

    def test_training_lowers_the_loss(self) -> None:
        declared = self.declare()
        local = LocalSettings(steps=1, loss=self.loss, optimizer="adam")  # type: ignore[arg-type]
        step = make_step(declared.shared, local)
        parameters: Mapping[str, Tensor] = _parameters(declared)
        state: Mapping[str, Tensor] = step.init(parameters)
        slots, inputs = self.batch(declared)
        losses = []
        for _ in range(50):
            parameters, state, slopes, loss = step(parameters, state, slots, inputs, 0.01)
            slots = {name: rows - 0.1 * slopes[name] for name, rows in slots.items()}
            losses.append(float(loss))
        assert np.all(np.isfinite(losses))
        assert losses[-1] < 0.9 * losses[0]

    def test_padding_changes_nothing(self) -> None:
        declared = self.declare()
        loss = make_loss(declared.shared, self.loss)
        slots, inputs = self.batch(declared)
        weight = torch.ones(BATCH)
        weight[-1] = 0.0
        kept = {**inputs, "weight": weight}
        each = {name for name, value in inputs.items() if value.shape[:1] == (BATCH,) and name != "weight"}
        padded = {name: value.clone() for name, value in kept.items()}
        for name in each:
            padded[name][-1] = inputs[name][0]
        torch.testing.assert_close(loss(_parameters(declared), slots, padded), loss(_parameters(declared), slots, kept))

    def test_many_clients_at_once_get_what_one_gets(self) -> None:
        declared = self.declare()
        loss = make_loss(declared.shared, self.loss)
        parameters = _parameters(declared)
        batches = [self.batch(declared, seed) for seed in (1, 2, 3)]
        slots = {name: torch.stack([batch[0][name] for batch in batches]) for name in batches[0][0]}
        inputs = {name: torch.stack([batch[1][name] for batch in batches]) for name in batches[0][1]}
        together = vmap(loss, in_dims=(None, 0, 0))(parameters, slots, inputs)
        alone = torch.stack([loss(parameters, *batch) for batch in batches])
        torch.testing.assert_close(together, alone)

    def test_what_a_plan_carries_is_all_there_is(self) -> None:
        declared = self.declare()
        carried = {**declared.parameters(), **declared.device_parameters()}
        assert_same_bits(carried, {name: value.detach().numpy() for name, value in declared.shared.named_parameters()})
        assert not set(declared.parameters()) & set(declared.device_parameters())

    # Of a model that reads histories

    def test_shapes_are_those_of_the_seam(self) -> None:
        declared = self.declare()
        tower = self.tower_on_histories(declared)
        slots, inputs = self.batch(declared)
        vectors = tower.represent(slots["history"], inputs["target"], inputs["user"])
        assert vectors.shape[0] == BATCH
        assert tower.score(vectors, slots["negatives"]).shape == (BATCH, NEGATIVES)

    def test_only_what_came_before_the_target_is_looked_at(self) -> None:
        declared = self.declare()
        tower = self.tower_on_histories(declared)
        slots, inputs = self.batch(declared)
        target = torch.arange(BATCH) * (SLOTS // BATCH)
        seen = tower.represent(slots["history"], target, inputs["user"])
        for place in range(BATCH):
            changed = slots["history"].clone()
            changed[int(target[place]) :] += 100.0
            again = tower.represent(changed, target, inputs["user"])
            torch.testing.assert_close(again[place], seen[place], msg="the target, or what came after it, shows")

    def test_the_history_is_looked_at_or_what_is_the_clients_own(self) -> None:
        declared = self.declare()
        tower = self.tower_on_histories(declared)
        slots, inputs = self.batch(declared)
        target = torch.full((BATCH,), SLOTS)
        seen = tower.represent(slots["history"], target, inputs["user"])
        changed = [tower.represent(slots["history"].flip(0) * -2, target, inputs["user"])]
        with torch.no_grad():
            for name, value in tower.named_parameters():
                if name in declared.on_device:
                    value.add_(1.0)
        changed.append(tower.represent(slots["history"], target, inputs["user"]))
        assert not all(torch.allclose(seen, each) for each in changed), "every user looks the same"

    def test_a_user_without_a_history_gets_finite_scores(self) -> None:
        declared = self.declare()
        tower = self.tower_on_histories(declared)
        slots, inputs = self.batch(declared)
        vectors = tower.represent(slots["history"], torch.zeros(BATCH, dtype=torch.int64), inputs["user"])
        assert torch.isfinite(tower.score(vectors, slots["negatives"])).all()

    def test_scores_are_the_inner_products_that_it_says_they_are(self) -> None:
        declared = self.declare()
        tower = self.tower_on_histories(declared)
        if not isinstance(tower, InnerProduct):
            not_promised("this model's score is no inner product, and has no index")
        slots, inputs = self.batch(declared)
        vectors = tower.represent(slots["history"], inputs["target"], inputs["user"])
        rows = slots["negatives"]
        torch.testing.assert_close(tower.queries(vectors) @ tower.keys(rows).T, tower.score(vectors, rows))

    @pytest.mark.parametrize(("users", "items"), [(0, 0), (3, 0), (0, 5)])
    def test_data_without_features_is_fine(self, users: int, items: int) -> None:
        self.tower_on_histories(self.declare())
        schema = Schema(SCHEMA.num_items, users, items, SCHEMA.history_length)
        declared = self.declare(schema=schema)
        slots, inputs = _batch(declared, schema)
        assert torch.isfinite(make_loss(declared.shared, self.loss)(_parameters(declared), slots, inputs))
        assert declared.cloud(_rows(declared, 3), torch.zeros(3, items)).shape == (3, declared.cloud.width)

    # Of a model that reads examples

    def test_there_is_a_logit_for_every_example_or_one_of_every_class(self) -> None:
        declared, schema = self.declare(), self.schema
        logits = self.tower_on_examples(declared).logits(*self.batch(declared))
        assert isinstance(schema, ExampleSchema)
        assert logits.shape == ((BATCH, schema.num_classes) if schema.num_classes else (BATCH,))

    def test_an_example_is_told_by_itself(self) -> None:
        declared = self.declare()
        tower = self.tower_on_examples(declared)
        slots, inputs = self.batch(declared)
        together = tower.logits(slots, inputs)
        part = slice(1, 2)
        alone = tower.logits(
            {name: value[part] for name, value in slots.items()}, {name: value[part] for name, value in inputs.items()}
        )
        torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-6)

    def test_features_are_looked_at_and_the_label_is_not(self) -> None:
        declared = self.declare()
        tower = self.tower_on_examples(declared)
        slots, inputs = self.batch(declared)
        seen = tower.logits(slots, inputs)
        for name, value in slots.items():
            assert not torch.allclose(tower.logits({**slots, name: value + 1.0}, inputs), seen), f"{name} is not used"
        assert not torch.allclose(tower.logits(slots, {**inputs, "dense": inputs["dense"] + 1.0}), seen)
        torch.testing.assert_close(tower.logits(slots, {**inputs, "label": 1.0 - inputs["label"]}), seen)


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(declared: Declared, count: int) -> Tensor:
    """Rows of all tables side by side, as the cloud tower takes them."""
    return torch.randn(count, sum(table.dim for table in declared.tables), generator=_generator())


def _parameters(declared: Declared) -> Tensors:
    return {name: value.detach().clone() for name, value in declared.shared.named_parameters()}


def _batch(declared: Declared, schema: Schema | ExampleSchema, seed: int = 1) -> tuple[Tensors, Tensors]:
    """One step's slots and inputs; of histories the first target has none before it."""
    generator = _generator(seed)
    width = declared.cloud.width
    if isinstance(schema, ExampleSchema):
        fields = len(schema.cardinalities)
        return {"category": torch.randn(BATCH, fields, width, generator=generator)} if fields else {}, {
            "dense": torch.randn(BATCH, *schema.dense, generator=generator),
            "label": torch.randint(0, schema.num_classes or 2, (BATCH,), generator=generator).float(),
            "weight": torch.ones(BATCH),
        }
    slots = {
        "history": torch.randn(SLOTS, width, generator=generator),
        "negatives": torch.randn(NEGATIVES, width, generator=generator),
    }
    target = torch.randint(1, SLOTS, (BATCH,), generator=generator)
    target[0] = 0
    return slots, {
        "target": target,
        "weight": torch.ones(BATCH),
        "user": torch.randn(schema.num_user_features, generator=generator),
    }


def _same_start(one: Declared, other: Declared) -> bool:
    """Whether both calls gave the same parameters in every tower."""
    return all(
        torch.equal(mine, yours)
        for tower, twin in ((one.shared, other.shared), (one.cloud, other.cloud))
        for mine, yours in zip(tower.parameters(), twin.parameters(), strict=True)
    )
