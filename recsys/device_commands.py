"""Commands about devices: export a run's model as a bundle, and compare the runtimes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtower.core.cli import pass_registry
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import Registry
from fedtower.recsys.runlog import open_run


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The new folder; default: RUN/bundle.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="A format to write, in order; may be repeated. Default: onnx, then mnn.",
)
@click.option(
    "--weights",
    "precisions",
    multiple=True,
    type=click.Choice(["float16", "int8"]),
    help="Weights for serving beside the float32 ones; the manifest says how far they move the scores.",
)
@click.option(
    "--request",
    "user",
    metavar="USER",
    help="Also write what this user's device has at hand to rank candidates: OUT-USER.safetensors.",
)
@click.option("--candidates", default=100, show_default=True, type=click.IntRange(min=1), help="Of a --request.")
@pass_registry
def export(
    registry: Registry,
    folder: Path,
    out: Path | None,
    formats: tuple[str, ...],
    precisions: tuple[str, ...],
    user: str | None,
    candidates: int,
) -> None:
    """Write a run's newest model as a bundle that devices train and score with, and verify it against torch.

    \b
    Examples:
      fedtower export runs/dssm-ml-100k-1
      fedtower export runs/dssm-ml-100k-1 --out bundle --weights int8 --request 42
      fedtower recommend --bundle bundle --request bundle-42.safetensors
    """
    open_run(folder)
    from fedtower.recsys import export as api
    from fedtower.recsys.bundle_of_run import export_run, write_request

    target = out or folder / "bundle"
    bundle = export_run(folder, target, registry, formats=formats or api.FORMATS, precisions=precisions)
    console = Console(highlight=False)
    console.print(Text(f"bundle {target}"), soft_wrap=True)
    table = Table()
    for column in ("file", "bytes", "off torch by"):
        table.add_column(column, justify="left" if column == "file" else "right")
    errors = {str(each["file"]): float(each["error"]) for each in bundle.manifest.weights.values() if each["error"]}
    for name in sorted(bundle.manifest.files):
        off = bundle.manifest.checks.get(name, errors.get(name))
        table.add_row(name, f"{(bundle.path / name).stat().st_size:,}", "" if off is None else f"{off:.1e}")
    console.print(table)
    if user is not None:
        named = re.sub(r"[^\w.-]", "_", user)  # an id may hold what a file's name may not
        path = target.parent / f"{target.name}-{named}.safetensors"
        write_request(folder, user, candidates, path, registry)
        console.print(f"request: {path}", soft_wrap=True)


@click.command()
@click.argument("recipe", metavar="NAME-OR-FILE")
@click.argument("other", metavar="[OTHER-RUN]", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--option", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")
@pass_registry
def parity(registry: Registry, recipe: str, other: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Compare every runtime with the plain one: after a step, a visit and a round from the same state. Or two RUNs.

    One that is absent, or further off than its tolerance, makes the exit code 1. Over the many steps of a round even
    the plain one ends elsewhere when it begins a rounding away: how far is measured then, twice as much is allowed, and
    the verdict is "near". Of two runs, what their newest common checkpoints hold is compared, and their test figures.

    \b
    Examples:
      fedtower parity dssm-synthetic
      fedtower parity dssm-ml-100k -o local.optimizer=adam -o local.lr=0.001
      fedtower parity runs/dssm-ml-100k-1 runs/dssm-ml-100k-2
    """
    if other is not None:
        if overrides:
            raise click.UsageError("two runs are compared as they are: leave -o out")
        _compare_runs(Path(recipe), other, as_json)
        return
    loaded = load_recipe(recipe, overrides, registry)
    from fedtower.recsys import parity as api

    lines = list(api.parity(loaded, registry))
    if as_json:
        shown = ("runtime", "moment", "what", "distance", "moved", "tolerance", "rounding", "verdict")
        click.echo(json.dumps([{name: _plain(getattr(line, name)) for name in shown} for line in lines]))
    else:
        title = f"{loaded.name} ({api.describe(loaded.local)}): how far from {api.REFERENCE}"
        table = Table(title=title, title_justify="left")
        for column in ("runtime", "after one", "of"):
            table.add_column(column, no_wrap=True)
        for column in ("off by", "moved by", "allowed"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict")
        for line in lines:
            distance, moved = ("" if line.absent else f"{value:.1e}" for value in (line.distance, line.moved))
            numbers = (distance, moved, f"{max(line.tolerance, 2 * line.rounding):.0e}")
            verdict = "absent" if line.absent else line.verdict
            table.add_row(
                line.runtime, line.moment, line.what, *numbers, verdict, style="" if line.holds else "bold red"
            )
        console = Console(highlight=False)
        console.print(table)
        reach = max((line.rounding for line in lines), default=0.0)
        if reach:
            console.print(
                f"near: over this round {api.REFERENCE} itself is off by {reach:.1e} when it begins a rounding away; "
                f"twice as much is allowed",
                soft_wrap=True,
            )
        for runtime, reason in {line.runtime: line.absent for line in lines if line.absent}.items():
            console.print(f"{runtime} is {reason}", soft_wrap=True, markup=False)
    wrong = [line for line in lines if not line.holds]
    if wrong:
        named = ", ".join(dict.fromkeys(line.runtime for line in wrong))
        raise api.ParityError(
            f"of {', '.join(api.OTHERS)}, which are all expected to give the numbers of {api.REFERENCE}, {named} did "
            f"not; {len(wrong)} of {len(lines)} lines of the table say where"
        )


def _compare_runs(folder: Path, other: Path, as_json: bool) -> None:
    from fedtower.recsys import run_parity
    from fedtower.recsys.parity import ParityError

    round, lines = run_parity.compare(folder, other)
    if as_json:
        shown = ("what", "numbers", "distance", "allowed", "verdict")
        click.echo(json.dumps([{"round": round, **{name: getattr(line, name) for name in shown}} for line in lines]))
    else:
        table = Table(title=f"after round {round}: {folder} beside {other}", title_justify="left")
        table.add_column("", no_wrap=True)
        for column in ("numbers", "off by", "allowed"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("verdict")
        for line in lines:
            numbers = (f"{line.numbers:,}", f"{line.distance:.1e}", f"{line.allowed:.0e}")
            table.add_row(line.what, *numbers, line.verdict, style="" if line.holds else "bold red")
        Console(highlight=False).print(table)
    if not all(line.holds for line in lines):
        raise ParityError(
            f"{folder} and {other} did not come to the same. Are recipe, seed and clients the same? Devices train in "
            f"the engine mnn: beside a deployed run, simulate with -o runtime.name=mnn. Over many rounds engines that "
            f"round otherwise come to lie on two sides of a ReLU's kink, and then both are right"
        )


def _plain(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value
