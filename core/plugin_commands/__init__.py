"""``fedtower plugins``: list what is installed, show one part, check it, and begin a new one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fedtower.core.cli import pass_registry
from fedtower.core.errors import FedtowerError, PluginError, nearest
from fedtower.core.offers import Offer, canonical
from fedtower.core.registry import PluginStatus, Registry
from fedtower.core.settings import describe


@click.group()
def plugins() -> None:
    """List, show, check and begin plugins.

    \b
    Examples:
      fedtower plugins list
      fedtower plugins show fedavg
      fedtower plugins new aggregator my_median
    """


@plugins.command("list", short_help="list what is installed, and what failed")
@click.option("--kind", metavar="KIND", help="Only parts of this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known as JSON.")
@pass_registry
def list_command(registry: Registry, kind: str | None, as_json: bool) -> None:
    """List every part that is installed, and every plugin that failed, with the reason.

    \b
    Examples:
      fedtower plugins list
      fedtower plugins list --kind aggregator
      fedtower plugins list --json
    """
    if kind is not None:
        registry.kind(kind)
    if as_json:
        click.echo(json.dumps(as_values(registry, kind), indent=2))
    else:
        from fedtower.core.plugin_commands.tables import print_plugins

        print_plugins(registry, kind)


@plugins.command(short_help="show a part and its settings")
@click.argument("name")
@click.option("--kind", metavar="KIND", help="Which, when parts of several kinds have this name.")
@pass_registry
def show(registry: Registry, name: str, kind: str | None) -> None:
    """Show a part: its settings with types and defaults, its capabilities, its source, and how a recipe names it.

    NAME is a part's name, or a plugin's.

    \b
    Examples:
      fedtower plugins show fedavg
      fedtower plugins show uniform --kind sampler
    """
    from fedtower.core.plugin_commands.tables import print_hooks, print_part

    offers, hooked = find(registry, name, kind)
    for offer in offers:
        print_part(registry, offer)
    for plugin in hooked:
        print_hooks(registry, plugin)


@plugins.command(short_help="run the promises of a part")
@click.argument("name")
@click.option("--kind", metavar="KIND", help="Which, when parts of several kinds have this name.")
@pass_registry
@click.pass_context
def check(ctx: click.Context, registry: Registry, name: str, kind: str | None) -> None:
    """Run the promises of a part, and say which it keeps. Exits with 4 when one is broken.

    NAME is a part's name, or a plugin's. A part whose settings have no defaults is tried with those of its
    capability "example".

    \b
    Examples:
      fedtower plugins check my_median
      fedtower plugins check my-package
    """
    from fedtower.core.testing.verdict import hooks_claim, judge, part_claim

    offers, hooked = find(registry, name, kind)
    for offer in offers:
        refuse_untried(registry, offer)
    claims = [part_claim(offer.kind, offer.name) for offer in offers]
    claims += [hooks_claim(plugin.name, plugin.distribution) for plugin in hooked]
    blocked = [plugin.name for plugin in registry.plugins() if plugin.status == "blocked"]
    broken = 0
    for claim in claims:
        verdicts = judge(claim, blocked)
        for verdict in verdicts:
            click.echo(f"{'kept  ' if verdict.kept else 'BROKEN'}  {verdict.promise}")
            if not verdict.kept:
                click.echo("".join(f"          {line}\n" for line in verdict.message.splitlines()[:12]), nl=False)
        lost = sum(not verdict.kept for verdict in verdicts)
        click.echo(f"{claim.title}: {len(verdicts) - lost} of {len(verdicts)} promises kept")
        broken += lost
    ctx.exit(PluginError.exit_code if broken else 0)


@plugins.command(short_help="write a package with one part")
@click.argument("kind")
@click.argument("name")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="The folder to put the package's folder in; this one by default.",
)
@pass_registry
def new(registry: Registry, kind: str, name: str, folder: Path) -> None:
    """Write a complete package with one part of a KIND, which can be installed, checked and run as it is.

    KIND is one of the kinds of `fedtower plugins list`, or "observer" for hooks alone. NAME is the part's name.

    \b
    Examples:
      fedtower plugins new aggregator my_median
      fedtower plugins new observer watcher --dir ~/plugins
    """
    from fedtower.core.plugin_commands.scaffold import begin

    package = begin(registry, kind, name, folder)
    click.echo(f"wrote {package.root}:")
    for file in package.files:
        click.echo(f"  {file}")
    click.echo("\nNext:")
    for line in package.next_steps:
        click.echo(f"  {line}")


def find(registry: Registry, name: str, kind: str | None) -> tuple[list[Offer], list[PluginStatus]]:
    """The parts of that name, or what the plugin or distribution of that name brings: parts, and plugins with hooks.

    Raises:
        PluginError: nothing is called that, or the plugin failed or is blocked.
    """
    offers = [offer for offer in registry.offers(kind) if offer.name == name]
    if offers:
        return offers, []
    found = [p for p in registry.plugins() if canonical(name) in (canonical(p.name), canonical(p.distribution))]
    for plugin in found:
        if plugin.status != "active":
            raise PluginError(f"the plugin {plugin.name} of {plugin.distribution} is {plugin.status}: {plugin.reason}")
    offers = [offer for plugin in found for offer in plugin.offers if kind in (None, offer.kind)]
    hooked = [plugin for plugin in found if plugin.hooks and kind is None]
    if not (offers or hooked):
        names = {offer.name for offer in registry.offers(kind)} | {plugin.name for plugin in registry.plugins()}
        what = "part or plugin" if kind is None else kind
        raise PluginError(
            f"no {what} is called {name!r}{nearest(name, names)}; `fedtower plugins list` shows what is installed"
        )
    return offers, hooked


def refuse_untried(registry: Registry, offer: Offer) -> None:
    """Raise PluginError for a part that nobody can try, because it needs settings and gives no example of them."""
    if "example" in offer.capabilities or offer.kind == "command" or registry.kind(offer.kind).reader:
        return
    try:
        loaded = registry.load(offer.kind, offer.name)
    except FedtowerError:
        return  # its promises say what is wrong
    missing = [setting.name for setting in describe(loaded) if setting.required] if isinstance(loaded, type) else []
    if missing:
        raise PluginError(
            f"the {offer.kind} {offer.name!r} cannot be tried: {', '.join(missing)} of its settings have no default. "
            f"Where it is offered, say with what to try it: "
            f"capabilities={{'example': {{{', '.join(f'{name!r}: ...' for name in missing)}}}}}"
        )


def as_values(registry: Registry, kind: str | None = None) -> dict[str, object]:
    """What ``plugins list --json`` prints: ``parts`` and ``plugins``."""
    return {
        "parts": [
            {
                "kind": offer.kind,
                "name": offer.name,
                "distribution": offer.distribution,
                "version": offer.version,
                "status": "active",
                "summary": offer.summary,
                "target": offer.target,
                "capabilities": dict(offer.capabilities),
                "plugin": offer.plugin,
            }
            for offer in registry.offers(kind)
        ],
        "plugins": [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": plugin.status,
                "reason": plugin.reason,
                "module": plugin.source.module,
                "offers": [f"{offer.kind} {offer.name}" for offer in plugin.offers],
                "hooks": list(plugin.hooks),
            }
            for plugin in registry.plugins()
        ],
    }
