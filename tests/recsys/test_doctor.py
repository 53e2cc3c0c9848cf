"""The doctor sees what is missing or does not fit, and names the command that mends it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import fedtower
from fedtower.recsys import doctor, installation
from fedtower.recsys.doctor import Diagnosis, Finding, Verdict, examine

LINUX = {"system": "Linux", "architecture": "x86_64", "python": "3.11.9", "cores": "2", "compiler": "", "data": ""}
BASE = {"numpy": "2.4.6", "pluggy": "1.7.0", "click": "8.5.1", "rich": "15.0.0", "tomli-w": "1.2.0"}
CLOUD = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu": "1.8.0+cpu.shim",
    "fbgemm-gpu-cpu": "1.8.0",
    "pandas": "3.1.1",
    "pyarrow": "26.0.1",
}
TRAINING = "training, evaluation and recommendation"
COMMAND_LINE = "the command line, recipes and plugins"


def healthy(module: str) -> str | None:
    return None


def diagnose(versions: Mapping[str, str], broken: Mapping[str, str] | None = None, *, cuda: bool = False) -> Diagnosis:
    return examine(versions, lambda module: (broken or {}).get(module), LINUX, cuda)


def finding(diagnosis: Diagnosis, name: str) -> Finding:
    return next(finding for finding in diagnosis.findings if finding.name == name)


def verdict(diagnosis: Diagnosis, feature: str) -> Verdict:
    return next(verdict for verdict in diagnosis.verdicts if verdict.feature == feature)


def test_the_light_install_works_and_says_what_is_off() -> None:
    diagnosis = diagnose(BASE)
    assert diagnosis.base_works
    assert verdict(diagnosis, COMMAND_LINE) == Verdict(COMMAND_LINE, True)
    training = verdict(diagnosis, TRAINING)
    assert not training.works
    assert training.why == "torch is missing, torchrec is missing, fbgemm-gpu is missing"
    assert training.remedy.endswith("-m pip install -r requirements/cpu.txt")


def test_the_cloud_install_trains() -> None:
    diagnosis = diagnose({**BASE, **CLOUD})
    assert verdict(diagnosis, TRAINING).works
    assert diagnosis.problems == ()
    assert finding(diagnosis, "fbgemm-gpu").version == "1.8.0 (CPU build)"


def test_the_stand_in_alone_is_not_fbgemm() -> None:
    versions = {**BASE, **CLOUD}
    del versions["fbgemm-gpu-cpu"]
    assert finding(diagnose(versions), "fbgemm-gpu").health == "missing"


def test_a_library_that_cannot_be_imported_is_off_and_says_why() -> None:
    diagnosis = diagnose({**BASE, **CLOUD}, {"fbgemm_gpu": "ImportError: undefined symbol: _ZN3c10"})
    assert finding(diagnosis, "fbgemm-gpu").health == "broken"
    assert "undefined symbol" in finding(diagnosis, "fbgemm-gpu").detail
    assert not verdict(diagnosis, TRAINING).works
    assert diagnosis.base_works


def test_a_broken_base_is_told() -> None:
    diagnosis = diagnose(BASE, {"numpy": "ImportError: libopenblas.so"})
    assert not diagnosis.base_works
    assert verdict(diagnosis, COMMAND_LINE).remedy.endswith("pip install --force-reinstall numpy")


def test_two_builds_of_fbgemm_are_one_too_many() -> None:
    (problem,) = diagnose({**BASE, **CLOUD, "fbgemm-gpu": "1.8.0"}).problems
    assert "both installed" in problem.what
    assert "uninstall -y fbgemm-gpu fbgemm-gpu-cpu && " in problem.remedy


def test_the_cuda_build_without_cuda_is_told() -> None:
    versions = {**BASE, **CLOUD, "fbgemm-gpu": "1.8.0"}
    del versions["fbgemm-gpu-cpu"]
    (problem,) = diagnose(versions).problems
    assert "CUDA build" in problem.what
    assert diagnose(versions, cuda=True).problems == ()
    assert verdict(diagnose(versions, cuda=True), 'device = "cuda"').works


def test_the_cpu_build_of_fbgemm_beside_a_gpu_is_told() -> None:
    diagnosis = diagnose({**BASE, **CLOUD}, cuda=True)
    assert "fbgemm is the CPU build" in diagnosis.problems[0].what
    assert not verdict(diagnosis, 'device = "cuda"').works
    assert verdict(diagnosis, TRAINING).works


@pytest.mark.parametrize(("torchrec", "torch"), [("1.6", "2.11"), ("1.7", "2.12"), ("1.8", "2.13"), ("1.9", "2.14")])
def test_the_known_pairs_fit_and_their_neighbours_do_not(torchrec: str, torch: str) -> None:
    pair = {"torchrec": f"{torchrec}.0", "torch": f"{torch}.1+cpu", "fbgemm-gpu-cpu": f"{torchrec}.0"}
    assert doctor.pairing_problems(pair) == ()
    (problem,) = doctor.pairing_problems({**pair, "torch": "2.15.0"})
    assert problem.what.endswith(f"belongs to torch {torch} and fbgemm {torchrec}, but torch is 2.15.0")
    (problem,) = doctor.pairing_problems({**pair, "fbgemm-gpu-cpu": "2.0.0"})
    assert problem.what.endswith("but fbgemm-gpu-cpu is 2.0.0")


def test_elsewhere_than_linux_on_x86_the_reader_is_told_what_is_missing() -> None:
    mac = examine(BASE, healthy, {**LINUX, "system": "Darwin", "architecture": "arm64"}, cuda=False)
    assert "fbgemm-gpu-cpu" in mac.problems[0].what
    assert mac.base_works


def test_without_a_checkout_the_command_needs_no_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fedtower, "__file__", str(tmp_path / "site" / "fedtower" / "__init__.py"))
    command = installation.install_command("cloud")
    assert "fbgemm-gpu-cpu==1.8.0" in command
    assert command.endswith("pip install --no-deps torchrec==1.8.0")
    assert "tensorboard" in installation.install_command("trackers")


def test_a_module_that_crashes_is_reported_and_takes_nobody_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "crashes.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "raises.py").write_text("raise ImportError('no such symbol')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert installation.why_not_importable("crashes") == "its import crashed with signal 11"
    assert installation.why_not_importable("raises") == "ImportError: no such symbol"
    assert installation.why_not_importable("json") is None


def test_what_lies_in_the_current_folder_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stray.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "No module named 'stray'" in (installation.why_not_importable("stray") or "")


def test_every_library_that_a_feature_needs_is_looked_for() -> None:
    names = {library.distribution for library in doctor.LIBRARIES} | {"CUDA"}
    assert {need for feature in doctor.FEATURES for need in feature.needs} <= names


def test_every_extra_that_the_doctor_names_brings_what_it_says() -> None:
    for library in doctor.LIBRARIES:
        asked = installation.requirements(library.extra) if library.extra else list(BASE)
        assert any(line.startswith(library.distribution) for line in asked), library


def test_the_table_and_the_json_tell_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = diagnose({**BASE, **CLOUD}, {"torch": "OSError: libtorch.so"})
    out = StringIO()
    doctor.show(diagnosis, Console(file=out, width=120))
    told = json.loads(json.dumps(doctor.as_dict(diagnosis)))
    assert told["base_works"] is True
    for entry in told["findings"]:
        assert entry["name"] in out.getvalue()
    assert "cannot be imported: OSError: libtorch.so" in out.getvalue()
    assert next(entry for entry in told["verdicts"] if entry["feature"] == TRAINING)["works"] is False


def test_the_command_looks_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the base and torch: importing every library there is takes a slow machine a minute.
    few = tuple(library for library in doctor.LIBRARIES if library.distribution in (*BASE, "torch"))
    monkeypatch.setattr(doctor, "LIBRARIES", few)
    monkeypatch.setattr(doctor, "FEATURES", doctor.FEATURES[:1])
    result = CliRunner().invoke(doctor.doctor, ["--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {entry["name"]: entry["health"] for entry in told["findings"]}["torch"] == "ok"


def test_looking_imports_no_heavy_library() -> None:
    code = "import sys, fedtower.recsys.doctor; sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
