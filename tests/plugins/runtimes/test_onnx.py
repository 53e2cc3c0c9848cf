"""The runtime ``onnx``: what every runtime promises, from an exported bundle."""

import pytest

from fedtower.plugins.runtimes.onnx.runtime import OnnxRuntime
from fedtower.recsys.testing.runtime import RuntimePromises


@pytest.mark.soak  # each graph is exported and converted; tests/conformance keeps the same promises in `make test`
class TestOnnx(RuntimePromises):
    make = OnnxRuntime
