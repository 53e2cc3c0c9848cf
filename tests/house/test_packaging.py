"""What is built is what is in the folders, and it works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fedtower

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "plugins", "protos", "recsys")
NOT_SHIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of this tree, and the wheel that was built from that sdist."""
    # A copy, because a build leaves folders behind, and what an earlier one left would get into the next wheel.
    copy = tmp_path_factory.mktemp("source") / "fedtower"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SHIPPED)
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy), cwd=out)
    return out


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and the base requirements, and nothing else."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel), cwd=home)
    libraries = home / "libraries"
    libraries.mkdir()
    for distribution in base_requirements():
        link_into(libraries, distribution)
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "base.pth").write_text(f"{libraries}\n")
    return python.parent


def run(*command: str, cwd: Path, expect: int = 0) -> str:
    """What a command printed, in an environment that does not know the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    child = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    assert child.returncode == expect, child.stdout + child.stderr
    return child.stdout + child.stderr


def base_requirements() -> set[str]:
    """The distributions that the base install brings, with what they need themselves."""
    found: set[str] = set()
    wanted = ["fedtower"]
    while wanted:
        for line in metadata.requires(wanted.pop()) or []:
            requirement = Requirement(line)
            if requirement.name not in found and (
                requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ):
                found.add(requirement.name)
                wanted.append(requirement.name)
    return found


def link_into(folder: Path, distribution: str) -> None:
    """Show one installed distribution, and no other, in a folder."""
    for file in metadata.files(distribution) or []:
        top = file.parts[0]
        if top != ".." and not (folder / top).exists():
            (folder / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)


def folders() -> set[str]:
    """Every file that should be shipped, under its name in the package."""
    own = {f"fedtower/{path.name}" for path in (ROOT / "fedtower").iterdir() if path.is_file()}
    rooms = {
        f"fedtower/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return own | rooms


def test_the_wheel_holds_the_folders_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "fedtower/core/round.py" in names
    assert names == folders()


def test_the_sdist_holds_the_folders_as_real_files(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
    assert {name for name in members if name.startswith("fedtower/")} == folders()
    assert all(member.isreg() for member in members.values())
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= set(members)


def test_a_forgotten_subpackage_would_be_noticed() -> None:
    assert {f"fedtower/{room}/__init__.py" for room in ROOMS} <= folders()
    assert "fedtower/plugins/samplers/uniform.py" in folders()


def test_the_wheel_answers_without_the_checkout(elsewhere: Path, tmp_path: Path) -> None:
    command = str(elsewhere / "fedtower")
    python = str(elsewhere / "python")
    assert fedtower.__version__ in run(command, "--version", cwd=tmp_path)
    assert "plugins" in run(python, "-m", "fedtower", "--help", cwd=tmp_path)
    assert str(ROOT) not in run(python, "-c", "import fedtower.core; print(fedtower.core.__file__)", cwd=tmp_path)
    assert "dssm-synthetic" in run(command, "recipes", cwd=tmp_path)
    run(command, "plugins", "list", cwd=tmp_path)


def test_every_plugin_of_the_wheel_is_active_without_torch(elsewhere: Path, tmp_path: Path) -> None:
    run(str(elsewhere / "python"), "-c", "import torch", cwd=tmp_path, expect=1)
    program = (
        "import json; from fedtower.core.registry import discover;"
        "print(json.dumps({p.name: [p.status, p.reason] for p in discover().plugins()}))"
    )
    found = json.loads(run(str(elsewhere / "python"), "-c", program, cwd=tmp_path))
    listed = {entry.name for entry in metadata.distribution("fedtower").entry_points.select(group="fedtower.plugins")}
    assert found == {name: ["active", ""] for name in listed}


def test_what_needs_torch_says_so_where_there_is_none(elsewhere: Path, tmp_path: Path) -> None:
    said = run(str(elsewhere / "fedtower"), "run", "dssm-synthetic", cwd=tmp_path, expect=7)
    assert "torch" in said
    assert "fedtower[cloud]" in said
    assert "requirements/cpu.txt" in said
    assert "fedtower doctor" in said
    assert "Traceback" not in said


def test_the_doctor_works_without_torch(elsewhere: Path, tmp_path: Path) -> None:
    diagnosis = json.loads(run(str(elsewhere / "fedtower"), "doctor", "--json", cwd=tmp_path))
    assert diagnosis["base_works"]
    verdict = {verdict["feature"]: verdict for verdict in diagnosis["verdicts"]}
    training = verdict["training, evaluation and recommendation"]
    assert not training["works"]
    assert "torch==2.13.0" in training["remedy"]
    assert "fbgemm-gpu-cpu==1.8.0" in training["remedy"]
