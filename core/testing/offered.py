"""Promises of what is installed: a test class made from an offer, for ``fedtower plugins check`` and conformance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtower.core.errors import MissingDependency, PluginError
from fedtower.core.offers import Offer
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part
from fedtower.core.testing.observer import ObserverPromises
from fedtower.core.testing.promises import Promises


def promised(kind: str, name: str) -> type[Promises]:
    """The test class that proves an installed part."""
    registry = discover(folder=Path.cwd())
    return promises_of(registry, registry.get(kind, name))


def promised_hooks(plugin: str, distribution: str) -> type[Promises]:
    """The test class that proves the hooks of an installed plugin."""
    registry = discover(folder=Path.cwd())
    found = next(each for each in registry.plugins() if (each.name, each.distribution) == (plugin, distribution))
    module = registry.module(found)
    return _subclass(ObserverPromises, f"hooks of {plugin}", lambda: module)


def promises_of(registry: Registry, offer: Offer) -> type[Promises]:
    """The promise class of the offer's kind, with a ``make`` that makes this part."""
    module, _, name = registry.kind(offer.kind).promises.partition(":")
    base = getattr(import_module(module), name)
    return _subclass(base, f"{offer.kind} {offer.name}", maker(registry, offer))


def maker(registry: Registry, offer: Offer) -> Callable[[], Any]:
    """Makes the part again and again: with the settings of its capability ``example``, or with its defaults."""
    if offer.kind == "command":
        return lambda: registry.load("command", offer.name)
    module, _, reader = registry.kind(offer.kind).reader.partition(":")
    if reader:
        return lambda: getattr(import_module(module), reader)(offer.name, registry=registry)
    # Made when it is first wanted: an example may be as large as a database server.
    example = cache(lambda: example_settings(offer))

    def make() -> Any:
        settings, folder = example()
        assert folder is None or Path(folder.name).is_dir()  # the folder lives as long as this function does
        return registry.make(offer.kind, Part(offer.name, settings))

    return make


def example_settings(offer: Offer) -> tuple[Mapping[str, Any], TemporaryDirectory[str] | None]:
    """The settings to try a part with, and the folder that they may refer to.

    The capability ``example`` is the settings, or ``"package.module:function"``: a function that is given an empty
    folder, writes there what the part needs, and returns the settings.
    """
    example = offer.capabilities.get("example", {})
    if isinstance(example, Mapping):
        return example, None
    folder = TemporaryDirectory(prefix="fedtower-example-")
    try:
        return _call_example(offer, str(example), Path(folder.name)), folder
    except BaseException:
        folder.cleanup()
        raise


def _call_example(offer: Offer, example: str, folder: Path) -> Mapping[str, Any]:
    module, _, function = example.partition(":")
    try:
        settings: Mapping[str, Any] = getattr(import_module(module), function)(folder)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"the example of {offer.kind} {offer.name!r} needs {error.name}") from error
    except (AttributeError, ValueError) as error:
        raise PluginError(
            f"the example of {offer.kind} {offer.name!r}, {example!r}, cannot be made: {error}"
        ) from error
    return settings


def _subclass(base: type[Promises], name: str, make: Callable[[], Any]) -> type[Promises]:
    title = "".join(word.capitalize() for word in name.replace("-", " ").replace("_", " ").split())
    return type(f"Test{title}", (base,), {"make": staticmethod(make), "__doc__": f"The promises of {name}."})
