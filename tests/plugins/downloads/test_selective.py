"""What goes down first: by hand, that nothing is lost, and that all of it is all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.sparse import BITMAP
from fedtower.plugins.downloads.selective import Selective


def of(a: Any, b: Any) -> dict[str, Any]:
    return {"b": np.array(b, dtype=np.float32), "a": np.array(a, dtype=np.float32)}


def after(share: float, wanted: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    download = Selective(share)
    messages = download.encode(wanted, held, 2, Draws(1))
    return {name: download.decode(messages[name], value.shape, held[name]) for name, value in wanted.items()}


def test_the_largest_differences_of_all_parameters_together_by_hand() -> None:
    wanted, held = of([[1.0, -9.0], [3.0, 4.0]], [5.0, 5.5]), of([[1.5, -8.0], [3.0, 4.0]], [5.0, 3.0])
    got = after(0.3, wanted, held)  # two of six: 5.5 for 3.0, and -9 for -8
    assert got["a"].tolist() == [[1.5, -9.0], [3.0, 4.0]]
    assert got["b"].tolist() == [5.0, 5.5]
    messages = Selective(0.3).encode(wanted, held, 2, Draws(1))
    assert messages["a"].tobytes() == bytes([BITMAP, 1, 0, 0, 0, 0b10]) + np.float32(-9).tobytes()


def test_what_is_as_it_should_be_is_not_sent_whatever_the_share() -> None:
    wanted, held = of([1.0, 2.0, 3.0], [4.0]), of([1.0, 7.0, 3.0], [4.0])
    messages = Selective(1.0).encode(wanted, held, 2, Draws(1))
    assert len(messages["b"]) == 0
    assert len(messages["a"]) == 5 + 1 + 4


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.sampled_from([0.01, 0.1, 0.35, 1.0]), st.integers(0, 99))
def test_what_is_held_comes_to_what_stands_still_and_no_step_leads_away(size: int, share: float, seed: int) -> None:
    draws = Draws(seed)
    wanted, held = (of(draws.normal(name, np.arange(size)), draws.normal(f"{name}/b", np.arange(3))) for name in "xy")
    distance = np.inf
    for _ in range(int(np.ceil(1 / share)) + 1):
        held = after(share, wanted, held)
        off = sum(float(np.square(wanted[name] - held[name]).sum()) for name in wanted)
        assert off < distance or off == 0
        distance = off
    assert all(np.array_equal(wanted[name], held[name]) for name in wanted), "to the last bit"


def test_which_of_equals_goes_down_does_not_depend_on_the_order_of_names() -> None:
    wanted, held = of([1.0], [1.0]), of([0.0], [0.0])
    other = [{name: each[name] for name in ("a", "b")} for each in (wanted, held)]
    assert after(0.5, wanted, held) == after(0.5, other[0], other[1])


def test_a_share_of_one_is_what_is_wanted_at_once() -> None:
    draws = Draws(3)
    wanted, held = (of(draws.normal(name, np.arange(50)), [1.0]) for name in "xy")
    assert all(np.array_equal(value, wanted[name]) for name, value in after(1.0, wanted, held).items())


@pytest.mark.parametrize("held", [None, np.zeros(4, dtype=np.float32)])
def test_nothing_held_or_something_else_is_refused(held: Any) -> None:
    wanted = of([1.0, 2.0, 3.0], [4.0])
    messages = Selective(1.0).encode(wanted, of([0.0] * 3, [0.0]), 2, Draws(1))
    with pytest.raises(UpdateError, match="held"):
        Selective(1.0).decode(messages["a"], (3,), held)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_no_share_of_a_whole_is_refused(share: float) -> None:
    with pytest.raises(RecipeError, match=r"download\.share must be above 0 and at most 1"):
        Selective(share)
