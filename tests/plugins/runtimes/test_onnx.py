"""The runtime ``onnx``: what every runtime promises, from an exported bundle."""

from fedtower.plugins.runtimes.onnx.runtime import OnnxRuntime
from fedtower.recsys.testing.runtime import RuntimePromises


class TestOnnx(RuntimePromises):
    make = OnnxRuntime
