"""Bench: the runs of a suite, one after the other; what is done already is not done again.

In the suite's folder there are ``runs/``, ``results.json``, ``results.md`` and ``report.html``; all three are written
anew after every run. A run counts as done when its recipe is, to the last setting, the one that would be run now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedtower.core.cli import as_known
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.suite import Column, Suite, Task
from fedtower.recsys.suite_figures import Finished, finished_run


class Watcher(Protocol):
    """Sees the runs of a suite go by."""

    def begins(self, task: Task, number: int, count: int) -> Iterable[object]:
        """A run begins; what is given back observes it."""
        ...

    def ended(self, task: Task, finished: Finished, number: int, count: int, *, before: bool) -> None:
        """It has ended, now or ``before``."""
        ...


@dataclass(frozen=True)
class Bench:
    """A suite in its folder."""

    suite: Suite
    folder: Path
    registry: Registry

    def runs(self, tasks: Sequence[Task], watcher: Watcher) -> Iterator[Finished]:
        """What becomes of each task, in order. A run that fails is told, and the others go on.

        Raises:
            KeyboardInterrupt: somebody stopped it; the same call goes on where it was.
        """
        for number, task in enumerate(tasks, start=1):
            held = self._held(task)
            if held is not None and _is_finished(held):
                finished = self._read(task, held)
                watcher.ended(task, finished, number, len(tasks), before=True)
            else:
                finished = self._run(task, held, watcher.begins(task, number, len(tasks)))
                watcher.ended(task, finished, number, len(tasks), before=False)
            yield finished

    def _run(self, task: Task, held: RunFolder | None, observers: Iterable[object]) -> Finished:
        from fedtower.recsys import run as api

        try:
            if held is not None and held.has_checkpoint():
                done = api.resume(held.path, registry=self.registry, observers=observers)
            else:
                done = api.run(
                    task.entry.recipe,
                    task.options,
                    runs=self.folder / "runs",
                    registry=self.registry,
                    observers=observers,
                )
        except Exception as error:
            known = as_known(error)
            if known is None:
                raise
            return Finished(task.entry.name, task.seed, error=str(known))
        return self._read(task, RunFolder.open(done.folder))

    def _held(self, task: Task) -> RunFolder | None:
        """The newest run of just this recipe, finished or not."""
        folders = (self.folder / "runs").glob(f"{task.name}-*/recipe.toml")
        same = [run for run in (RunFolder.open(path.parent) for path in folders) if _recipe_of(run) == task.recipe]
        return max(same, key=lambda run: (_is_finished(run), run.path.stat().st_mtime), default=None)

    def _read(self, task: Task, folder: RunFolder) -> Finished:
        columns = [column for layout in self.suite.tables for column in layout.all_columns]
        columns += [Column(name) for plot in self.suite.plots for name in (plot.x, plot.y) if plot.x != "rounds"]
        return finished_run(task.entry.name, task.seed, RunLog(folder.path).record(), columns, self.suite.plots)


def _recipe_of(folder: RunFolder) -> Recipe | None:
    """The recipe of a run; nothing where it is of another version, or was torn: then it is no run of this suite."""
    try:
        return folder.recipe()
    except (CheckpointError, RecipeError):
        return None


def _is_finished(folder: RunFolder) -> bool:
    return (folder.path / "summary.json").is_file() and RunLog(folder.path).record().finished is not None
