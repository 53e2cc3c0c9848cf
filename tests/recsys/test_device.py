"""A device trains from a bundle without torch; what does not fit is refused, and an engine that dies dies alone."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtower.core.errors import MissingDependency
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Work
from fedtower.core.testing.promises import assert_close
from fedtower.plugins.runtimes.mnn import device as mnn
from fedtower.plugins.runtimes.onnx import device as onnx
from fedtower.plugins.runtimes.torch_loop.runtime import TorchLoop
from fedtower.recsys.bundle import BundleError, InputError
from fedtower.recsys.device import DeviceRuntime
from fedtower.recsys.engine import Engine, EngineCrashed, EngineError
from fedtower.recsys.models import ExampleTower
from fedtower.recsys.reranking import Request
from fedtower.recsys.testing.examples import Case, cases
from fedtower.recsys.testing.exporter import exported

ENGINES = {"onnx": onnx, "mnn": mnn}


def opened(engine: str, name: str, optimizer: str = "sgd") -> DeviceRuntime:
    open_bundle: Callable[[Path], DeviceRuntime] = ENGINES[engine].open_bundle
    return open_bundle(exported(name, optimizer).path)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["histories", "clicks", "images"])
def test_a_visit_from_the_bundle_is_the_plain_one(engine: str, name: str) -> None:
    case = cases()[name]
    updates, own = opened(engine, name).train(case.plan(), case.work())
    want, want_own = TorchLoop().open(case.model, case.plan().local).train(case.plan(), case.work())
    assert_close(updates, want, rtol=1e-5, atol=1e-6)
    assert_close(dict(own), dict(want_own), rtol=1e-5, atol=1e-6)


DEVICE = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "pandas", "onnx", "torchrec"}:
            raise ImportError(f"a device has no {name}")

sys.meta_path.insert(0, Forbidden())
import json
import numpy as np
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Work
from fedtower.plugins.runtimes.ENGINE.device import open_bundle, open_scorer

data = np.load(sys.argv[2])
runtime = open_bundle(sys.argv[1])
group = lambda name: {key.partition("/")[2]: data[key] for key in data.files if key.startswith(name + "/")}
plan = Plan(1, group("parameters"), runtime.local)
rows = RowIds(data["offsets"], data["ids"])
work = Work(data["clients"], data["steps"], data["examples"], group("inputs"), group("slots"), {"item": rows},
            {"item": data["rows"]}, group("states"))
updates, own = runtime.train(plan, work)
open_scorer(sys.argv[1])._graph.engine
for name in ("torch", "pandas", "onnx", "torchrec"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name)
dense = {f"dense/{name}": value for name, value in updates.dense.items()}
np.savez(sys.argv[3], rows=updates.rows["item"].row_deltas, **dense)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_is_trained_where_torch_pandas_onnx_and_torchrec_cannot_be_imported(
    engine: str, tmp_path: Path
) -> None:
    case = cases()["histories"]
    plan, work = case.plan(), case.work()
    groups: dict[str, Mapping[str, Any]] = {
        "parameters": plan.parameters,
        "inputs": work.inputs,
        "slots": work.slots,
        "states": work.states,
    }
    arrays = {f"{group}/{name}": value for group, held in groups.items() for name, value in held.items()}
    needed = work.row_ids["item"]
    arrays |= {"offsets": needed.offsets, "ids": needed.ids, "rows": work.rows["item"]}
    arrays |= {"clients": work.clients, "steps": work.steps, "examples": work.examples}
    np.savez(tmp_path / "in.npz", **arrays)
    program = tmp_path / "device.py"
    program.write_text(DEVICE.replace("ENGINE", engine))
    files = [str(exported("histories").path), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    environment = {**os.environ, "PYTHONPATH": ":".join(each for each in sys.path if each)}
    done = subprocess.run(
        [sys.executable, str(program), *files], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npz")
    want, _ = TorchLoop().open(case.model, plan.local).train(plan, work)
    assert_close(got["rows"], want.rows["item"].row_deltas)
    for name, value in want.dense.items():
        assert_close(got[f"dense/{name}"], value, name)


def with_input(work: Work, name: str, value: Any) -> Work:
    return replace(work, inputs={**work.inputs, name: value})


def first(value: Any, entry: Any) -> Any:
    out = np.array(value)
    out.reshape(-1)[0] = entry
    return out


def bad_visits(case: Case) -> dict[str, tuple[Plan, Work, str]]:
    plan, work = case.plan(), case.work()
    target, rows, needed = work.inputs["target"], work.rows["item"], work.row_ids["item"]
    name = next(iter(plan.parameters))
    parameters = dict(plan.parameters)

    def row_ids(ids: Any, offsets: Any = needed.offsets) -> Work:
        return replace(work, row_ids={"item": RowIds(offsets, ids)})

    def given(value: Any) -> Plan:
        return replace(plan, parameters={**parameters, name: value})

    return {
        "a target too high": (plan, with_input(work, "target", first(target, 10)), "must lie in 0 .. 9"),
        "a negative target": (plan, with_input(work, "target", first(target, -1)), "must lie in 0 .. 9"),
        "a float target": (plan, with_input(work, "target", target.astype(np.float32)), "must be integers"),
        "a missing input": (plan, replace(work, inputs={"weight": work.inputs["weight"]}), "the inputs must be"),
        "one input more": (plan, with_input(work, "colour", target), "the inputs must be"),
        "a narrow batch": (plan, with_input(work, "target", target[..., :-1]), "shapes are fixed at export"),
        "NaN": (plan, with_input(work, "user", first(work.inputs["user"], np.nan)), "NaN or infinity"),
        "doubles": (plan, with_input(work, "user", work.inputs["user"].astype(np.float64)), "must be float32"),
        "a place too high": (
            plan,
            replace(work, slots={**work.slots, "history": work.slots["history"] + 99}),
            "a row that",
        ),
        "a negative place": (
            plan,
            replace(work, slots={**work.slots, "history": work.slots["history"] - 9}),
            "must lie in 0",
        ),
        "a missing slot": (plan, replace(work, slots={}), "the slots must be"),
        "infinite rows": (plan, replace(work, rows={"item": first(rows, np.inf)}), "NaN or infinity"),
        "narrow rows": (plan, replace(work, rows={"item": rows[:, :-1]}), "shapes are fixed"),
        "rows of another source": (plan, replace(work, rows={"user": rows}), "the sources of rows"),
        "a row id too high": (plan, row_ids(first(needed.ids, 40)), "are numbered 0 .. 39"),
        "a negative row id": (plan, row_ids(first(needed.ids, -1)), "are numbered 0 .. 39"),
        "offsets that go back": (plan, row_ids(needed.ids, needed.offsets[::-1]), "the offsets"),
        "too many steps": (plan, replace(work, steps=work.steps + 9), "must lie in 0 .. 3"),
        "negative steps": (plan, replace(work, steps=work.steps - 9), "must lie in 0 .. 3"),
        "steps of fewer clients": (plan, replace(work, steps=work.steps[:-1]), "steps for 5 clients"),
        "no device parameters": (plan, replace(work, states={}), "the device's parameters must be"),
        "a parameter that is no number": (given(first(parameters[name], np.nan)), work, "NaN or infinity"),
        "a parameter of another shape": (given(parameters[name][None]), work, "shapes are fixed"),
        "a missing parameter": (replace(plan, parameters={}), work, "the plan's parameters must be"),
    }


@pytest.mark.parametrize("what", bad_visits(cases()["histories"]))
@pytest.mark.parametrize("engine", ENGINES)
def test_a_visit_that_does_not_fit_is_refused_before_it_reaches_the_engine(engine: str, what: str) -> None:
    runtime = opened(engine, "histories")
    plan, work, message = bad_visits(cases()["histories"])[what]
    with pytest.raises(InputError, match=message):
        runtime.train(plan, work)
    assert "_graph" not in vars(runtime)  # no engine was even started


@pytest.mark.parametrize("label", [-1.0, 4.0, 0.5, np.nan])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    case = cases()["images"]
    work = with_input(case.work(), "label", first(case.work().inputs["label"], label))
    with pytest.raises(InputError, match="label"):
        opened("onnx", "images").train(case.plan(), work)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_killed_is_reported_and_the_caller_lives(engine: str) -> None:
    case, runtime = cases()["histories"], opened(engine, "histories")
    before, _ = runtime.train(case.plan(), case.work())
    os.kill(runtime._graph.engine._process.pid, signal.SIGKILL)
    with pytest.raises(EngineCrashed, match=r"died by SIGKILL while it answered 'train'"):
        runtime.train(case.plan(), case.work())
    again, _ = runtime.train(case.plan(), case.work())  # in a new engine
    assert_close(again, before)


# What stands in for an engine below.
class Rude:
    """Answers, raises, hangs, prints, crashes, or sends nonsense."""

    def answer(self, word: str, values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        if word == "die":
            os.write(1, b"my last words")
            faulthandler.disable()  # pytest's would print a trace among the results
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "hang":
            signal.pause()
        if word == "raise":
            raise ValueError("no such thing")
        if word == "leave":
            os._exit(3)
        if word == "import":
            raise ModuleNotFoundError("No module named 'MNN.nn'", name="MNN.nn")
        return dict(values), dict(arrays)


def rude() -> Rude:
    return Rude()


@pytest.fixture(params=[True, False], ids=["forked", "spawned"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Engine("test_device:rude", timeout_seconds=20.0, fork=request.param)


def test_what_is_sent_comes_back_with_its_types_and_shapes(engine: Engine) -> None:
    arrays = {
        "floats": np.array([[1.5, -0.0]], dtype=np.float32),
        "number": np.array(2.0),
        "none": np.zeros((0, 3), dtype=np.int64),
        "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "flags": np.array([True, False]),
    }
    values, out = engine.ask("echo", {"lr": 0.5, "name": "ü"}, arrays)
    assert values == {"word": "echo", "lr": 0.5, "name": "ü"}
    assert list(out) == list(arrays)
    for name, value in arrays.items():
        assert (out[name].dtype, out[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(out[name], value)


def test_what_the_host_raises_is_passed_on_and_it_goes_on(engine: Engine) -> None:
    with pytest.raises(EngineError, match="ValueError: no such thing"):
        engine.ask("raise")
    assert engine.ask("echo", {"a": 1})[0]["a"] == 1


def test_a_library_that_the_engine_lacks_is_told_with_what_brings_it(engine: Engine) -> None:
    with pytest.raises(
        MissingDependency, match=r"needs MNN, which is not installed; `pip install 'fedtower\[device\]'`"
    ):
        engine.ask("import")


@pytest.mark.parametrize(("word", "how"), [("die", "died by SIGSEGV"), ("leave", "died with exit code 3")])
def test_a_death_is_reported_once_and_the_engine_stays_dead(engine: Engine, word: str, how: str) -> None:
    with pytest.raises(EngineCrashed, match=how) as told:
        engine.ask(word)
    assert ("my last words" in str(told.value)) == (word == "die")
    with pytest.raises(EngineError, match="has been closed"):
        engine.ask("echo")


def test_an_engine_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    engine = Engine("test_device:rude", timeout_seconds=3.0, fork=False)
    with pytest.raises(EngineCrashed, match="no answer to 'hang'"):
        engine.ask("hang")
    assert engine._process.wait(1.0) is not None


def test_an_engine_that_nobody_holds_ends(engine: Engine) -> None:
    process = engine._process
    engine.ask("echo")
    engine.close()
    assert process.wait(5.0) is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_of_examples_gives_their_logits(engine: str) -> None:
    case = cases()["clicks"]
    work, tower = case.work(clients=1), case.model.shared
    slots = {"category": work.rows["category"][work.slots["category"][0, 0]]}
    inputs = {name: value[0, 0] for name, value in work.inputs.items()}
    scorer = ENGINES[engine].open_scorer(exported("clicks").path)
    assert isinstance(tower, ExampleTower)
    with torch.no_grad():
        tensors = ({name: torch.from_numpy(value) for name, value in held.items()} for held in (slots, inputs))
        want = tower.logits(*tensors).numpy()
    np.testing.assert_allclose(scorer.logits(slots, inputs), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(BundleError, match="has no candidates to rank"):
        scorer.score(slots["category"][:, 0], inputs["dense"][0], slots["category"][:, 0])


def test_a_bundle_ranks_candidates_on_the_command_line(tmp_path: Path) -> None:
    request = Request(
        history=np.ones((3, 8), dtype=np.float32),
        user=np.zeros(3, dtype=np.float32),
        candidates=np.stack([np.full(8, scale, dtype=np.float32) for scale in (0.0, 1.0, -1.0)]),
        names=("none", "one", "minus"),
    )
    request.write(tmp_path / "request.safetensors")
    words = ["recommend", "--bundle", str(exported("histories").path), "--json", "-k", "2"]
    code = f"""
import sys
from fedtower.core.cli import main
try:
    main({[*words, "--request", str(tmp_path / "request.safetensors")]!r})
finally:
    assert not {{"torch", "onnx", "pandas"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(each for each in sys.path if each)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ranked = json.loads(done.stdout)
    scores = onnx.open_scorer(exported("histories").path).score(request.history, request.user, request.candidates)
    order = np.argsort(-scores, kind="stable")[:2]
    assert [each["item"] for each in ranked] == [request.names[place] for place in order]
    np.testing.assert_allclose([each["score"] for each in ranked], scores[order], rtol=1e-5)
