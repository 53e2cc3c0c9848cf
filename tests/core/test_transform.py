"""Chains of transforms: first to last on the client, last to first on the server, each with a state of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.transform import States, decode, finish, on_client
from fedtower.core.updates import Updates

NOBODY = Cohort(1, np.zeros(0, dtype=np.int64), 1)


@dataclass(frozen=True)
class TimesPlus:
    """x becomes ``factor`` x + ``plus`` on the client, and back when it is decoded; visits are counted."""

    factor: float
    plus: float

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {"visits": ()}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        return _mapped(updates, self.factor, self.plus), {"visits": state["visits"] + np.float32(self.factor)}

    def decode(self, block: Updates) -> Updates:
        return _mapped(block, 1 / self.factor, -self.plus / self.factor)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return _mapped(total, self.factor, self.plus)


def _mapped(updates: Updates, factor: float, plus: float) -> Updates:
    return replace(updates, dense={name: (delta * factor + plus) for name, delta in updates.dense.items()})


def block(*values: float) -> Updates:
    return Updates(np.ones(len(values)), {"x": np.array(values, dtype=np.float32)})


def values(updates: Updates) -> list[float]:
    return [float(value) for value in updates.dense["x"]]


CHAIN = (TimesPlus(2, 1), TimesPlus(4, 5))  # they do not commute


def test_the_first_transform_is_the_first_on_the_client() -> None:
    states = [{"visits": np.array([0.0, 5.0], dtype=np.float32)}, {"visits": np.zeros(2, dtype=np.float32)}]
    sent, kept = on_client(CHAIN, block(1, 10), states, Draws(1))
    assert values(sent) == [4 * (2 * 1 + 1) + 5, 4 * (2 * 10 + 1) + 5]
    assert [state["visits"].tolist() for state in kept] == [[2, 7], [4, 4]]


def test_the_last_transform_is_decoded_first() -> None:
    sent, _ = on_client(CHAIN, block(1, 10), [{"visits": np.zeros(2, dtype=np.float32)}] * 2, Draws(1))
    assert values(decode(CHAIN, sent)) == [1, 10]


def test_the_last_transform_finishes_first() -> None:
    assert values(finish(CHAIN, block(1), NOBODY)) == [2 * (4 * 1 + 5) + 1]


def test_no_transforms_change_nothing() -> None:
    sent, kept = on_client((), block(1, 2), (), Draws(1))
    assert values(sent) == [1, 2]
    assert kept == []
    assert values(finish((), block(1), NOBODY)) == [1]


@pytest.mark.parametrize(("name", "shape"), [("x", (1 << 40,)), ("y", ())], ids=["of another shape", "of another name"])
def test_bytes_of_another_shape_than_the_plan_are_refused_before_room_is_made(
    name: str, shape: tuple[int, ...]
) -> None:
    plan = Plan(3, {"x": np.zeros(4, dtype=np.float32)}, LocalSettings(steps=1))
    sent = Updates(np.ones(1), clients=np.array([5]), encoded={name: Encoded.of("k", shape, [b"few"])})
    with pytest.raises(UpdateError, match=f"the clients .5. sent '{name}' encoded.*the plan of round 3"):
        decode((), sent, plan)
    fits = Updates(
        np.ones(1), encoded={"x": Encoded.of("k", (4,), [b"few"]), "rows of t": Encoded.of("k", (9,), [b""])}
    )
    assert decode((), fits, plan) is fits


def test_a_state_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        on_client(CHAIN, block(1), [{"visits": np.zeros(1, dtype=np.float32)}], Draws(1))
