"""What every model promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from fedtower.core.plan import LocalSettings
from fedtower.core.testing.promises import Promises, assert_same_bits
from fedtower.recsys.models import Declared, Model, Schema
from fedtower.recsys.step import make_loss, make_step
from fedtower.recsys.testing.examples import BATCH, NEGATIVES, SCHEMA, SLOTS


class ModelPromises(Promises):
    """``make`` gives a model: a frozen dataclass of settings with ``declare``."""

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Steps this small only lose by threads, and on a busy machine they lose seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def declare(self, seed: int = 1, schema: Schema = SCHEMA) -> Declared:
        """The model's parts for a small data set."""
        model: Model = self.made()
        return model.declare(schema, torch.Generator().manual_seed(seed))

    def test_tables_and_parameters_have_names_of_their_own(self) -> None:
        declared = self.declare()
        names = [table.name for table in declared.tables]
        assert names, "a model without a table has nothing to recommend"
        assert len(set(names)) == len(names)
        assert all(table.num_rows >= SCHEMA.num_items for table in declared.tables)
        assert set(declared.on_device) <= {name for name, _ in declared.shared.named_parameters()}

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
        declared = self.declare()
        rows, features = _rows(declared, 11), torch.randn(11, SCHEMA.num_item_features, generator=_generator())
        together = declared.cloud(rows, features)
        assert together.shape == (11, declared.cloud.width)
        torch.testing.assert_close(declared.cloud(rows[4:5], features[4:5]), together[4:5])

    def test_shapes_are_those_of_the_seam(self) -> None:
        declared = self.declare()
        slots, inputs = _batch(declared)
        vectors = declared.shared.represent(slots["history"], inputs["target"], inputs["user"])
        assert vectors.shape[0] == BATCH
        assert declared.shared.score(vectors, slots["negatives"]).shape == (BATCH, NEGATIVES)

    def test_only_what_came_before_the_target_is_looked_at(self) -> None:
        declared = self.declare()
        slots, inputs = _batch(declared)
        target = torch.arange(BATCH) * (SLOTS // BATCH)
        seen = declared.shared.represent(slots["history"], target, inputs["user"])
        for place in range(BATCH):
            changed = slots["history"].clone()
            changed[int(target[place]) :] += 100.0
            again = declared.shared.represent(changed, target, inputs["user"])
            torch.testing.assert_close(again[place], seen[place], msg="the target, or what came after it, shows")

    def test_the_history_is_looked_at(self) -> None:
        declared = self.declare()
        slots, inputs = _batch(declared)
        target = torch.full((BATCH,), SLOTS)
        seen = declared.shared.represent(slots["history"], target, inputs["user"])
        changed = declared.shared.represent(slots["history"].flip(0) * -2, target, inputs["user"])
        assert not torch.allclose(seen, changed)

    def test_a_user_without_a_history_gets_finite_scores(self) -> None:
        declared = self.declare()
        slots, inputs = _batch(declared)
        vectors = declared.shared.represent(slots["history"], torch.zeros(BATCH, dtype=torch.int64), inputs["user"])
        assert torch.isfinite(declared.shared.score(vectors, slots["negatives"])).all()

    @pytest.mark.parametrize(("users", "items"), [(0, 0), (3, 0), (0, 5)])
    def test_data_without_features_is_fine(self, users: int, items: int) -> None:
        schema = Schema(SCHEMA.num_items, users, items, SCHEMA.history_length)
        declared = self.declare(schema=schema)
        slots, inputs = _batch(declared, schema)
        loss = make_loss(declared.shared, "sampled_softmax")(_parameters(declared), slots, inputs)
        assert torch.isfinite(loss)
        assert declared.cloud(_rows(declared, 3), torch.zeros(3, items)).shape == (3, declared.cloud.width)

    def test_every_parameter_learns(self) -> None:
        declared = self.declare()
        moved = {name: False for name, _ in declared.shared.named_parameters()}
        step = make_step(declared.shared, LocalSettings(steps=1))
        start = _parameters(declared)
        for seed in range(5):
            after, slopes, _ = step(start, *_batch(declared, seed=seed), 1.0)
            assert slopes["history"].abs().sum() > 0, "nothing goes back to the rows of the history"
            assert slopes["negatives"].abs().sum() > 0, "nothing goes back to the rows of the negatives"
            moved = {name: was or not torch.equal(after[name], start[name]) for name, was in moved.items()}
        assert all(moved.values()), f"{[name for name, was in moved.items() if not was]} never moved"

    def test_training_lowers_the_loss(self) -> None:
        declared = self.declare()
        step = make_step(declared.shared, LocalSettings(steps=1))
        parameters: Mapping[str, Tensor] = _parameters(declared)
        slots, inputs = _batch(declared)
        losses = []
        for _ in range(50):
            parameters, slopes, loss = step(parameters, slots, inputs, 0.1)
            slots = {name: rows - 0.1 * slopes[name] for name, rows in slots.items()}
            losses.append(float(loss))
        assert np.all(np.isfinite(losses))
        assert losses[-1] < 0.9 * losses[0]

    def test_many_clients_at_once_get_what_one_gets(self) -> None:
        declared = self.declare()
        loss = make_loss(declared.shared, "sampled_softmax")
        parameters = _parameters(declared)
        batches = [_batch(declared, seed=seed) for seed in (1, 2, 3)]
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


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(declared: Declared, count: int) -> Tensor:
    """Rows of all tables side by side, as the cloud tower takes them."""
    return torch.randn(count, sum(table.dim for table in declared.tables), generator=_generator())


def _parameters(declared: Declared) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in declared.shared.named_parameters()}


def _batch(declared: Declared, schema: Schema = SCHEMA, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step's slots and inputs; the first target has no history."""
    generator = _generator(seed)
    width = declared.cloud.width
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
