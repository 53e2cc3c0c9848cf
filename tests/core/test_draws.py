"""Draws: the hash is the published one, the same in every library, and what is drawn from it is fair."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws, absorb, mix

IntArray = NDArray[np.int64]

GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64 - 1
words = st.integers(-(2**63), 2**63 - 1)
sizes = st.integers(1, 7)
law = settings(deadline=None, max_examples=50)  # a busy machine is not a broken law


def plain_mix(word: int) -> int:
    """SplitMix64's finaliser as it is printed, in Python's own integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def plain_bits(seed: int, purpose: str, *key: int) -> int:
    """What Draws.bits says it does, one word at a time."""
    state = int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest(), "little")
    for word in key:
        state = plain_mix(((state ^ (word & WORD)) + GOLDEN) & WORD)
    return state


def unsigned(values: NDArray[np.int64]) -> list[int]:
    return [int(value) & WORD for value in values.ravel()]


def unfairness(counts: NDArray[np.int64], expected: float) -> float:
    """Chi-square of counts that should all be ``expected``, in standard deviations from its mean: within 4 if fair."""
    freedom = counts.size - 1
    return float((np.square(counts - expected).sum() / expected - freedom) / math.sqrt(2 * freedom))


def test_the_first_numbers_of_splitmix64_are_the_published_ones() -> None:
    # The generator seeded with 0 returns the finaliser of 1, 2, 3 times the golden constant.
    golden = np.array([k * GOLDEN & WORD for k in (1, 2, 3)], dtype=np.uint64).astype(np.int64)
    assert unsigned(mix(golden)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@law
@given(st.lists(words, min_size=1, max_size=8))
def test_mix_is_the_printed_hash(values: list[int]) -> None:
    assert unsigned(mix(np.array(values, dtype=np.int64))) == [plain_mix(value & WORD) for value in values]


@law
@given(words, st.text(max_size=8), st.lists(words, max_size=4))
def test_bits_absorb_one_word_after_the_other(seed: int, purpose: str, key: list[int]) -> None:
    got = Draws(seed).bits(purpose, *key)
    assert got.shape == ()
    assert unsigned(got) == [plain_bits(seed, purpose, *key)]


@law
@given(st.lists(words, min_size=1, max_size=8), words)
def test_torch_gives_the_same_bits_as_numpy(values: list[int], word: int) -> None:
    array = np.array(values, dtype=np.int64)
    tensor = torch.tensor(values, dtype=torch.int64)
    np.testing.assert_array_equal(mix(tensor).numpy(), mix(array))
    np.testing.assert_array_equal(absorb(tensor, word).numpy(), absorb(array, np.array([word])))
    np.testing.assert_array_equal(absorb(word, tensor).numpy(), absorb(np.array([word]), array))


def test_every_input_bit_flips_half_of_the_output_bits() -> None:
    inputs = np.arange(1000, dtype=np.int64)
    flipped = inputs[:, None] ^ (np.int64(1) << np.arange(64))
    changed = mix(inputs)[:, None] ^ mix(flipped)
    ones = np.unpackbits(changed.view(np.uint8), axis=None).reshape(1000, 64, 64).mean(axis=0)
    assert ones.min() > 0.4
    assert ones.max() < 0.6


@law
@given(sizes, sizes, st.integers(0, 100))
def test_a_draw_does_not_depend_on_what_is_drawn_beside_it(clients: int, positions: int, round: int) -> None:
    draws, who, where = Draws(3), np.arange(clients), np.arange(positions)
    together = draws.bits("a", round, who[:, None], where[None, :])
    assert together.shape == (clients, positions)
    alone = [[int(draws.bits("a", round, client, place)) for place in range(positions)] for client in range(clients)]
    np.testing.assert_array_equal(together, np.array(alone, dtype=np.int64))


def test_an_empty_key_array_draws_nothing() -> None:
    none = np.zeros((0,), dtype=np.int64)
    assert Draws(1).bits("a", 3, none).shape == (0,)
    assert Draws(1).uniform("a", np.arange(4)[:, None], none).shape == (4, 0)
    assert Draws(1).integers(np.zeros(0, dtype=np.int64), "a", none).shape == (0,)


def test_seed_purpose_and_every_word_of_the_key_matter() -> None:
    draws = Draws(1)
    drawn = [
        draws.bits("a"),
        draws.bits("a", 0),
        draws.bits("a", 1),
        draws.bits("a", 0, 0),
        draws.bits("a", 0, 1),
        draws.bits("a", 1, 0),
        draws.bits("b", 1, 0),
        Draws(2).bits("a", 1, 0),
        Draws(-1).bits("a", 1, 0),
    ]
    assert len({int(bits) for bits in drawn}) == len(drawn)


@law
@given(words)
def test_uniform_draws_are_the_upper_53_bits(client: int) -> None:
    assert float(Draws(3).uniform("u", client)) == (plain_bits(3, "u", client) >> 11) / 2**53


def test_uniform_draws_are_in_range_and_even() -> None:
    drawn = Draws(7).uniform("u", 1, np.arange(200_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_array_equal(drawn * 2.0**53, np.rint(drawn * 2.0**53))
    assert abs(unfairness(np.bincount((drawn * 1000).astype(np.int64), minlength=1000), 200)) < 4


@pytest.mark.parametrize("axis", ["round", "client", "position"])
def test_neighbours_are_independent(axis: str) -> None:
    # Pairs of draws whose keys differ by one in one word fill the square evenly.
    grid = np.arange(200)
    keys: dict[str, tuple[IntArray, IntArray, IntArray]] = {
        "round": (grid[:, None], grid[None, :], np.array(5)),
        "client": (np.array(5), grid[:, None], grid[None, :]),
        "position": (grid[None, :], np.array(5), grid[:, None]),
    }
    drawn = Draws(7).uniform("u", *keys[axis])
    cells = (drawn[:-1] * 16).astype(np.int64) * 16 + (drawn[1:] * 16).astype(np.int64)
    assert abs(unfairness(np.bincount(cells.ravel(), minlength=256), cells.size / 256)) < 4


@law
@given(st.integers(1, 2**31), words)
def test_integers_are_the_upper_half_times_n(n: int, client: int) -> None:
    (drawn,) = Draws(3).integers(n, "i", np.array([client]))
    assert drawn == ((plain_bits(3, "i", client) >> 32) * n) >> 32
    assert 0 <= drawn < n


@pytest.mark.parametrize("n", [1, 2, 6, 100, 1000])
def test_integers_are_even(n: int) -> None:
    drawn = Draws(7).integers(n, "i", 1, np.arange(200 * n))
    counts = np.bincount(drawn, minlength=n)
    assert len(counts) == n
    if n > 1:
        assert abs(unfairness(counts, 200)) < 4


def test_integers_take_a_limit_an_entry() -> None:
    limits = np.tile([1, 3, 2**31], 1000)
    drawn = Draws(7).integers(limits, "i", np.arange(3000))
    assert np.all(drawn >= 0)
    assert np.all(drawn < limits)
    assert drawn[::3].max() == 0
    assert set(drawn[1::3].tolist()) == {0, 1, 2}
    assert drawn[2::3].max() > 2**30


@pytest.mark.parametrize("n", [0, -1, 2**31 + 1])
def test_limits_out_of_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="1 to 2"):
        Draws(7).integers(n, "i", 0)


def test_normal_draws_have_the_normal_distribution() -> None:
    drawn = np.sort(Draws(7).normal("n", np.arange(100_000)))
    below = np.array([0.5 + 0.5 * math.erf(value / math.sqrt(2)) for value in drawn])
    # Kolmogorov and Smirnov: 1.95 is passed by one sample in a thousand.
    assert np.abs(below - (np.arange(100_000) + 0.5) / 100_000).max() < 1.95 / math.sqrt(100_000)
    assert np.all(np.isfinite(drawn))
    assert drawn[0] < -4
    assert drawn[-1] > 4


def test_the_extreme_uniform_draws_give_finite_normal_draws() -> None:
    class Extreme(Draws):
        def uniform(self, purpose: str, *key: int | IntArray) -> NDArray[np.float64]:
            return np.array([0.0, 1.0 - 2.0**-53])

    assert np.all(np.isfinite(Extreme(1).normal("n", 0)))


def test_a_permutation_holds_every_number_once() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(Draws(7).permutation(n, "p", 4).tolist()) == list(range(n))


def test_all_permutations_are_equally_likely() -> None:
    draws = Draws(7)
    codes = [int("".join(map(str, draws.permutation(4, "p", round))), base=4) for round in range(4800)]
    counts = np.array(list(np.unique(codes, return_counts=True)[1]), dtype=np.int64)
    assert len(counts) == 24
    assert abs(unfairness(counts, 200)) < 4


@law
@given(st.integers(0, 1000))
def test_the_keys_of_a_permutation_never_tie(round: int) -> None:
    # Absorbing is one to one in its word, so no stable sort is ever needed to break a tie.
    assert len(np.unique(Draws(7).bits("p", round, np.arange(2000)))) == 2000


def test_every_scope_draws_for_itself() -> None:
    draws = Draws(1)
    told = [each.bits("noise", 1, np.arange(4)).tolist() for each in (draws, draws.under("a"), draws.under("b"))]
    assert len({tuple(bits) for bits in told}) == 3
    assert draws.under("a").under("b") != draws.under("b").under("a")
    assert draws.under("a").bits("noise", 1, np.arange(4)).tolist() == told[1]
