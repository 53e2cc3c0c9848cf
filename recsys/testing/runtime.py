"""What every runtime promises: the numbers of one slow, obvious loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtower.core.plan import Plan
from fedtower.core.runtime import RuntimeFactory, Work
from fedtower.core.testing.promises import Promises, Untouched, assert_close, assert_same_bits
from fedtower.core.updates import Updates
from fedtower.recsys.models import Declared
from fedtower.recsys.step import make_loss
from fedtower.recsys.testing.examples import small_model, small_plan, small_work

States = Mapping[str, NDArray[np.float32]]


class RuntimePromises(Promises):
    """``make`` gives a runtime plugin: what ``open(model, local)`` is called on."""

    model: Declared = small_model()

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Steps this small only lose by threads, and on a busy machine they lose seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def train(self, plan: Plan, work: Work) -> tuple[Updates, States]:
        """One visit, in a runtime opened for it."""
        factory: RuntimeFactory = self.made()
        return factory.open(self.model, plan.local).train(plan, work)

    @pytest.mark.parametrize("row_lr", [None, 0.3])
    def test_it_agrees_with_the_obvious_loop(self, row_lr: float | None) -> None:
        plan, work = small_plan(self.model, row_lr=row_lr), small_work(self.model)
        updates, states = self.train(plan, work)
        dense, rows, own, losses = _obvious(self.model, plan, work)
        assert_close(dict(updates.dense), dense, "dense", rtol=1e-4, atol=1e-6)
        assert_close(updates.rows["item"].row_deltas, rows, "row deltas", rtol=1e-4, atol=1e-6)
        assert_close(dict(states), own, "device states", rtol=1e-4, atol=1e-6)
        assert_close(updates.metrics["loss"], losses, "losses", rtol=1e-4)

    def test_updates_say_whose_they_are(self) -> None:
        plan, work = small_plan(self.model), small_work(self.model)
        updates, _ = self.train(plan, work)
        assert_same_bits(updates.clients, work.clients)
        assert_same_bits(updates.weights, work.examples.astype(np.float64))
        assert_same_bits(updates.rows["item"].row_ids, work.row_ids["item"].ids)
        assert updates.rounds is not None
        assert set(updates.rounds.tolist()) == {plan.round}
        assert set(updates.dense) == set(plan.parameters)

    def test_who_else_is_in_the_block_does_not_matter(self) -> None:
        plan, work = small_plan(self.model), small_work(self.model)
        together, states = self.train(plan, work)
        for place in range(len(work)):
            alone, own = self.train(plan, _one(work, place))
            assert_close(alone, together.slice(place, place + 1), f"client {place}", rtol=1e-4)
            assert_close(dict(own), {name: value[place : place + 1] for name, value in states.items()}, rtol=1e-4)

    def test_a_client_without_steps_sends_zeros(self) -> None:
        plan, work = small_plan(self.model), small_work(self.model)
        idle = replace(work, steps=np.zeros_like(work.steps), examples=np.zeros_like(work.examples))
        updates, states = self.train(plan, idle)
        assert all(not delta.any() for delta in updates.dense.values())
        assert not updates.rows["item"].row_deltas.any()
        assert_same_bits(dict(states), dict(work.states))

    def test_rows_stay_at_home_when_they_are_not_trained(self) -> None:
        plan, work = small_plan(self.model, train_rows=False), small_work(self.model)
        updates, _ = self.train(plan, work)
        assert not updates.rows

    def test_inputs_are_left_alone_and_a_repetition_gives_the_same_bits(self) -> None:
        plan, work = small_plan(self.model), small_work(self.model)
        with Untouched(plan, work):
            once = self.train(plan, work)
        again = self.train(plan, work)
        assert_same_bits(again[0], once[0])
        assert_same_bits(dict(again[1]), dict(once[1]))


def _one(work: Work, place: int) -> Work:
    """The work of one client of a block."""
    rows = slice(*work.row_ids["item"].offsets[place : place + 2])
    here = slice(place, place + 1)
    return Work(
        clients=work.clients[here],
        steps=work.steps[here],
        examples=work.examples[here],
        inputs={name: value[here] for name, value in work.inputs.items()},
        slots={name: value[here] for name, value in work.slots.items()},
        row_ids={
            "item": replace(
                work.row_ids["item"],
                offsets=np.array([0, rows.stop - rows.start], dtype=np.int64),
                ids=work.row_ids["item"].ids[rows],
            )
        },
        rows={"item": work.rows["item"][rows]},
        states={name: value[here] for name, value in work.states.items()},
    )


def _obvious(model: Declared, plan: Plan, work: Work) -> tuple[dict[str, Any], Any, dict[str, Any], Any]:
    """Gradient descent by autograd, one client and one step at a time, the client's rows a leaf like any other."""
    loss_of = make_loss(model.shared, plan.local.loss)
    row_lr = plan.local.lr if plan.local.row_lr is None else plan.local.row_lr
    dense: dict[str, list[Any]] = {name: [] for name in plan.parameters}
    own: dict[str, list[Any]] = {name: [] for name in work.states}
    row_deltas, losses = [], np.zeros(len(work))
    for client in range(len(work)):
        part = slice(*work.row_ids["item"].offsets[client : client + 2])
        start = {name: torch.tensor(value) for name, value in plan.parameters.items()}
        start |= {name: torch.tensor(value[client]) for name, value in work.states.items()}
        parameters, rows = dict(start), torch.tensor(work.rows["item"][part])
        for at in range(int(work.steps[client])):
            leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
            table = rows.clone().requires_grad_()
            slots = {name: table[torch.tensor(value[client, at])] for name, value in work.slots.items()}
            inputs = {name: torch.tensor(value[client, at]) for name, value in work.inputs.items()}
            loss = loss_of(leaves, slots, inputs)
            *gradients, row_gradient = torch.autograd.grad(loss, [*leaves.values(), table])
            steps = zip(leaves.items(), gradients, strict=True)
            parameters = {name: (leaf - plan.local.lr * gradient).detach() for (name, leaf), gradient in steps}
            rows = (table - row_lr * row_gradient).detach()
            losses[client] += float(loss.detach()) / int(work.steps[client])
        for name in plan.parameters:
            dense[name].append((parameters[name] - start[name]).numpy())
        for name in work.states:
            own[name].append(parameters[name].numpy())
        row_deltas.append(rows.numpy() - work.rows["item"][part])
    return (
        {name: np.stack(values) for name, values in dense.items()},
        np.concatenate(row_deltas),
        {name: np.stack(values) for name, values in own.items()},
        losses,
    )
