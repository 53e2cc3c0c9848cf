"""Deployed: the rounds of a run whose clients are elsewhere: the same rounds as a simulation's, behind a transport that
reaches devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.draws import Draws
from fedtower.core.journal import Journal
from fedtower.core.plan import Plan
from fedtower.core.round import RoundReport, make_plan
from fedtower.core.settings import Part
from fedtower.core.signing import Signer
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.evaluation import Evaluation, Role
from fedtower.recsys.export import Subject, export_model, recipe_digest, visit_of
from fedtower.recsys.labels_told import OF_OWN_CLASSES
from fedtower.recsys.line import DeployedTransport, Line, Opening
from fedtower.recsys.own_model import is_own
from fedtower.recsys.run_folder import Federation, RunFolder
from fedtower.recsys.tasks import Labelled, whose_models
from fedtower.recsys.training import Federated, Setting, rounds_of

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class ThoseThere:
    """A sampler among the clients that are there."""

    line: Line
    sampler: Sampler

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        """The cohort, as the recipe's sampler chooses it among them."""
        return self.line.choose(round, self.sampler, draws)


@dataclass(frozen=True)
class Elsewhere(ClientSide):
    """The client's half where there is none: devices have it, and keep what they keep."""

    def visit(self, plan: Plan, clients: IntArray) -> Any:
        """Nobody is visited here."""
        raise AssertionError("clients of a deployed run are on their devices")

    def settle(self, clients: IntArray, counted: NDArray[np.bool_]) -> None:
        """A device is told by the intake."""


class Deployed(Federated):
    """Trains by rounds over devices."""

    def __init__(
        self, setting: Setting, folder: Path, federation: Federation, journal: Journal, signer: Signer
    ) -> None:
        super().__init__(setting)
        recipe, model = setting.recipe, self._model
        transport: DeployedTransport = setting.registry.make("transport", recipe.transport, path="transport")
        evaluation = {
            "protocol": recipe.evaluation.protocol,
            "negatives": recipe.evaluation.negatives,
            "k": list(recipe.evaluation.k),
            **({"personal": True} if recipe.evaluation.personal else {}),
        }
        self.line = transport.open(
            Opening(
                folder=folder,
                federation=federation.name,
                run=federation.run,
                seed=recipe.seed,
                bundle=self._bundle(folder / "bundle"),
                local=recipe.local,
                rows=model.tables,
                transforms=recipe.transforms,
                evaluation=evaluation,
                max_norm=recipe.checks.max_norm,
                cohort_size=recipe.cohort.asked.settings.get("size"),
                journal=journal,
                signer=signer,
                said=lambda message: setting.hooks.observe("warned", message=message),
                asynchronous=recipe.asynchronous,
                download=recipe.download,
            )
        )
        self._parts = replace(
            self._parts,
            transport=self.line,
            sampler=ThoseThere(self.line, self._parts.sampler),
            client=Elsewhere(**{name: getattr(self._parts.client, name) for name in _FIELDS}),
            store=self.line.rows,
        )

    def rounds(self) -> Iterator[RoundReport]:
        """Train, one round an item; what a round was made of is let go of once :meth:`saved` says so."""
        for state, report in rounds_of(self._parts)(self._state, self._parts):
            self._state = state
            self.line.committed(report.round)
            yield report
        self.line.trained()

    def judge(self, role: Role, round: int) -> Evaluation:
        """What the devices say of the model as it stands, each of its own held-out items."""
        plan = make_plan(self._state, self._parts)
        sums = self.line.judged(replace(plan, round=round), role, plan.round if self._tunes else None)
        figures = {name: total / count for name, (total, count) in sums.items() if count}
        cases = max((count for _, count in sums.values()), default=0)
        return Evaluation(role, f"on devices, {self._protocol}", figures, cases=cases, users=cases)

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after a round: what led to it may go."""
        self.line.saved(round)

    def finished(self, reason: str) -> None:
        """Devices that call are told that it is over."""
        self.line.finished(reason)

    def close(self) -> None:
        """Let go of what is open."""
        self.line.close()

    @property
    def _tunes(self) -> bool:
        """Whether devices make a visit for themselves before they judge."""
        recipe = self._setting.recipe
        return recipe.evaluation.personal and recipe.local.ditto is None

    @property
    def _protocol(self) -> str:
        """What devices do with what they hold out, and with whose models."""
        recipe, task = self._setting.recipe, self._setting.task
        personal, settings = recipe.evaluation.personal, recipe.evaluation
        if isinstance(task, Labelled):
            has_own = personal or any(map(is_own, self._model.declared.on_device))
            return OF_OWN_CLASSES if has_own and task.examples.num_classes else "held-out examples"
        ranking = "full ranking" if settings.protocol == "full" else f"{settings.negatives} negatives"
        return f"{ranking}, {whose_models(recipe)}" if personal else ranking

    def _bundle(self, place: Path) -> Bundle:
        """The bundle of the model as it was at first, exported once: its graphs are those of all rounds."""
        if place.is_dir():
            return Bundle.open(place)
        setting, declared, local = self._setting, self._model.declared, self._setting.recipe.local
        subject = Subject(
            name=setting.recipe.model.name,
            declared=declared,
            local=local,
            visit=visit_of(setting.task, declared, local),
            recipe=recipe_digest(setting.recipe.to_dict()),
        )
        return export_model(subject, self.learned(), place, setting.registry, hooks=setting.hooks)


_FIELDS = ("data", "runtime", "rows", "transforms", "store", "hooks", "draws", "device_state")


def open_deployed(setting: Setting, folder: RunFolder) -> Deployed:
    """The training of a deployed run, with the folder's journal and key.

    Raises:
        CheckpointError: the folder is not one that was served.
    """
    recipe, make = setting.recipe, setting.registry.make
    federation = folder.federation()
    journal = make("journal", recipe.journal, path="journal").open(folder.path / "journal", federation.name)
    signer = make("signer", Part(recipe.signer, {"key": str(federation.signing_key)}), path="signer")
    return Deployed(setting, folder.path, federation, journal, signer)
