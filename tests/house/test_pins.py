"""The pinned versions are whole, exact, and what the package asks for."""

import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SHIM = "requirements/fbgemm-gpu-cpu-shim"


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in text if line.strip() and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """The exact versions of a requirements file; of the shim, the version that it takes the name of."""
    found: dict[str, str] = {}
    for line in lines(name):
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
        elif line == f"./{SHIM}":
            shim = tomllib.loads((ROOT / SHIM / "pyproject.toml").read_text())["project"]
            found[shim["name"]] = shim["version"]
        else:
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)", line)
            assert match, f"{name}: {line!r} is not an exact pin"
            found[match[1]] = match[2]
    return found


def asked(*extras: str) -> list[Requirement]:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    sections = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in extras)]
    return [
        Requirement(line) for section in sections for line in section.splitlines() if line and not line.startswith("#")
    ]


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("cpu.txt", ["cloud", "device", "server", "trackers"]),
        ("test.txt", ["cloud", "device", "server", "ray", "trackers", "test"]),
    ],
)
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(file: str, extras: list[str]) -> None:
    pinned = pins(file)
    for requirement in asked(*extras):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_stand_in_comes_first_and_brings_the_cpu_build() -> None:
    assert lines("cpu.txt")[0] == f"./{SHIM}"
    shim = tomllib.loads((ROOT / SHIM / "pyproject.toml").read_text())["project"]
    assert (shim["name"], shim["version"]) == ("fbgemm-gpu", "1.8.0+cpu.shim")
    assert shim["dependencies"] == ["fbgemm-gpu-cpu==1.8.0"]


def test_no_pin_brings_cuda() -> None:
    assert not [name for name in pins("test.txt") if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_base_is_light() -> None:
    assert {requirement.name for requirement in asked()} == {"numpy", "pluggy", "click", "rich", "tomli-w"}


def test_all_is_every_other_extra() -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = dict(parser["options.extras_require"])
    (everything,) = (Requirement(line) for line in extras.pop("all").split())
    assert everything.extras == set(extras)
