"""The registry: the plugins that count, what they offer, and the parts made of it, imported on first use.

A plugin is a light module with marked functions (see ``hooks.py``). One that cannot be used is kept with the status
``failed`` and the reason, and all others work. Where two plugins offer one name, the one that comes first keeps it
(fedtower's own before others, then by distribution and name), and the second is failed whole, naming both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from fedtower.core.discovery import LOCAL_FILE, Gate, Source, environment_gate, installed, local
from fedtower.core.errors import PluginError, RecipeError, nearest
from fedtower.core.hooks import SPEC_VERSION, add_plugin, hooks_of, new_manager
from fedtower.core.offers import Kind, Offer, canonical, load_target, reason, seam_methods
from fedtower.core.settings import Part, build

__all__ = ["Gate", "Kind", "Offer", "PluginStatus", "Registry", "discover"]


@dataclass(frozen=True)
class PluginStatus:
    """What became of one plugin."""

    source: Source
    status: Literal["active", "failed", "blocked"]
    reason: str = ""
    offers: tuple[Offer, ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self.source.name

    @property
    def distribution(self) -> str:
        """What it was installed with."""
        return self.source.distribution

    @property
    def version(self) -> str:
        """The distribution's version."""
        return self.source.version


class OfferOf(Protocol):
    """What ``registry.aggregator`` and the like are: :meth:`Registry.offer` for one kind."""

    def __call__(
        self, name: str, target: str, *, summary: str = "", capabilities: Mapping[str, Any] | None = None
    ) -> None:
        """Offer a part of this kind."""
        ...


class Registry:
    """Kinds, offers and plugins; :func:`discover` gives one with everything that is installed.

    ``registry.aggregator(name, target)`` is ``registry.offer("aggregator", name, target)``, for every declared kind.
    An offer made outside of a plugin's hook is of this process, and counts like any other.
    """

    def __init__(self, sources: Iterable[Source] = (), gates: Iterable[Gate] = ()) -> None:
        self._sources = tuple(sources)
        self._gates = tuple(gates)
        self._local: Path | None = None
        self._own_kinds: list[Kind] = []
        self._own_offers: list[Offer] = []
        self._open()

    # What a plugin calls

    def declare(self, kind: Kind) -> None:
        """Add a kind of part."""
        if kind.name in self._kinds or hasattr(type(self), kind.name) or not kind.name.isidentifier():
            raise PluginError(f"the kind {kind.name!r} is there already, or its name cannot be used")
        self._kinds[kind.name] = kind
        if self._registering is None:
            self._own_kinds.append(kind)

    def offer(
        self, kind: str, name: str, target: str, *, summary: str = "", capabilities: Mapping[str, Any] | None = None
    ) -> None:
        """Offer a part: ``target`` is ``"package.module:Class"``, imported when it is first used.

        Raises:
            PluginError: the kind does not exist, the target is not of that form, or somebody offers that name already.
        """
        self.kind(kind)
        if not all(target.partition(":")):
            raise PluginError(f'the target of {kind} {name!r} must be "package.module:Name", but is {target!r}')
        offer = Offer(kind, name, target, summary, dict(capabilities or {}))
        if self._registering is None:
            self._admit([offer])
            self._own_offers.append(offer)
        else:
            by = self._registering
            self._staged.append(replace(offer, plugin=by.name, distribution=by.distribution, version=by.version))

    def __getattr__(self, kind: str) -> OfferOf:
        kinds = self.__dict__.get("_kinds", {})
        if kind not in kinds:
            raise AttributeError(f"the registry has no kind or method {kind!r}{nearest(kind, kinds)}")

        def offer_of_kind(
            name: str, target: str, *, summary: str = "", capabilities: Mapping[str, Any] | None = None
        ) -> None:
            self.offer(kind, name, target, summary=summary, capabilities=capabilities)

        return offer_of_kind

    # What a run calls

    def kind(self, name: str) -> Kind:
        """The kind of that name."""
        if name not in self._kinds:
            raise PluginError(
                f"there is no kind of part {name!r}{nearest(name, self._kinds)}; there are {', '.join(self._kinds)}"
            )
        return self._kinds[name]

    def kinds(self) -> list[Kind]:
        """All kinds, in the order in which they were declared."""
        return list(self._kinds.values())

    def offers(self, kind: str | None = None) -> list[Offer]:
        """What is offered, of one kind or of all, sorted by name within a kind."""
        order = list(self._kinds)
        chosen = [offer for offer in self._offers.values() if kind is None or offer.kind == self.kind(kind).name]
        return sorted(chosen, key=lambda offer: (order.index(offer.kind), offer.name))

    def plugins(self) -> list[PluginStatus]:
        """Every plugin that was found, also those that failed or are blocked."""
        return [self._plugins[source.label] for source in self._found]

    def module(self, plugin: PluginStatus) -> Any:
        """The module of an active plugin, with its hooks."""
        return self.manager.get_plugin(plugin.source.label)

    def get(self, kind: str, name: str) -> Offer:
        """The offer of that name.

        Raises:
            RecipeError: nobody offers it; the message names the nearest, and the plugin that would have.
        """
        self.kind(kind)
        if (kind, name) not in self._offers:
            names = [offer.name for offer in self.offers(kind)]
            lost = "".join(
                f"; the plugin {plugin.name} of {plugin.distribution} is {plugin.status}: {plugin.reason}"
                for plugin in self.plugins()
                if plugin.status != "active" and canonical(name) in canonical(f"{plugin.name} {plugin.distribution}")
            )
            raise RecipeError(
                f"no plugin offers the {kind} {name!r}{nearest(name, names)}; there are {', '.join(names) or 'none'}"
                f"{lost}. `fedtower plugins list` shows what is installed"
            )
        return self._offers[kind, name]

    def load(self, kind: str, name: str) -> Any:
        """What the offer's target names, imported now.

        Raises:
            MissingDependency: a library that it imports is not installed.
            PluginError: the import fails, or the class does not have the methods of the kind's seam.
        """
        offer = self.get(kind, name)
        loaded = load_target(offer)
        seam = self.kind(kind).seam
        missing = [method for method in seam_methods(seam) if not hasattr(loaded, method)]
        if missing and isinstance(loaded, type):
            raise PluginError(
                f"{offer.target}, the {kind} {name!r} of {offer.origin}, lacks {', '.join(missing)}; a {kind} needs "
                f"what {seam} has"
            )
        return loaded

    def make(self, kind: str, part: Part, *, path: str | None = None) -> Any:
        """An instance of the part with its settings; ``path`` is where the recipe names it, for messages."""
        return build(self.load(kind, part.name), part.settings, path=path or kind)

    # Which plugins count

    @property
    def folder(self) -> Path | None:
        """The folder whose ``fedtower_plugins.py`` counts, if there is one."""
        return self._local

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates that every plugin must pass."""
        return self._gates

    def use_folder(self, folder: Path) -> None:
        """Let the ``fedtower_plugins.py`` of this folder count, if it has one, instead of another folder's."""
        if (folder / LOCAL_FILE).is_file() and folder.resolve() != self._local:
            self._local = folder.resolve()
            self._open()

    def restrict(self, gate: Gate) -> None:
        """Let this gate decide too.

        Raises:
            PluginError: it names a plugin that is not installed.
        """
        known = {name for source in self._found for name in (source.name, source.distribution)}
        for name in (*gate.allow, *gate.block):
            if canonical(name) not in map(canonical, known):
                raise PluginError(
                    f"{gate.origin} names the plugin {name!r}, which is not installed{nearest(name, known)}"
                )
        if (gate.allow or gate.block) and gate not in self._gates:
            self._gates = (*self._gates, gate)
            self._open()

    def _open(self) -> None:
        """Look into every source, from nothing: letting one more in, or keeping one out, changes who comes first."""
        self.manager = new_manager()
        self._found = (*self._sources, *([local(self._local)] if self._local else []))
        self._plugins: dict[str, PluginStatus] = {}
        self._kinds: dict[str, Kind] = {kind.name: kind for kind in self._own_kinds}
        self._offers: dict[tuple[str, str], Offer] = {}
        self._staged: list[Offer] = []
        self._registering: Source | None = None
        entered = [(source, plugin) for source in self._found if (plugin := self._enter(source)) is not None]
        # All kinds first: a plugin may offer a part of a kind that a later one declares.
        entered = [(source, plugin) for source, plugin in entered if self._call(source, plugin, "fedtower_kinds")]
        for source, plugin in entered:
            if self._call(source, plugin, "fedtower_register"):
                hooks = tuple(name for name in hooks_of(self.manager, plugin) if not name.startswith("fedtower_"))
                self._plugins[source.label] = PluginStatus(source, "active", "", tuple(self._staged), hooks)
            self._staged = []
        self._admit(self._own_offers)
        self.manager.check_pending()

    def _enter(self, source: Source) -> object | None:
        """The source's module, registered with pluggy; ``None`` when it is kept out or broken."""
        objection = next(filter(None, (gate.objection(source) for gate in self._gates)), "")
        if objection:
            self._plugins[source.label] = PluginStatus(source, "blocked", objection)
            return None
        try:
            plugin = source.load()
            _check_spec(plugin)
            add_plugin(self.manager, plugin, source.label)
        except (Exception, SystemExit) as error:  # whatever a stranger's module does at import, it does to itself
            self._plugins[source.label] = PluginStatus(source, "failed", reason(error))
            return None
        return plugin

    def _call(self, source: Source, plugin: object, hook: str) -> bool:
        """Call one offering hook of one plugin; when that fails, nothing of the plugin stays."""
        kinds = dict(self._kinds)
        self._registering = source
        try:
            function = hooks_of(self.manager, plugin).get(hook)
            if function is not None:
                getattr(plugin, function)(self)
            self._admit(self._staged)
        except (Exception, SystemExit) as error:
            self.manager.unregister(plugin)
            self._kinds = kinds
            self._plugins[source.label] = PluginStatus(source, "failed", reason(error))
            return False
        finally:
            self._registering = None
        return True

    def _admit(self, offers: Iterable[Offer]) -> None:
        """Add all of these offers, or none."""
        added: dict[tuple[str, str], Offer] = {}
        for offer in offers:
            key = (offer.kind, offer.name)
            first = self._offers.get(key) or added.get(key)
            if first is not None:
                raise PluginError(
                    f"two plugins offer the {offer.kind} {offer.name!r}: {first.origin} ({first.target}) and "
                    f"{offer.origin} ({offer.target}); the first keeps the name; rename the second, or block the first"
                )
            added[key] = offer
        self._offers |= added


def discover(gates: Iterable[Gate] = (), folder: Path | None = None) -> Registry:
    """A registry of all installed plugins, and of ``folder``'s ``fedtower_plugins.py``.

    The environment variables ``FEDTOWER_PLUGINS_ALLOW`` and ``FEDTOWER_PLUGINS_BLOCK`` count beside ``gates``. They are
    often set for many environments at once, so a name in them that is not installed is no error.
    """
    registry = Registry(installed(), [environment_gate()])
    if folder is not None:
        registry.use_folder(folder)
    for gate in gates:
        registry.restrict(gate)
    return registry


def _check_spec(plugin: object) -> None:
    wanted = getattr(plugin, "fedtower_spec", SPEC_VERSION)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise PluginError(f"fedtower_spec must be a whole number from 1 on, but is {wanted!r}")
    if wanted > SPEC_VERSION:
        raise PluginError(
            f"it was written for plugin spec {wanted}, and this fedtower has spec {SPEC_VERSION}; upgrade fedtower, "
            "or install an older version of the plugin"
        )
