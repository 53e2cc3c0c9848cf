"""The runtime ``mnn``: what every runtime promises, from an exported bundle."""

from fedtower.plugins.runtimes.mnn.runtime import MnnRuntime
from fedtower.recsys.testing.runtime import RuntimePromises


class TestMnn(RuntimePromises):
    make = MnnRuntime
