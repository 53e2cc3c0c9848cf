"""Bench: the runs of a suite, one after the other; what is done already is not done again.

In the suite's folder there are ``runs/``, ``results.json``, ``results.md`` and ``report.html``; all three are written
anew after every run. A run counts as done when its recipe, with all that it left to defaults, is the one that would be
run now: to the last setting, but a setting that the run did not know yet is at its default in it. The results are of
all runs of the suite that are finished there, whichever of them one command asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedtower.core.cli import as_known
from fedtower.core.errors import CheckpointError, PluginError, RecipeError
from fedtower.core.recipe import Recipe, written_out
from fedtower.core.registry import Registry
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.suite import Column, Entry, Suite, Task, task_of
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
            if held is not None and held.is_finished():
                finished = self._read(task, held)
                watcher.ended(task, finished, number, len(tasks), before=True)
            else:
                finished = self._run(task, held, watcher.begins(task, number, len(tasks)))
                watcher.ended(task, finished, number, len(tasks), before=False)
            yield finished

    def beside(self, tasks: Sequence[Task], *, quick: bool, options: Sequence[str]) -> list[Finished]:
        """What is finished here of other entries and seeds than those of ``tasks``, with the same options."""
        wanted, found = {(task.entry.name, task.seed) for task in tasks}, []
        for entry, seed in self._there():
            if (entry.name, seed) in wanted:
                continue
            try:
                task = task_of(self.suite, entry, seed, self.registry, quick=quick, options=options)
            except RecipeError:  # these options are not for this entry, so no run of it is of them
                continue
            held = self._held(task)
            if held is not None and held.is_finished():
                found.append(self._read(task, held))
        return found

    def _there(self) -> list[tuple[Entry, int]]:
        """The entries and seeds that folders here are named by."""
        names = {path.parent.name for path in (self.folder / "runs").glob("*/recipe.toml")}
        return [(entry, seed) for entry in self.suite.entries for seed in _seeds_of(entry, names)]

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
        """The newest run of just this recipe, finished if there is one."""
        folders = (self.folder / "runs").glob(f"{task.name}-*/recipe.toml")
        same = [run for run in (RunFolder.open(path.parent) for path in folders) if self._recipe_of(run) == task.recipe]
        return max(same, key=lambda run: (run.is_finished(), run.path.stat().st_mtime), default=None)

    def _read(self, task: Task, folder: RunFolder) -> Finished:
        columns = [column for layout in self.suite.tables for column in layout.all_columns]
        columns += [Column(name) for plot in self.suite.plots for name in (plot.x, plot.y) if plot.x != "rounds"]
        return finished_run(task.entry.name, task.seed, RunLog(folder.path).record(), columns, self.suite.plots)

    def _recipe_of(self, folder: RunFolder) -> Recipe | None:
        """The recipe of a run, with the defaults of settings that are newer than it; nothing where it says what is no
        more, or was torn: then it is no run of this suite.
        """
        try:
            return written_out(folder.recipe(), self.registry)
        except (CheckpointError, RecipeError, PluginError):
            return None


def _seeds_of(entry: Entry, names: Iterable[str]) -> list[int]:
    """The seeds of an entry that folders are named by."""
    told = (re.fullmatch(rf"{re.escape(entry.name)}-s(-?\d+)-\d+", name) for name in names)
    return sorted({int(match[1]) for match in told if match})
