"""Every built-in part comes in by a listed door, and every listed door leads somewhere."""

import ast
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUP = "fedtower.plugins"


def listed() -> dict[str, str]:
    """The entry points of setup.cfg."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.entry_points"][GROUP].split("\n")
    pairs = (line.partition("=") for line in lines if line.strip())
    return {name.strip(): module.strip() for name, _, module in pairs}


def has_door(path: Path) -> bool:
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return any(function.name in ("fedtower_register", "fedtower_kinds") for function in functions)


def doors(root: Path = ROOT) -> dict[str, Path]:
    """The modules on disk that register something, by import name."""
    found = {}
    for room in ("core", "plugins", "recsys"):
        for path in sorted((root / room).rglob("*.py")):
            if has_door(path):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(("fedtower", *parts)).removesuffix(".__init__")] = path
    return found


def test_every_door_is_listed_and_every_listed_door_is_there() -> None:
    assert set(listed().values()) == set(doors())


def test_a_door_that_nobody_lists_is_found(tmp_path: Path) -> None:
    forgotten = tmp_path / "plugins" / "samplers" / "forgotten" / "__init__.py"
    forgotten.parent.mkdir(parents=True)
    forgotten.write_text("@hookimpl\ndef fedtower_register(registry): ...\n")
    assert set(doors(tmp_path)) == {"fedtower.plugins.samplers.forgotten"}


def test_entry_points_are_named_for_their_kind_and_part() -> None:
    for name, module in listed().items():
        _, room, *rest = module.split(".")
        if room == "plugins":
            folder, part = rest
            kind = {"indexes": "index"}.get(folder, folder.removesuffix("s"))
            assert name == f"{kind}-{part}".replace("_", "-")
        else:
            assert name == room


def test_what_is_installed_is_what_is_listed() -> None:
    entries = metadata.distribution("fedtower").entry_points.select(group=GROUP)
    installed = {entry.name: entry.value for entry in entries}
    if installed != listed():
        pytest.fail("setup.cfg lists other plugins than are installed: .venv/bin/pip install --no-deps -e .")
