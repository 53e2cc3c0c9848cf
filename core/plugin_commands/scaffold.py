"""A new plugin: a complete package with one part, written from the template of its kind."""

from __future__ import annotations

import keyword
import os
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from fedtower.core.errors import PluginError, RecipeError, StorageError, nearest
from fedtower.core.registry import Registry

COMMON = "fedtower.core:scaffold/common"
OBSERVER = "fedtower.core:scaffold/observer"

# Where the files of a template go. The src layout keeps the project's folder, which has the package's name, from being
# taken for the package itself when Python runs beside it.
PLACES = {"test.py": "tests/test_{module}.py", "pyproject.toml": "pyproject.toml", "README.md": "README.md"}
ELSEWHERE = "src/{module}/"


@dataclass(frozen=True)
class NewPackage:
    """What was written, and what to type next."""

    root: Path
    files: tuple[str, ...]
    next_steps: tuple[str, ...]


def begin(registry: Registry, kind: str, name: str, folder: Path) -> NewPackage:
    """Write the package ``folder/name`` with a part of this kind, or with hooks when the kind is ``observer``.

    Raises:
        PluginError: the kind is unknown or has no template, or somebody offers the name already.
        RecipeError: the name cannot be used.
        StorageError: the folder is there already.
    """
    template = _template(registry, kind)
    module = _module_name(registry, kind, name)
    root = folder / name
    words = {
        "name": name,
        "module": module,
        "Class": "".join(word.capitalize() for word in module.split("_")),
        "kind": kind.replace("_", " "),
        "A_kind": f"{'An' if kind[0] in 'aeiou' else 'A'} {kind.replace('_', ' ')}",
        # An observer is an object with a memory of its run; every other plugin is its module.
        "entry": f"{module}:plugin" if kind == "observer" else module,
    }
    files = {**_read(COMMON), **_read(template)}
    use = _fill(files.pop("use"), words).strip()
    steps = (f"pip install -e {_shown(root)}", f"fedtower plugins check {name}", use)
    words["steps"] = "\n".join(steps)
    written = []
    try:
        root.mkdir(parents=True, exist_ok=False)
        for file, text in files.items():
            place = PLACES.get(file, ELSEWHERE + file).format(module=module)
            target = root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_fill(text, words), "utf-8")
            written.append(place)
    except FileExistsError as error:
        raise StorageError(f"{root} is there already; remove it, choose another name, or another --dir") from error
    return NewPackage(root, tuple(sorted(written)), steps)


def _template(registry: Registry, kind: str) -> str:
    if kind == "observer":
        return OBSERVER
    kinds = {known.name: known.template for known in registry.kinds()}
    if not kinds.get(kind):
        known = [*(name for name, template in kinds.items() if template), "observer"]
        raise PluginError(
            f"a plugin of kind {kind!r} cannot be begun{nearest(kind, known)}; the kinds are {', '.join(known)}"
        )
    return kinds[kind]


def _module_name(registry: Registry, kind: str, name: str) -> str:
    module = name.replace("-", "_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or keyword.iskeyword(module):
        raise RecipeError(f"a plugin's name must be letters, digits, _ and -, beginning with a letter, but is {name!r}")
    for offer in registry.offers(None if kind == "observer" else kind):
        if offer.name == name and offer.kind == kind:
            raise PluginError(f"{offer.origin} offers the {kind} {name!r} already; choose another name")
    if find_spec(module) is not None:
        raise PluginError(
            f"a module {module!r} can be imported already, and a package of that name would hide it; choose another"
        )
    return module


def _read(template: str) -> dict[str, str]:
    """The files of a template folder, by name without ``.tmpl``."""
    package, _, path = template.partition(":")
    folder: Traversable = resources.files(package).joinpath(path)
    return {
        file.name.removesuffix(".tmpl"): file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".tmpl")
    }


def _fill(text: str, words: dict[str, str]) -> str:
    return Template(text).substitute(words)


def _shown(root: Path) -> str:
    """The folder as it is typed: pip takes ``my_median`` for a folder only after ``-e``, and needs no ``./`` there."""
    return os.path.relpath(root) if not root.is_absolute() else str(root)
