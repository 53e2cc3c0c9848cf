"""Finding plugins: installed ones by their entry points, a project's own by its file; and gates that keep some out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from fedtower.core.errors import PluginError
from fedtower.core.offers import HOST, canonical

GROUP = "fedtower.plugins"
LOCAL_FILE = "fedtower_plugins.py"


@dataclass(frozen=True)
class Source:
    """A plugin that has been found and not looked into: an entry point, or a project's own file."""

    name: str
    distribution: str
    version: str
    module: str
    load: Callable[[], object]

    @property
    def label(self) -> str:
        """A name that no other distribution's plugin has."""
        return self.name if self.distribution == HOST else f"{self.name} ({self.distribution})"


@dataclass(frozen=True)
class Gate:
    """One place where plugins are allowed or blocked, by entry-point or distribution name.

    An ``allow`` list admits the plugins of other distributions that it names and no others; fedtower's own parts can
    only be blocked. Every gate must admit a plugin.
    """

    origin: str
    allow: tuple[str, ...] = ()
    block: tuple[str, ...] = ()

    def objection(self, source: Source) -> str:
        """Why this gate keeps a plugin out, or an empty string."""
        mine = {canonical(source.name), canonical(source.distribution)}
        if mine & set(map(canonical, self.block)):
            return f"blocked by {self.origin}"
        if self.allow and source.distribution != HOST and not mine & set(map(canonical, self.allow)):
            return f"not among those allowed by {self.origin}"
        return ""


def installed() -> list[Source]:
    """The entry points of the group: fedtower's own first, then by distribution and name."""
    points, whose = metadata.entry_points(group=GROUP), dict[int, tuple[str, str]]()
    for point in points:  # to be asked for its name, a distribution parses all of its metadata
        if point.dist is not None and id(point.dist) not in whose:
            whose[id(point.dist)] = (point.dist.name, point.dist.version)
    found = [
        Source(point.name, *whose.get(id(point.dist), ("unknown", "")), module=point.module, load=point.load)
        for point in points
    ]
    return sorted(found, key=lambda source: (source.distribution != HOST, source.distribution, source.name))


def local(folder: Path) -> Source:
    """The ``fedtower_plugins.py`` of a folder. Its offers name their targets as ``"fedtower_plugins:Mine"``."""
    file = folder / LOCAL_FILE
    module_name = LOCAL_FILE.removesuffix(".py")

    def load() -> object:
        spec = spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise PluginError(f"{file} cannot be imported")
        module = module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module

    return Source(LOCAL_FILE, str(folder), "", str(file), load)


def environment_gate() -> Gate:
    """The gate that ``FEDTOWER_PLUGINS_ALLOW`` and ``FEDTOWER_PLUGINS_BLOCK`` make, names between commas."""
    return Gate(
        "the environment (FEDTOWER_PLUGINS_ALLOW, FEDTOWER_PLUGINS_BLOCK)",
        allow=split_names([os.environ.get("FEDTOWER_PLUGINS_ALLOW", "")]),
        block=split_names([os.environ.get("FEDTOWER_PLUGINS_BLOCK", "")]),
    )


def split_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Names between commas.

    >>> split_names(["my-median, noise", "tap"])
    ('my-median', 'noise', 'tap')
    """
    return tuple(word.strip() for text in texts for word in text.split(",") if word.strip())
