"""The runtime ``mnn``: what every runtime promises, from an exported bundle."""

import pytest

from fedtower.plugins.runtimes.mnn.runtime import MnnRuntime
from fedtower.recsys.testing.runtime import RuntimePromises


@pytest.mark.soak  # each graph is exported and converted; tests/conformance keeps the same promises in `make test`
class TestMnn(RuntimePromises):
    make = MnnRuntime
