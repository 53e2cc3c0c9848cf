"""The fast runtime: the numbers of the plain loop, and the same bits whatever the block."""

from __future__ import annotations

from fedtower.plugins.runtimes.vectorized.runtime import Vectorized
from fedtower.recsys.testing.runtime import RuntimePromises


class TestOperationByOperation(RuntimePromises):
    @staticmethod
    def make() -> Vectorized:
        return Vectorized(compile=False)


class TestCompiled(RuntimePromises):
    make = Vectorized
