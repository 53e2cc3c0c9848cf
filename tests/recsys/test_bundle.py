"""A bundle is read only as it was written; whatever else it is, is said, and nobody crashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.plugins.runtimes.mnn.device import open_bundle as open_mnn
from fedtower.plugins.runtimes.onnx.device import open_bundle as open_onnx
from fedtower.recsys.bundle import MANIFEST, WEIGHTS, Bundle, BundleError, read_tensors, write_tensors
from fedtower.recsys.testing.examples import cases
from fedtower.recsys.testing.exporter import exported

OPENERS = {"onnx": open_onnx, "mnn": open_mnn}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of our own to break."""
    return Path(shutil.copytree(exported("histories").path, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who can sign it."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def settle(folder: Path, name: str) -> None:
    """Give a changed file its right digest."""
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    rewrite(folder, lambda values: values["files"].update({name: digest}))


def test_a_bundle_is_what_was_exported(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest == exported("histories").manifest
    assert set(bundle.manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    model = cases()["histories"].model
    assert list(bundle.parameters()) == [name for name, _ in model.shared.named_parameters()]
    for name, value in model.parameters().items():
        np.testing.assert_array_equal(bundle.parameters()[name], value)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_other_byte_in_any_file_is_seen(folder: Path, place: int) -> None:
    for name in Bundle.open(folder).manifest.files:
        whole = (folder / name).read_bytes()
        altered = bytearray(whole)
        altered[place] ^= 1
        (folder / name).write_bytes(altered)
        with pytest.raises(BundleError, match=f"{name} was altered or cut short"):
            Bundle.open(folder)
        (folder / name).write_bytes(whole)


def test_a_file_that_is_cut_short_or_gone_is_seen(folder: Path) -> None:
    for name in Bundle.open(folder).manifest.files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(BundleError, match="altered or cut short"):
            Bundle.open(folder)
        (folder / name).unlink()
        with pytest.raises(BundleError, match="not a whole bundle"):
            Bundle.open(folder)
        (folder / name).write_bytes(whole)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(tmp_path)


def set_format(values: dict[str, Any]) -> None:
    values["format"] = 99


def set_path(values: dict[str, Any]) -> None:
    values["files"]["../elsewhere"] = "0" * 64


def set_role(values: dict[str, Any]) -> None:
    values["graphs"]["train"]["inputs"][0]["role"] = "secret"


def set_shape(values: dict[str, Any]) -> None:
    values["graphs"]["train"]["inputs"][0]["shape"] = [7]


def set_huge(values: dict[str, Any]) -> None:
    values["slots"][0]["shape"] = [1 << 40, 1 << 40]


def set_negative(values: dict[str, Any]) -> None:
    values["inputs"][0]["shape"] = [-1]


def set_state(values: dict[str, Any]) -> None:
    values["state"] = [{"name": "m", "shape": [1], "value": None, "parameter": "nobody"}]


def set_local(values: dict[str, Any]) -> None:
    values["local"]["steps"] = -5


def set_no_graphs(values: dict[str, Any]) -> None:
    del values["graphs"]


@pytest.mark.parametrize(
    "change",
    [set_format, set_path, set_role, set_shape, set_huge, set_negative, set_state, set_local, set_no_graphs],
)
def test_a_manifest_that_does_not_hold_together_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(folder, change)
    with pytest.raises(BundleError):
        Bundle.open(folder)


def test_a_bundle_from_before_there_was_a_setting_has_its_default(folder: Path) -> None:
    today = Bundle.open(folder).manifest.settings
    rewrite(folder, lambda values: values["local"].pop("head_first"))
    assert Bundle.open(folder).manifest.settings == today
    rewrite(folder, lambda values: values["local"].update(invented_later=1))
    with pytest.raises(BundleError, match=r"local holds \['invented_later'\], .*: a newer one exported it"):
        Bundle.open(folder)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"format": 1}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(folder)


def test_weights_that_are_no_numbers_or_of_another_shape_are_refused(folder: Path) -> None:
    weights = read_tensors((folder / WEIGHTS).read_bytes(), "here")
    name = next(iter(weights))
    for wrong in (np.full_like(weights[name], np.nan), weights[name][None]):
        write_tensors(folder / WEIGHTS, {**weights, name: wrong})
        settle(folder, WEIGHTS)
        with pytest.raises(BundleError, match=name):
            Bundle.open(folder).parameters()
    write_tensors(folder / WEIGHTS, {key: value for key, value in weights.items() if key != name})
    settle(folder, WEIGHTS)
    with pytest.raises(BundleError, match=f"lack the parameter '{name}'"):
        Bundle.open(folder).parameters()


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_lower_weights_are_smaller_and_their_error_is_in_the_manifest(folder: Path, precision: Any) -> None:
    bundle = Bundle.open(folder)
    held = bundle.manifest.weights[precision]
    assert 0 < held["error"] < 0.05
    for name, value in bundle.parameters().items():
        lower = bundle.parameters(precision)[name]
        assert np.abs(lower - value).max() <= np.abs(value).max() / 127
    lower_bytes = sum(value.nbytes for value in read_tensors(bundle.read(held["file"]), "here").values())
    assert lower_bytes < sum(value.nbytes for value in bundle.parameters().values())


def test_what_the_graph_does_not_do_is_refused_and_rates_are_free(folder: Path) -> None:
    local = Bundle.open(folder).manifest.settings
    for name, value in (("optimizer", "adam"), ("batch_size", 99), ("proximal", 0.5), ("loss", "bce")):
        with pytest.raises(BundleError, match=f"local.{name}"):
            open_onnx(folder, type(local)(**{**vars(local), name: value}))
    open_onnx(folder, type(local)(**{**vars(local), "lr": 0.5, "row_lr": 0.25, "steps": None, "epochs": 2}))


def mutate(folder: Path, seed: int) -> str:
    """Change a few bytes of one file, or cut it; every fourth gets its digest put right. What was done, in words."""
    draws = Draws(seed)
    names = sorted(path.name for path in folder.iterdir())
    name = names[int(draws.integers(len(names), "file"))]
    data = bytearray((folder / name).read_bytes())
    if draws.uniform("cut") < 0.2:
        data = data[: int(draws.integers(len(data), "length"))]
    else:
        for at in range(1 + int(draws.integers(8, "count"))):
            data[int(draws.integers(len(data), "place", at))] ^= 1 + int(draws.integers(255, "byte", at))
    (folder / name).write_bytes(data)
    if seed % 4 == 0 and name != MANIFEST:
        settle(folder, name)
        return f"{name}, signed again"
    return name


def try_mutant(folder: Path, seed: int) -> str:
    """How a mutated bundle ended: ``refused``, ``crashed`` in the engine's own process, or ``trained``."""
    case = cases()["histories"]
    try:
        runtime = OPENERS["mnn" if seed % 8 < 4 else "onnx"](folder)
        runtime.bundle.parameters()
        updates, _ = runtime.train(case.plan(), case.work())
    except FedtowerError as error:
        return type(error).__name__
    assert all(np.shape(delta) for delta in updates.dense.values())
    return "trained"


def mutants(tmp_path: Path, seeds: range) -> dict[str, int]:
    ends: dict[str, int] = {}
    for seed in seeds:
        folder = tmp_path / f"mutant-{seed}"
        shutil.copytree(exported("histories").path, folder)
        done = mutate(folder, seed)
        end = try_mutant(folder, seed)
        if "signed again" not in done and end == "trained":
            # What no digest covers is the manifest itself, whose words may change without a meaning.
            assert done == MANIFEST, f"mutant {seed} ({done}) trained"
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(folder)
    return ends


def test_a_hundred_mutants_are_refused_and_nobody_crashes(tmp_path: Path) -> None:
    ends = mutants(tmp_path, range(100))
    assert sum(ends.values()) == 100
    assert ends["BundleError"] > 60, ends


@pytest.mark.soak
def test_a_thousand_mutants_are_refused_and_nobody_crashes(tmp_path: Path) -> None:
    assert sum(mutants(tmp_path, range(1000, 2000)).values()) == 1000
