"""The runtime ``onnx``: what every runtime promises, from an exported bundle."""

from dataclasses import replace

import numpy as np
import pytest

from fedtower.core.runtime import Lookup
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.runtimes.onnx.runtime import OnnxRuntime
from fedtower.recsys.testing.examples import cases
from fedtower.recsys.testing.runtime import RuntimePromises


@pytest.mark.soak  # each graph is exported and converted; tests/conformance keeps the same promises in `make test`
class TestOnnx(RuntimePromises):
    make = OnnxRuntime


def test_an_input_that_is_looked_up_is_as_good_as_a_whole_one() -> None:
    case = cases()["images"]
    plan, work = case.plan(), case.work(clients=3)
    dense = work.inputs["dense"]
    places = np.arange(int(np.prod(dense.shape[:3]))).reshape(dense.shape[:3])
    table = Lookup(dense.reshape(-1, *dense.shape[3:]), places)
    looked_up = replace(work, inputs={**work.inputs, "dense": table})  # type: ignore[dict-item]
    opened = OnnxRuntime().open(case.model, plan.local)
    whole, _ = opened.train(plan, work)
    assert_same_bits(opened.train(plan, looked_up)[0], whole)
