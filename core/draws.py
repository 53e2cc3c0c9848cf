"""Counter-based randomness: every draw is a hash of (seed, purpose, key), so nothing is consumed and nothing is kept.

A draw depends on what it is for, never on how many draws came before it: blocks of any width, in any order, on any
number of threads, draw the same. The hash is the SplitMix64 finaliser (Steele et al., 2014, https://doi.org/10.1145/2660193.2660195,
constants of Stafford's variant 13), absorbed once per key word, in wrapping 64-bit integers: the same expressions give
the same bits on numpy arrays and on torch tensors. These draws are replayable by whoever holds the seed: they serve
training and simulation, never the noise that protects someone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Words = TypeVar("Words", NDArray[np.int64], Any)  # or a torch tensor, of which core knows nothing

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed word
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(words: Words) -> Words:
    """SplitMix64's finaliser of each word of an int64 array (numpy or torch): every input bit flips half of the output
    bits.
    """
    # An int64 shift to the right copies the sign, so the mask takes the copied bits away again.
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * _MIX_1
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return words ^ ((words >> 31) & 0x1FFFFFFFF)


def absorb(state: Words, word: Words) -> Words:
    """The hash ``state`` with one more key word in it; both broadcast."""
    mixed: Words = mix((state ^ word) + _GOLDEN)
    return mixed


@dataclass(frozen=True)
class Draws:
    """All the randomness of a run, from one seed.

    ``purpose`` names what a draw is for; ``key`` says which one, by convention (round, client, position, ...). Arrays
    in the key broadcast, and the result has their common shape.

    >>> draws = Draws(seed=1)
    >>> draws.integers(10, "coin", 0, np.arange(5))
    array([7, 7, 0, 9, 8])
    """

    seed: int
    scope: str = ""

    def under(self, scope: str) -> Draws:
        """The draws of one part of a whole: equal parts that draw for one purpose draw differently in each scope."""
        return Draws(self.seed, f"{self.scope}{scope}/")

    def bits(self, purpose: str, *key: int | IntArray) -> IntArray:
        """64 random bits an entry, as int64."""
        digest = hashlib.blake2b(f"{self.seed}:{self.scope}{purpose}".encode(), digest_size=8).digest()
        state: IntArray = np.frombuffer(digest, dtype="<i8").astype(np.int64)
        shape = np.broadcast_shapes(*(np.shape(word) for word in key)) if key else ()
        with np.errstate(over="ignore"):
            for word in key:
                state = absorb(state, np.atleast_1d(np.asarray(word, dtype=np.int64)))
        return np.asarray(np.broadcast_to(state, shape or (1,)).reshape(shape))

    def uniform(self, purpose: str, *key: int | IntArray) -> FloatArray:
        """Uniform draws from [0, 1), in steps of 2**-53."""
        return ((self.bits(purpose, *key) >> 11) & 0x1FFFFFFFFFFFFF).astype(np.float64) * 2.0**-53

    def integers(self, n: int | IntArray, purpose: str, *key: int | IntArray) -> IntArray:
        """Uniform draws from 0 .. n-1, for ``n`` up to 2**31 (biased by at most n / 2**32).

        Lemire, 2019, https://arxiv.org/abs/1805.10941, the multiplication without its rejection.
        """
        limit = np.asarray(n, dtype=np.int64)
        if limit.size and (limit.min() < 1 or limit.max() > 2**31):
            raise ValueError(f"integers() draws from 1 to 2**31 values, not {limit.min()} to {limit.max()}")
        return np.asarray((((self.bits(purpose, *key) >> 32) & 0xFFFFFFFF) * limit) >> 32)

    def normal(self, purpose: str, *key: int | IntArray) -> FloatArray:
        """Standard normal draws (Box and Muller, 1958, the cosine half)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(f"{purpose}/radius", *key)))
        return np.asarray(radius * np.cos(2.0 * np.pi * self.uniform(f"{purpose}/angle", *key)))

    def permutation(self, n: int, purpose: str, *key: int | IntArray) -> IntArray:
        """The numbers 0 .. n-1 in random order: the argsort of n draws."""
        keys = self.bits(purpose, *key, np.arange(n, dtype=np.int64))
        return np.argsort(keys, kind="stable").astype(np.int64)
