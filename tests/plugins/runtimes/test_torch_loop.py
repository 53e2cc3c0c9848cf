"""The plain runtime keeps every runtime's promises."""

from __future__ import annotations

from fedtower.plugins.runtimes.torch_loop.runtime import TorchLoop
from fedtower.recsys.testing.runtime import RuntimePromises


class TestTorchLoop(RuntimePromises):
    make = TorchLoop
