"""``fedtower data``: what a data set holds, how to get one that is published elsewhere, and one file a client of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from fedtower.core.cli import pass_registry
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, nearest
from fedtower.core.overrides import apply_overrides
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import Registry
from fedtower.core.settings import Part, build, build_part
from fedtower.recsys.archive import Archive, cache_folder, fetch
from fedtower.recsys.examples import ExampleCard, ExampleDataset, ExampleSet
from fedtower.recsys.population import DataCard, Dataset
from fedtower.recsys.shards import write_shards
from fedtower.recsys.splits import make_split
from fedtower.recsys.units import in_bytes, in_count, in_percent

_OVERRIDE = click.option(
    "-o",
    "--option",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as data.path=ratings.csv.",
)


@dataclass(frozen=True)
class _DataOnly:
    """What of a recipe a data set needs."""

    data: Mapping[str, Any]
    seed: int = 0


@click.group()
def data() -> None:
    """Show what a data set holds, download one from its official site, or write one file a client.

    \b
    Examples:
      fedtower data card dssm-ml-100k
      fedtower data fetch movielens --version 100k
      fedtower data shard dssm-ml-100k shards -n 20
    """


@data.command(short_help="load a data set and print its card")
@click.argument("name", metavar="RECIPE-OR-DATASET")
@_OVERRIDE
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@pass_registry
def card(registry: Registry, name: str, overrides: Sequence[str], as_json: bool) -> None:
    """Load a data set, of a recipe or by its own name, and print its card.

    \b
    Example:
      fedtower data card synthetic -o data.users=500
    """
    part, seed = _part(registry, name, overrides)
    dataset: Dataset | ExampleDataset = registry.make("dataset", part, path="data")
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = dataset.load(draws=Draws(seed), progress=lambda text: notes.print(text, style="dim")).card
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        Console(highlight=False).print(card_table(found))


@data.command(name="fetch", short_help="download a data set, after showing its licence")
@click.argument("name", metavar="DATASET")
@click.option("--version", metavar="NAME", help="Which edition, where there are several.")
@_OVERRIDE
@click.option("--accept-licence", is_flag=True, help="You have read the licence that is shown, and accept it.")
@click.option("--site", metavar="URL", help="A mirror to use instead of the official site.")
@pass_registry
def fetch_command(
    registry: Registry,
    name: str,
    version: str | None,
    overrides: Sequence[str],
    accept_licence: bool,
    site: str | None,
) -> None:
    """Download a data set into this user's cache, after showing its licence.

    \b
    Example:
      fedtower data fetch movielens --version 100k
    """
    part, _ = _part(registry, name, [*overrides, *([f"data.version={version}"] if version else [])])
    archive = getattr(registry.make("dataset", part, path="data"), "archive", None)
    if not isinstance(archive, Archive):
        raise RecipeError(
            f"the data set {part.name!r} is not one that can be downloaded: it is generated, or from files of yours; "
            f"`fedtower plugins show {part.name}` has the settings that say where it is from"
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{archive.folder}: {archive.licence}\nIn full: {archive.licence_url}")
    if not accept_licence:
        raise RecipeError("nothing was downloaded: read the licence, and if you accept it, add --accept-licence")
    console.print(f"downloading {archive.file} from {site or archive.site}")
    folder = _fetch(archive, site, console)
    console.print(f"{archive.folder} is in {folder}\nNext: fedtower data card {name}" + _again(part))


@data.command(short_help="write one file a client, for devices")
@click.argument("name", metavar="RECIPE")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-n", "count", type=click.IntRange(min=1), help="So many clients, chosen by the seed; default: all.")
@_OVERRIDE
@pass_registry
def shard(registry: Registry, name: str, folder: Path, count: int | None, overrides: Sequence[str]) -> None:
    """Write one file a client, for the devices of a deployed federation to hold.

    \b
    Example:
      fedtower data shard dssm-ml-100k shards -n 20
    """
    recipe = load_recipe(name, overrides, registry)
    draws = Draws(recipe.seed)
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    dataset: Dataset | ExampleDataset = registry.make("dataset", recipe.data.part, path="data")
    found = dataset.load(draws=draws, progress=lambda text: notes.print(text, style="dim"))
    if count is not None and count > found.num_clients:
        raise RecipeError(f"-n {count} is more than the {found.num_clients} clients that this data has")
    clients = np.sort(draws.permutation(found.num_clients, "shards")[:count])
    split = None
    if not isinstance(found, ExampleSet):
        settings = recipe.data
        split = make_split(
            settings.split, found, validation=settings.validation, test_fraction=settings.test_fraction, draws=draws
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=notes, disable=not notes.is_terminal) as progress:
        task = progress.add_task("shards", total=len(clients))
        write_shards(folder, found, split, clients, lambda done: progress.update(task, completed=done))
    size = sum(path.stat().st_size for path in folder.iterdir())
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(clients):,} clients in {folder}, {in_bytes(size)}: client-000000.safetensors and so on")
    console.print(f"Next: fedtower run {name} -o data.name=shards -o data.path={folder}")


def card_table(found: DataCard | ExampleCard) -> Table:
    """A data card for a terminal."""
    table = Table(title=Text(found.name), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shown = found.to_dict()
    rows = {noun: in_count(value) for noun, value in shown.items() if isinstance(value, int)}
    if isinstance(found, DataCard):
        span = [str(shown[edge])[:10] for edge in ("first_time", "last_time") if shown[edge] is not None]
        rows |= {"density": in_percent(found.density), "time span": " to ".join(span) or "unknown"}
    rows |= found.extra
    for noun, text in rows.items():
        table.add_row(noun, Text(text))
    return table


def _part(registry: Registry, name: str, overrides: Sequence[str]) -> tuple[Part, int]:
    """The data set that is meant, and the seed of its run: a data set's own name comes before a recipe's."""
    datasets, recipes = ([offer.name for offer in registry.offers(kind)] for kind in ("dataset", "recipe"))
    if name in datasets:
        run: _DataOnly = build(_DataOnly, apply_overrides({"data": {"name": name}}, overrides, {}), path="")
        return build_part(run.data, path="data"), run.seed
    if name not in recipes and not Path(name).suffix:
        raise RecipeError(
            f"no data set or recipe is called {name!r}{nearest(name, [*datasets, *recipes])}; the data sets are "
            f"{', '.join(datasets)}, and `fedtower recipes` lists the recipes"
        )
    recipe = load_recipe(name, overrides, registry)
    return recipe.data.part, recipe.seed


def _fetch(archive: Archive, site: str | None, console: Console) -> Path:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(archive.file, total=None)
        return fetch(
            archive,
            cache_folder(),
            lambda done, total: progress.update(task, completed=done, total=total),
            site=site,
        )


def _again(part: Part) -> str:
    return "".join(f" -o data.{key}={value}" for key, value in part.settings.items())
