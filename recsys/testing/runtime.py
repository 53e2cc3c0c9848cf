"""What every runtime promises: the numbers of one slow, obvious loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.control import is_variate
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import RuntimeFactory, Work
from fedtower.core.testing.promises import Promises, Untouched, assert_close, assert_same_bits, not_promised
from fedtower.core.updates import Updates
from fedtower.recsys.controls import with_controls
from fedtower.recsys.ditto import with_copies
from fedtower.recsys.models import Declared
from fedtower.recsys.own_model import PERSONAL
from fedtower.recsys.phases import HEAD, phased
from fedtower.recsys.step import make_loss
from fedtower.recsys.testing.examples import Case, cases

States = Mapping[str, NDArray[np.float32]]
CASES = cases()


class RuntimePromises(Promises):
    """``make`` gives a runtime plugin: what ``open(model, local)`` is called on."""

    @pytest.fixture(params=sorted(CASES))
    def case(self, request: pytest.FixtureRequest) -> Case:
        """A small model, and work for it: of histories, of clicks, and of images."""
        return CASES[request.param]

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Steps this small only lose by threads, and on a busy machine they lose seconds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def train(self, model: Declared, plan: Plan, work: Work) -> tuple[Updates, States]:
        """One visit, in a runtime opened for it."""
        factory: RuntimeFactory = self.made()
        return factory.open(model, plan.local).train(plan, work)

    @pytest.mark.parametrize("row_lr", [None, 0.3])
    def test_it_agrees_with_the_obvious_loop(self, case: Case, row_lr: float | None) -> None:
        self.agree(case, case.plan(row_lr=row_lr))

    @pytest.mark.parametrize(
        ("optimizer", "tolerance"), [("momentum", 1e-4), ("adagrad", 1e-3), ("adam", 1e-3), ("sgd", 1e-4)]
    )
    def test_every_optimizer_is_the_one_of_that_name(self, case: Case, optimizer: str, tolerance: float) -> None:
        frozen = list(case.model.parameters())[:1]
        self.agree(case, case.plan(optimizer=optimizer, proximal=0.5, frozen=tuple(frozen)), tolerance)

    def test_control_variates_correct_every_step(self, case: Case) -> None:
        if case.name != "histories":
            not_promised("one model shows it, the one with rows and parameters of the device's own")
        controlled = replace(case, model=with_controls(case.model, LocalSettings(steps=1, control="scaffold")))
        plan = controlled.plan(control="scaffold")
        variates = {
            name: np.sin(np.arange(value.size, dtype=np.float32)).reshape(value.shape)
            for name, value in plan.parameters.items()
            if is_variate(name)
        }
        assert variates
        self.agree(controlled, replace(plan, parameters={**plan.parameters, **variates}))

    @pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
    def test_a_head_is_trained_first_and_then_the_rest(self, case: Case, optimizer: str) -> None:
        if not case.model.on_device:
            not_promised("this model has nothing on devices")
        self.agree(case, case.plan(head_first=1, optimizer=optimizer), 1e-3)

    @pytest.mark.parametrize("more", [{}, {"optimizer": "momentum", "proximal": 0.3}])
    def test_personal_copies_are_pulled_to_what_was_sent(self, case: Case, more: Mapping[str, Any]) -> None:
        local = LocalSettings(steps=1, ditto=0.5)
        copied = replace(case, model=with_copies(replace(case.model, on_device=()), local))
        self.agree(copied, copied.plan(ditto=0.5, **more))

    def agree(self, case: Case, plan: Plan, tolerance: float = 1e-4) -> None:
        """The runtime gives what the obvious loop gives."""
        work = phased(case.work(), plan.local)
        updates, states = self.train(case.model, plan, work)
        dense, rows, own, losses = _obvious(case.model, plan, work)
        assert_close(dict(updates.dense), dense, "dense", rtol=tolerance, atol=1e-6)
        for source, deltas in rows.items():
            assert_close(updates.rows[source].row_deltas, deltas, "row deltas", rtol=tolerance, atol=1e-6)
        assert_close(dict(states), own, "device states", rtol=tolerance, atol=1e-6)
        assert_close(updates.metrics["loss"], losses, "losses", rtol=tolerance)

    def test_updates_say_whose_they_are(self, case: Case) -> None:
        plan, work = case.plan(), case.work()
        updates, _ = self.train(case.model, plan, work)
        assert_same_bits(updates.clients, work.clients)
        assert_same_bits(updates.weights, work.examples.astype(np.float64))
        assert set(updates.rows) == set(work.row_ids)
        for source, needed in work.row_ids.items():
            assert_same_bits(updates.rows[source].row_ids, needed.ids)
        assert updates.rounds is not None
        assert set(updates.rounds.tolist()) == {plan.round}
        assert set(updates.dense) == set(plan.parameters)

    def test_who_else_is_in_the_block_does_not_matter(self, case: Case) -> None:
        plan, work = case.plan(), case.work()
        factory: RuntimeFactory = self.made()
        opened = factory.open(case.model, plan.local)
        together, states = opened.train(plan, work)
        for place in range(len(work)):
            alone, own = opened.train(plan, _one(work, place))
            assert_close(alone, together.slice(place, place + 1), f"client {place}", rtol=1e-4)
            assert_close(dict(own), {name: value[place : place + 1] for name, value in states.items()}, rtol=1e-4)

    def test_a_client_without_steps_sends_zeros(self, case: Case) -> None:
        plan, work = case.plan(), case.work()
        idle = replace(work, steps=np.zeros_like(work.steps), examples=np.zeros_like(work.examples))
        updates, states = self.train(case.model, plan, idle)
        assert all(not delta.any() for delta in updates.dense.values())
        assert all(not rows.row_deltas.any() for rows in updates.rows.values())
        assert_same_bits(dict(states), dict(work.states))

    def test_rows_stay_at_home_when_they_are_not_trained(self, case: Case) -> None:
        plan, work = case.plan(train_rows=False), case.work()
        updates, _ = self.train(case.model, plan, work)
        assert not updates.rows

    def test_inputs_are_left_alone_and_a_repetition_gives_the_same_bits(self, case: Case) -> None:
        plan, work = case.plan(), case.work()
        with Untouched(plan, work):
            once = self.train(case.model, plan, work)
        again = self.train(case.model, plan, work)
        assert_same_bits(again[0], once[0])
        assert_same_bits(dict(again[1]), dict(once[1]))


def _one(work: Work, place: int) -> Work:
    """The work of one client of a block."""
    here = slice(place, place + 1)
    rows = {source: slice(*needed.offsets[place : place + 2]) for source, needed in work.row_ids.items()}
    return Work(
        clients=work.clients[here],
        steps=work.steps[here],
        examples=work.examples[here],
        inputs={name: value[here] for name, value in work.inputs.items()},
        slots={name: value[here] for name, value in work.slots.items()},
        row_ids={
            source: replace(
                needed,
                offsets=np.array([0, rows[source].stop - rows[source].start], dtype=np.int64),
                ids=needed.ids[rows[source]],
            )
            for source, needed in work.row_ids.items()
        },
        rows={source: values[rows[source]] for source, values in work.rows.items()},
        states={name: value[here] for name, value in work.states.items()},
    )


def _obvious(
    model: Declared, plan: Plan, work: Work
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], NDArray[np.float64]]:
    """Training by autograd and torch's own optimisers, one client and one step at a time, the client's rows a leaf
    like any other.
    """
    local = plan.local
    loss_of = make_loss(model.shared, local.loss)
    dense: dict[str, list[Any]] = {name: [] for name in plan.parameters}
    own: dict[str, list[Any]] = {name: [] for name in work.states}
    row_deltas: dict[str, list[Any]] = {source: [] for source in work.rows}
    losses = np.zeros(len(work))
    for client in range(len(work)):
        start = {name: torch.tensor(value) for name, value in plan.parameters.items()}
        start |= {name: torch.tensor(value[client]) for name, value in work.states.items()}
        trained = [name for name in start if name not in local.frozen and not is_variate(name)]
        leaves = {name: value.clone().requires_grad_(name in trained) for name, value in start.items()}
        parts = {False: trained}
        if local.head_first:
            parts = {head: [name for name in trained if (name in work.states) is head] for head in (True, False)}
        optimizers = {head: _optimizer([leaves[name] for name in names], local) for head, names in parts.items()}
        held = {source: torch.tensor(_mine(work, source, client)) for source in work.rows}
        for at in range(int(work.steps[client])):
            tables = {source: rows.clone().requires_grad_() for source, rows in held.items()}
            slots = {
                name: table[torch.tensor(value[client, at])]
                for name, value in work.slots.items()
                for table in tables.values()
            }
            inputs = {name: torch.tensor(value[client, at]) for name, value in work.inputs.items()}
            loss = loss_of(leaves, slots, inputs)
            copies = [name for name in trained if name.startswith(PERSONAL)]
            shared = [name for name in trained if name not in copies]
            pull = sum(((leaves[name] - start[name]) ** 2).sum() for name in shared)
            drift = sum(
                ((start.get(f"control.{name}", 0.0) - start[f"own_control.{name}"]) * leaves[name]).sum()
                for name in trained
                if f"own_control.{name}" in start
            )
            objective = loss + 0.5 * local.proximal * pull + drift
            if local.ditto is not None:
                mine = {**leaves, **{name.removeprefix(PERSONAL): leaves[name] for name in copies}}
                still = {name: value.detach() for name, value in slots.items()}
                away = sum(((leaves[name] - start[name.removeprefix(PERSONAL)]) ** 2).sum() for name in copies)
                objective = objective + loss_of(mine, still, inputs) + 0.5 * local.ditto * away
            for leaf in leaves.values():
                leaf.grad = None
            objective.backward()  # type: ignore[no-untyped-call]
            head = HEAD in inputs and bool(inputs[HEAD])
            optimizers[head].step()
            row_lr = 0.0 if head else local.lr if local.row_lr is None else local.row_lr
            held = {source: (table - row_lr * _gradient(table)).detach() for source, table in tables.items()}
            losses[client] += float(loss.detach()) / int(work.steps[client])
        for name in plan.parameters:
            dense[name].append((leaves[name] - start[name]).detach().numpy())
        for name in work.states:
            own[name].append(leaves[name].detach().numpy())
        for source, rows in held.items():
            row_deltas[source].append(rows.numpy() - _mine(work, source, client))
    return (
        {name: np.stack(values) for name, values in dense.items()},
        {source: np.concatenate(values) for source, values in row_deltas.items()},
        {name: np.stack(values) for name, values in own.items()},
        losses,
    )


def _optimizer(leaves: list[Tensor], local: LocalSettings) -> torch.optim.Optimizer:
    if local.optimizer == "adam":
        return torch.optim.Adam(leaves, lr=local.lr, betas=(local.beta1, local.beta2), eps=local.eps)
    if local.optimizer == "adagrad":
        return torch.optim.Adagrad(leaves, lr=local.lr, eps=local.eps)
    return torch.optim.SGD(leaves, lr=local.lr, momentum=local.momentum if local.optimizer == "momentum" else 0.0)


def _mine(work: Work, source: str, client: int) -> NDArray[np.float32]:
    """The rows of one client."""
    return work.rows[source][slice(*work.row_ids[source].offsets[client : client + 2])]


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
