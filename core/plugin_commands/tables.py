"""What ``fedtower plugins list`` and ``show`` print: tables that read well in eighty columns."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtower.core.errors import FedtowerError
from fedtower.core.hooks import FAMILIES, hook_names, hooks_of
from fedtower.core.offers import Offer, read_target
from fedtower.core.recipe import SECTION_OF, SECTIONS
from fedtower.core.registry import PluginStatus, Registry
from fedtower.core.settings import describe, toml_value

COLOURS = {"active": "green", "failed": "red", "blocked": "yellow"}


def print_plugins(registry: Registry, kind: str | None = None, console: Console | None = None) -> None:
    """The parts by kind, the plugins with hooks, and then what failed or is blocked, with reasons."""
    console = console or Console()
    table = Table("kind and name", "from", "status", "summary", box=None, pad_edge=False, header_style="bold")
    last = ""
    for offer in registry.offers(kind):
        if offer.kind != last:
            last = offer.kind
            table.add_row(Text(last, style="bold"))
        table.add_row(f"  {offer.name}", offer.package, _status("active"), offer.summary)
    plugins = registry.plugins() if kind is None else []
    hooked = [plugin for plugin in plugins if plugin.hooks]
    lost = [plugin for plugin in plugins if plugin.status != "active"]
    if hooked:
        table.add_row(Text("hooks", style="bold"))
    for plugin in hooked:
        table.add_row(f"  {plugin.name}", _package(plugin), _status("active"), ", ".join(plugin.hooks))
    if lost:
        table.add_row(Text("plugin", style="bold"))
    for plugin in lost:
        table.add_row(f"  {plugin.name}", _package(plugin), _status(plugin.status), "the reason is below")
    console.print(table)
    for plugin in lost:
        console.print(Text(f"\n{plugin.name} of {_package(plugin)} is {plugin.status}: {plugin.reason}"))


def print_part(registry: Registry, offer: Offer, console: Console | None = None) -> None:
    """All that can be known of one part. What needs a library that is missing is left out, and that is said."""
    console = console or Console()
    kind = registry.kind(offer.kind)
    console.print(Text(f"{offer.kind} {offer.name}", style="bold"), Text(f"- {offer.summary}" if offer.summary else ""))
    loaded: Any = None
    trouble = ""
    if not kind.reader:
        try:
            loaded = registry.load(offer.kind, offer.name)
        except FedtowerError as error:
            trouble = str(error)
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("from", f"{offer.package}, plugin {offer.plugin}"),
        ("says", _first_paragraph(loaded)),
        ("target", offer.target),
        ("source", _source_of(loaded)),
        ("seam", kind.seam),
        ("promises", kind.promises),
        *((f"can: {key}", str(value)) for key, value in offer.capabilities.items()),
        ("trouble", trouble),
    ):
        if value:
            facts.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
    console.print(facts)
    if kind.reader:
        console.print(Text(f"\n{read_target(offer)}"), soft_wrap=True)
    elif loaded is not None:
        _print_settings(console, offer, loaded)
    console.print()


def print_hooks(registry: Registry, plugin: PluginStatus, console: Console | None = None) -> None:
    """The hooks of one plugin, by family."""
    console = console or Console()
    module = registry.module(plugin)
    functions = hooks_of(registry.manager, module)
    console.print(Text(f"hooks of {plugin.name}", style="bold"), Text(f"- {_first_paragraph(module)}"))
    facts = Table.grid(padding=(0, 2))
    facts.add_row(Text("from", style="dim"), Text(_package(plugin)))
    facts.add_row(Text("module", style="dim"), Text(plugin.source.module, overflow="fold"))
    for family in FAMILIES:
        for hook in hook_names(family):
            if hook in functions:
                says = _first_paragraph(getattr(module, functions[hook]))
                facts.add_row(Text(family, style="dim"), Text(f"{hook}: {says}" if says else hook))
    console.print(facts)
    console.print()


def _print_settings(console: Console, offer: Offer, loaded: Any) -> None:
    settings = describe(loaded) if isinstance(loaded, type) else []
    if not settings:
        return
    table = Table("setting", "type", "default", "what it is", box=None, pad_edge=False, header_style="bold")
    for setting in settings:
        table.add_row(Text(setting.name), Text(setting.type), Text(setting.default or "(required)"), Text(setting.help))
    console.print()
    console.print(table)
    if offer.kind in SECTION_OF:
        console.print(Text(f"\nIn a recipe:\n\n{_section(offer)}"))


def _section(offer: Offer) -> str:
    """The lines that name this part in a recipe, with its example settings."""
    name = SECTION_OF[offer.kind]
    head = f"[[{name}]]" if SECTIONS[name].several else f"[{name}]"
    example = offer.capabilities.get("example")
    settings = {SECTIONS[name].key: offer.name, **(example if isinstance(example, dict) else {})}
    return "\n".join([head, *(f"{key} = {toml_value(value)}" for key, value in settings.items())])


def _status(status: str) -> Text:
    return Text(status, style=COLOURS[status])


def _package(plugin: PluginStatus) -> str:
    return f"{plugin.distribution} {plugin.version}".strip()


def _first_paragraph(thing: object) -> str:
    """What something says about itself, up to the first empty line."""
    return "" if thing is None else " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _source_of(thing: Any) -> str:
    """File and line where something is defined in Python."""
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return ""
