"""What steps an asynchronous run has made, kept by the run itself and made once more in one process that nobody kills.

As a run's ``fedtower_plugins.py`` it copies into ``kept/`` what a checkpoint is about to let go of: accepted uploads,
``WINDOW-POSITION-CLIENT``, and the steps' files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtower.core.hooks import Hooks, hookimpl, new_manager
from fedtower.core.registry import discover

if TYPE_CHECKING:
    from fedtower.core.cohort import Cohort
    from fedtower.core.draws import Draws
    from fedtower.core.plan import Plan
    from fedtower.core.recipe import Recipe
    from fedtower.core.transport import Asked
    from fedtower.core.updates import Updates

_running: dict[str, Any] = {}


@hookimpl
def run_started(recipe: Recipe, folder: Path) -> None:
    """Remember whose run it is."""
    (folder / "kept").mkdir(exist_ok=True)
    _running.update(recipe=recipe, folder=folder)


@hookimpl
def checkpoint_written(round: int) -> None:
    """Keep what is about to be let go of."""
    keep(_running["folder"], _running["recipe"])


def keep(folder: Path, recipe: Recipe) -> None:
    """Copy the uploads and the steps that there are."""
    from fedtower.recsys.run_folder import RunFolder

    factory = discover().make("journal", recipe.journal, path="journal")
    journal = factory.open(folder / "journal", RunFolder.open(folder).federation().name)
    try:
        for record in journal.rounds():
            for each in () if record.retired or record.task != "train" else journal.accepted(record.round, "train"):
                name = f"{each.round:06d}-{each.position:06d}-{each.client}"
                (folder / "kept" / name).write_bytes(each.payload)
    finally:
        journal.close()
    for path in (folder / "steps").glob("*.json"):
        shutil.copyfile(path, folder / "kept" / path.name)


@dataclass(frozen=True)
class KeptSteps:
    """The uploads, by window and position, and what each version took, as a transport that gives them again."""

    uploads: Mapping[tuple[int, int], tuple[int, bytes]]
    steps: Mapping[int, list[tuple[int, int]]]

    @classmethod
    def read(cls, folder: Path) -> KeptSteps:
        """What a run has kept."""
        uploads = {}
        for path in folder.glob("*-*-*"):
            window, position, client = map(int, path.name.split("-"))
            uploads[window, position] = (client, path.read_bytes())
        files = {int(path.stem): json.loads(path.read_text())["taken"] for path in folder.glob("*.json")}
        return cls(uploads, {version: [(int(w), int(p)) for w, p in taken] for version, taken in files.items()})

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        """Those who counted."""
        import numpy as np

        from fedtower.core.cohort import Cohort

        clients = {self.uploads[place][0] for place in self.steps[round]}
        return Cohort(round, np.array(sorted(clients), dtype=np.int64), population)

    def exchange(self, *_: Any) -> Iterator[Updates]:
        """Nobody waits here."""
        raise AssertionError("these rounds wait for nobody")

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> _Again:
        """One of the steps."""
        return _Again(self, plan.round)


@dataclass(frozen=True)
class _Again:
    of: KeptSteps
    version: int

    def arrivals(self) -> Iterator[Updates]:
        """Its updates, in the order of their clients: not in which they came."""
        from fedtower.core.transport import Abandoned
        from fedtower.plugins.transports.grpc.codec import decode_submission

        places = self.of.steps[self.version]
        if not places:
            raise Abandoned("as it was")
        for client, payload in sorted(self.of.uploads[place] for place in places):
            yield decode_submission(payload, client, most_bytes=1 << 24).updates

    def flight(self) -> Mapping[str, Any]:
        """Nobody is on the way."""
        return {}

    def spent(self, counted: Cohort) -> None:
        """Nothing is known of that."""


def replayed(folder: Path, kept: KeptSteps) -> dict[str, Any]:
    """All that a checkpoint holds after the same steps."""
    from fedtower.recsys.deployed import _FIELDS, Elsewhere
    from fedtower.recsys.run import _setting
    from fedtower.recsys.run_folder import RunFolder
    from fedtower.recsys.training import Federated

    training = Federated(_setting(RunFolder.open(folder).recipe(), discover(), Hooks(new_manager()), lambda _: None))
    client = Elsewhere(**{name: getattr(training._parts.client, name) for name in _FIELDS})
    training._parts = replace(training._parts, transport=kept, sampler=kept, client=client)
    for _ in training.rounds():
        pass
    return dict(training.snapshot())
