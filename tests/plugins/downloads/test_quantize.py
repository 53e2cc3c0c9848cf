"""Parameters in few bits: by hand, right on average, and in as many bytes as the bits say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.packing import as_bytes
from fedtower.plugins.downloads.quantize import Quantize


def of(values: Any) -> dict[str, Any]:
    return {"w": np.array(values, dtype=np.float32)}


def seen(download: Quantize, values: Any, round: int = 1, seed: int = 1) -> Any:
    message = download.encode(of(values), {}, round, Draws(seed))["w"]
    return download.decode(message, np.shape(values), None)


def test_nearest_by_hand() -> None:
    values = [[7.0, -2.4], [2.6, 0.4]]
    assert seen(Quantize(4, "nearest"), values).tolist() == [[7.0, -2.0], [3.0, 0.0]]
    message = Quantize(4, "nearest").encode(of(values), {}, 1, Draws(1))["w"]
    scale = as_bytes(np.array([[7.0]], dtype=np.float32)).tobytes()
    assert message.tobytes() == scale + bytes([14 | 5 << 4, 10 | 7 << 4]), "codes of 7, -2, 3 and 0, each plus 7"


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_right_on_average_over_rounds(bits: Any) -> None:
    values = [1.0, 0.3, -0.7, 0.01, 0.0]
    mean = np.mean([seen(Quantize(bits), values, round) for round in range(4000)], axis=0, dtype=np.float64)
    # A draw is off by a step of 1/7 at most: the mean of 4,000 deviates by less than 0.0012.
    np.testing.assert_allclose(mean, values, atol=0.006)


def test_rounds_and_seeds_round_otherwise_and_the_same_round_alike() -> None:
    values = np.linspace(-1, 1, 200)
    first = seen(Quantize(4), values)
    assert np.array_equal(first, seen(Quantize(4), values))
    assert not np.array_equal(first, seen(Quantize(4), values, round=2))
    assert not np.array_equal(first, seen(Quantize(4), values, seed=2))


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_as_many_as_the_bits_say(bits: Any) -> None:
    message = Quantize(bits).encode(of(np.ones(5000)), {}, 1, Draws(1))["w"]
    assert len(message) == 4 * 10 + 5000 * bits // 8


def test_what_was_encoded_with_other_bits_is_refused() -> None:
    message = Quantize(8).encode(of(np.ones(10)), {}, 1, Draws(1))["w"]
    with pytest.raises(UpdateError, match=r"shape \(10,\) has 9 bytes in 4 bits a number, but 14 came"):
        Quantize(4).decode(message, (10,), None)
