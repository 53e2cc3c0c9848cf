"""Report: one self-contained HTML page about a run, or about several side by side.

Everything in it is read from the run folders: figures from ``log.jsonl``, the recipe from ``recipe.toml``, versions and
plugins from ``environment.json``. The page asks for nothing from a network, and reads on a phone, a desktop and paper.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fedtower.core.errors import StorageError
from fedtower.recsys.page import Told, render
from fedtower.recsys.runlog import RECIPE, open_run

PAGE = "report.html"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about these runs, and give back where it is: in the run's folder, or for several in this one.

    Raises:
        CheckpointError: a folder is not that of a run.
        StorageError: the page cannot be written.
    """
    folder = Path(folders[0]) if len(folders) == 1 else Path()
    path = Path(out) if out is not None else folder / PAGE
    page = render(read_runs(folders))
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(
            f"the report cannot be written to {path} ({error.strerror}); give another place with --out FILE"
        ) from error
    return path


def read_runs(folders: Sequence[str | Path]) -> list[Told]:
    """What the folders hold, each with a name of its own."""
    paths = [Path(folder) for folder in folders]
    records = [open_run(path).record() for path in paths]
    names = [path.resolve().name for path in paths]
    return [
        Told(
            label=name if names.count(name) == 1 else str(path),
            record=record,
            recipe=_text(path / RECIPE),
            environment=_json(path / "environment.json"),
        )
        for path, name, record in zip(paths, names, records, strict=True)
    ]


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to write the page.")
def report_command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page about a run, or about several side by side, and print where it is.

    RUN is a run's folder. The page goes to RUN/report.html, or for several runs to report.html here. An unfinished run
    is told of as far as it went.

    \b
    Examples:
      fedtower report runs/dssm-ml-100k-1
      fedtower report runs/dssm-ml-100k-1 runs/dssm-ml-100k-2 --out two.html
    """
    click.echo(write_report(runs, out))
