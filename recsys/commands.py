"""The recommender's commands: run, resume, evaluate, recommend, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtower.core.cli import pass_registry
from fedtower.core.garbage import undisturbed
from fedtower.core.recipe import load_recipe, read_recipe
from fedtower.core.registry import Registry
from fedtower.recsys.bundle import Bundle, Precision
from fedtower.recsys.display import Display, fitted, index_in_words
from fedtower.recsys.launch import rank_and_count
from fedtower.recsys.report import write_report
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog, RunRecord, open_run
from fedtower.recsys.serve_command import refuse_going_back, serve_recipe
from fedtower.recsys.units import figure, in_bytes, in_times

runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where run folders are made.",
)
override_option = click.option(
    "-o",
    "--option",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe; may be repeated.",
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="A row for every round.")
json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
folder_argument = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))


@click.command()
@click.argument("recipe", metavar="NAME-OR-FILE")
@override_option
@runs_option
@verbose_option
@pass_registry
def run(registry: Registry, recipe: str, overrides: tuple[str, ...], runs: Path, verbose: bool) -> None:
    """Train a recipe, by name (see `fedtower recipes`) or from a TOML file.

    \b
    Examples:
      fedtower run dssm-synthetic
      fedtower run dssm-ml-100k -o mode=standalone
      fedtower run dssm-ml-100k -o mode=deployed     (fedtower serve has options)
      fedtower run my.toml -o cohort.size=50 -o aggregator.name=my_median
    """
    rank, count = rank_and_count()
    if count == 1:
        if read_recipe(recipe, overrides, registry).mode == "deployed":  # who serves imports nothing that trains
            serve_recipe(registry, recipe, overrides, runs, verbose=verbose)
            return
        load_recipe(recipe, overrides, registry)  # a mistake is told before torch takes its seconds to load
    with undisturbed():
        from fedtower.recsys import run as api

    console = Console(highlight=False, quiet=rank > 0)
    with Display(console, verbose=verbose) as display:
        done = api.run(recipe, overrides, runs=runs, registry=registry, observers=[display], progress=display.say)
    if rank == 0:
        _finish(console, done.folder)


@click.command()
@folder_argument
@click.option(
    "--from", "start", type=int, metavar="ROUND", help="Continue from the checkpoint of this round, not the newest."
)
@verbose_option
@pass_registry
def resume(registry: Registry, folder: Path, start: int | None, verbose: bool) -> None:
    """Continue a run that was stopped; it ends with the same bits as one that never was.

    \b
    Example:
      fedtower resume runs/dssm-synthetic-1
    """
    rank, count = rank_and_count()
    if count == 1:
        open_run(folder)
        place = RunFolder.open(folder)
        if place.recipe().mode == "deployed":
            refuse_going_back(place, start)
            serve_recipe(registry, str(folder), (), folder.parent, verbose=verbose)
            return
    with undisturbed():
        from fedtower.recsys import run as api

    console = Console(highlight=False, quiet=rank > 0)
    with Display(console, verbose=verbose) as display:
        done = api.resume(folder, start=start, registry=registry, observers=[display], progress=display.say)
    if rank == 0:
        _finish(console, done.folder)


@click.command()
@folder_argument
@click.option(
    "--protocol",
    type=click.Choice(["sampled", "full"]),
    help="Of histories: rank among negatives or all items; default: as in the recipe.",
)
@json_option
@pass_registry
def evaluate(registry: Registry, folder: Path, protocol: Literal["sampled", "full"] | None, as_json: bool) -> None:
    """Measure a run's newest model on the test data again.

    \b
    Example:
      fedtower evaluate runs/dssm-synthetic-1 --protocol full
    """
    open_run(folder)
    with undisturbed():
        from fedtower.recsys import run as api

    evaluation = api.load(folder, registry=registry).evaluate(protocol)
    if as_json:
        shown = {"role": evaluation.role, "label": evaluation.protocol_label, "metrics": evaluation.metrics}
        click.echo(json.dumps({**shown, "cases": evaluation.cases, "users": evaluation.users}))
        return
    console = Console(highlight=False)
    console.print(f"{evaluation.role}, {evaluation.protocol_label}, {evaluation.cases:,} cases")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in evaluation.metrics.items():
        table.add_row(name, figure(value))
    console.print(table)


@click.command()
@click.argument("folder", metavar="[RUN]", type=click.Path(path_type=Path), required=False)
@click.option("--user", help="A user's id, as in the data.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Rank the candidates of a --request with this bundle, as a device does.",
)
@click.option("--request", type=click.Path(path_type=Path), help="What a device has at hand: see `fedtower export`.")
@click.option("--runtime", default="mnn", show_default=True, help="Whose engine runs the bundle.")
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Which of the bundle's weights.",
)
@click.option("-k", "count", default=10, show_default=True, type=click.IntRange(min=1), help="How many items.")
@click.option("--exact", is_flag=True, help="Score all items, and leave the run's index aside.")
@json_option
@pass_registry
def recommend(
    registry: Registry,
    folder: Path | None,
    user: str | None,
    bundle: Path | None,
    request: Path | None,
    runtime: str,
    weights: Precision,
    count: int,
    exact: bool,
    as_json: bool,
) -> None:
    """The top items for one user, by a run's newest model, without those she has touched; or from a bundle.

    A run's index finds the candidates and the model scores them; see [index] in the recipe.

    \b
    Examples:
      fedtower recommend runs/dssm-ml-100k-1 --user 42 -k 10
      fedtower recommend --bundle bundle --request bundle-42.safetensors
    """
    if bundle is not None:
        if request is None or folder is not None or user is not None or exact:
            raise click.UsageError("--bundle needs a --request, and neither a RUN nor a --user, nor --exact")
        _recommend_from_bundle(registry, bundle, request, runtime, weights, count, as_json)
        return
    if folder is None or user is None or request is not None:
        raise click.UsageError("give a RUN and a --user, or a --bundle and a --request")
    open_run(folder)
    with undisturbed():
        from fedtower.recsys import run as api

    items = api.load(folder, registry=registry).recommend(user, count, exact=exact)
    if as_json:
        click.echo(json.dumps([{"item": each.item, "title": each.title, "score": each.score} for each in items]))
        return
    table = Table(title=Text(f"for user {user}"), title_justify="left")
    table.add_column("", justify="right")
    table.add_column("item")
    table.add_column("title")
    table.add_column("score", justify="right")
    for place, each in enumerate(items, start=1):
        table.add_row(str(place), each.item, each.title or "", figure(each.score))
    Console(highlight=False).print(table)


def _recommend_from_bundle(
    registry: Registry, bundle: Path, request: Path, runtime: str, weights: Precision, count: int, as_json: bool
) -> None:
    """Candidates ranked by the forward graph, without torch."""
    from fedtower.recsys.device import BundleScorer, format_of
    from fedtower.recsys.reranking import read_request, rerank

    scorer = BundleScorer(Bundle.open(bundle), format_of(registry.get("runtime", runtime)), weights)
    ranked = rerank(scorer, read_request(request), count)
    if as_json:
        click.echo(json.dumps([{"item": item, "score": score} for item, score in ranked]))
        return
    console = Console(highlight=False)
    console.print(Text(f"by {bundle}"), soft_wrap=True)
    table = Table()
    table.add_column("", justify="right")
    table.add_column("item")
    table.add_column("score", justify="right")
    for place, (item, score) in enumerate(ranked, start=1):
        table.add_row(str(place), item, figure(score))
    console.print(table)


@click.command()
@json_option
@pass_registry
def recipes(registry: Registry, as_json: bool) -> None:
    """List the recipes that can be run by name.

    \b
    Example:
      fedtower recipes
    """
    offers = registry.offers("recipe")
    if as_json:
        click.echo(
            json.dumps(
                [{"name": offer.name, "summary": offer.summary, "distribution": offer.distribution} for offer in offers]
            )
        )
        return
    table = Table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("summary")
    for offer in offers:
        table.add_row(offer.name, offer.summary)
    Console(highlight=False).print(table)


def _finish(console: Console, folder: Path) -> None:
    """The figures that count, where the report is, and what to do next."""
    record = RunLog(folder).record()
    report = write_report([folder])
    console.print(_figures(record))
    selected = record.row_selection
    if selected is not None:
        console.print(
            f"down:   {in_bytes(selected.bytes_down)} a client and visit; with the whole tables "
            f"{in_times(selected.times_as_much)} as much",
            soft_wrap=True,
        )
    if record.index is not None:
        console.print(fitted(console, f"index:  {index_in_words(record.index)}"), soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)
    attack = RunFolder.open(folder).recipe().attack
    if attack is not None and attack.share:
        console.print(
            f"next:   fedtower run {folder / 'recipe.toml'} -o attack.share=0   (the same, and nobody attacks)",
            soft_wrap=True,
        )
    elif record.started.get("mode") == "simulated":
        console.print(
            f"next:   fedtower run {folder / 'recipe.toml'} -o mode=standalone\n"
            f"        trains the same model centrally",
            soft_wrap=True,
        )
    else:
        console.print(
            f"next:   fedtower report {folder} OTHER-RUN\n        shows two runs side by side", soft_wrap=True
        )


def _figures(record: RunRecord) -> Table:
    """The model beside the baseline, a row for each protocol."""
    table = Table(title="test data", title_justify="left")
    table.add_column("protocol")
    table.add_column("model")
    reached = record.final()[0]["metrics"] if record.final() else {}
    names = [*record.first(reached), *(["GAUC"] if "GAUC" in reached else [])]
    for name in names:
        table.add_column(name, justify="right")
    for event in record.final():
        for baseline in record.baselines:
            if baseline["label"] == event["label"]:
                figures = (figure(baseline["metrics"].get(name)) for name in names)
                table.add_row(event["label"], baseline["name"], *figures)
        table.add_row(event["label"], "trained", *(figure(event["metrics"].get(name)) for name in names), style="bold")
    return table
