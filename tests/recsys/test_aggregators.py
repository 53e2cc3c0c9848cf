"""Every aggregator in whole rounds, with real tables: a broken client changes nothing; what they ask for is there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import discover
from fedtower.core.round import make_plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Updates
from fedtower.recsys.training import Federated, Setting

IntArray = NDArray[np.int64]

NAMES = sorted(offer.name for offer in discover().offers("aggregator"))
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "norm_bound": {"aggregator.norm": 0.3},
    "fltrust": {"rows.public.share": 0.2},
}
WHOLE = {"transport.dropout": 0.0, "cohort.size": 9}


class OneIsBroken:
    """The smallest client of a cohort sends a parameter that is not a number, in the next round a row that is not, and
    then a row that is infinite.
    """

    def __init__(self) -> None:
        self.first: dict[int, int] = {}

    @hookimpl
    def round_started(self, round: int, cohort: Any) -> None:
        self.first[round] = int(cohort.clients[0])

    @hookimpl(wrapper=True)
    def client_train(self, plan: Any, clients: IntArray) -> Generator[None, Any, Any]:
        updates, states = yield
        broken = clients == self.first[plan.round]
        dense = {name: np.array(delta) for name, delta in updates.dense.items()}
        part = updates.rows["item"]
        deltas = np.array(part.row_deltas)
        if plan.round % 3 == 1:
            dense[list(dense)[-1]][broken] = np.nan
        else:
            deltas[broken[part.owners]] = np.nan if plan.round % 3 == 2 else np.inf
        return replace(updates, dense=dense, rows={"item": replace(part, row_deltas=deltas)}), states


class OneIsTurnedAway(OneIsBroken):
    """The same client is refused, with nothing wrong about it."""

    @hookimpl
    def accept_update(self, update: Updates) -> str | None:
        assert update.clients is not None
        assert update.rounds is not None
        return "not today" if int(update.clients[0]) == self.first[int(update.rounds[0])] else None

    client_train = None  # type: ignore[assignment]


def trained(setting: Setting, plugin: object, rounds: int = 3) -> Mapping[str, Any]:
    """Everything there is after so many rounds."""
    setting.hooks.add(plugin, "plugin")
    training = Federated(setting)
    for _, report in zip(range(rounds), training.rounds(), strict=False):
        assert report.clients == 8
    return training.snapshot()


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_sends_nan_changes_nothing(name: str, setting_of: Callable[..., Setting]) -> None:
    given = {"aggregator.name": name, **WHOLE, **SETTINGS.get(name, {})}
    broken, away = trained(setting_of(given), OneIsBroken()), trained(setting_of(given), OneIsTurnedAway())
    assert_same_bits(broken, away)
    first = Federated(setting_of(given)).snapshot()
    for group in ("parameters/", "tables/"):
        assert any(not np.array_equal(away[key], first[key]) for key in first if key.startswith(group)), group


def test_fltrust_without_public_data_is_refused_before_anything_is_trained(setting_of: Callable[..., Setting]) -> None:
    with pytest.raises(RecipeError, match=r"'fltrust' compares .* say with rows\.public\.share, such as 0\.1"):
        Federated(setting_of({"aggregator.name": "fltrust"}))


def test_fednova_with_steps_of_no_known_length_is_refused_before_anything_is_trained(
    setting_of: Callable[..., Setting],
) -> None:
    with pytest.raises(RecipeError, match=r"aggregator 'fednova' divides .* local\.optimizer = 'adam'"):
        Federated(setting_of({"aggregator.name": "fednova", "local.optimizer": "adam"}))


def test_a_round_in_which_no_row_is_touched_often_enough_moves_parameters_alone(
    setting_of: Callable[..., Setting],
) -> None:
    given = {"aggregator.name": "median", "aggregator.rows_least": 10, **WHOLE}
    before, after = Federated(setting_of(given)).snapshot(), trained(setting_of(given), OneIsBroken(), rounds=1)
    changed = {key.partition("/")[0] for key in before if not np.array_equal(before[key], after[key])}
    assert "parameters" in changed
    assert [key for key in before if key.startswith("tables/") and not np.array_equal(before[key], after[key])] in (
        [],
        ["tables/generation"],
    )


def test_the_server_s_own_update_is_the_mean_of_its_users_and_keeps_nothing(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of({"aggregator.name": "fltrust", "rows.public.share": 0.2, "model.user_vector": False, **WHOLE})
    training = Federated(setting)
    root, public = training._parts.root, setting.task.public
    assert root is not None
    assert public is not None
    plan, before = make_plan(training._state, training._parts), training.snapshot()
    one = root(plan)
    assert_same_bits(root(plan), one)
    assert_same_bits(training.snapshot(), before)

    work = public.client_data().work(plan, np.arange(public.num_clients))
    assert training._parts.store is not None
    fetched = {source: training._parts.store.fetch(source, needed.ids) for source, needed in work.row_ids.items()}
    updates, _ = training._parts.client.runtime.train(plan, replace(work, rows=fetched))
    assert one.weights.tolist() == [updates.weights.sum()]
    for name, delta in updates.dense.items():
        wanted = np.average(delta.astype(np.float64), axis=0, weights=updates.weights)
        np.testing.assert_allclose(one.dense[name][0], wanted, rtol=1e-5, atol=1e-8)
    assert one.norms[0] > 0
