"""The fast runtime: the numbers of the plain loop, and the same bits whatever the block."""

from __future__ import annotations

import pytest

from fedtower.plugins.runtimes.vectorized.runtime import Vectorized
from fedtower.recsys.testing.runtime import RuntimePromises


class TestOperationByOperation(RuntimePromises):
    @staticmethod
    def make() -> Vectorized:
        return Vectorized(compile=False)


@pytest.mark.soak  # it compiles some forty graphs
class TestCompiled(RuntimePromises):
    make = Vectorized


class TestWorkers(RuntimePromises):
    @staticmethod
    def make() -> Vectorized:
        return Vectorized(compile=False, workers=2)
