"""What a run trains, whichever its mode: the parts that both modes share, and the federated way of training them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.aggregation import Aggregator, Instructed, Rooted
from fedtower.core.asynchronous import run_async
from fedtower.core.checkpoint import Attachments, grouped
from fedtower.core.client import ClientSide, Preparing, VisitCosts
from fedtower.core.cohort import Informed, Sampler
from fedtower.core.control import without_variates
from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import Recipe
from fedtower.core.registry import Registry
from fedtower.core.round import Parts, RoundReport, make_plan, run_rounds
from fedtower.core.runtime import Runtime
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.transport import OwnTime, Simulates
from fedtower.recsys.controls import with_controls
from fedtower.recsys.ditto import with_copies
from fedtower.recsys.evaluation import Evaluation, Role
from fedtower.recsys.learned import Learned
from fedtower.recsys.models import Declared
from fedtower.recsys.own_model import tune
from fedtower.recsys.personal import kept
from fedtower.recsys.placed import placed
from fedtower.recsys.processes import ALONE, Processes
from fedtower.recsys.public_rows import PublicRows
from fedtower.recsys.refusals import refuse_half, refuse_personal, refuse_unjudged
from fedtower.recsys.root_update import RootUpdate
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import Task

FloatArray = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
Attached = Mapping[str, Path]  # the folder that each attachment wrote
NOTHING: Attached = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    """What a run has before anything is trained: its recipe, its data, and who is told."""

    recipe: Recipe
    registry: Registry
    task: Task
    hooks: Hooks
    draws: Draws
    clock: Callable[[], float]
    processes: Processes = ALONE


class Training(Protocol):
    """A model on its way, in either mode."""

    def rounds(self) -> Iterator[RoundReport]:
        """Train, one round (or epoch) an item, from where the training stands."""
        ...

    def learned(self) -> Learned:
        """The model as it stands."""
        ...

    def snapshot(self) -> Arrays:
        """Everything that a later :meth:`restore` needs to continue bit for bit."""
        ...

    def attachments(self) -> Attachments:
        """What writes files of its own into a checkpoint, besides the arrays of the snapshot."""
        ...

    def restore(self, arrays: Arrays, attached: Attached = NOTHING) -> None:
        """Continue from a snapshot and what was attached to it."""
        ...


@runtime_checkable
class OverDevices(Protocol):
    """A training whose clients are devices: they hold the data, and so they judge."""

    def judge(self, role: Role, round: int) -> Evaluation:
        """What the devices say of the model as it stands; ``round`` names the window in which they are asked."""
        ...

    def saved(self, round: int) -> None:
        """A checkpoint holds the state after a round."""
        ...

    def finished(self, reason: str) -> None:
        """There will be no more rounds."""
        ...


@dataclass(frozen=True)
class Assembled:
    """The model of a run: what it declares, its cloud part, and what its clients keep."""

    declared: Declared
    tables: CloudTables | None
    store: ClientStore

    def learned(self, parameters: Mapping[str, FloatArray]) -> Learned:
        """The model with these shared parameters."""
        return Learned(self.declared, parameters, self.store, self.tables)

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """The tables."""
        return under("tables", {} if self.tables is None else self.tables.snapshot())

    def attachments(self) -> Attachments:
        """What the clients keep, if they keep anything, and tables that are spread over processes."""
        clients: Attachments = {"clients": self.store.save} if self.store.names else {}
        return {**clients, **({} if self.tables is None else self.tables.attachments)}

    def restore(self, arrays: Arrays, attached: Attached) -> None:
        """Continue from a snapshot and what was attached to it."""
        if self.tables is not None:
            self.tables.restore(grouped(arrays, "tables"), attached.get("tables"))
        if "clients" in attached:
            self.store.load(attached["clients"])
        else:  # a checkpoint from before there were attachments, or one of clients that keep nothing
            self.store.restore(grouped(arrays, "clients"))


def assemble(setting: Setting, *, row_lr: float | None = None, tower_lr: float | None = None) -> Assembled:
    """The model, initialised from the run's seed alone: both modes begin with the same bits.

    Raises:
        RecipeError: a device that torch does not have.
    """
    recipe, task = setting.recipe, setting.task
    if recipe.device != "cpu" and not (recipe.device.startswith("cuda") and torch.cuda.is_available()):
        raise RecipeError(
            f'device = "{recipe.device}" is not there: torch {torch.__version__} sees {_devices()}. `fedtower doctor` '
            f"says what is installed; CONTRIBUTING.md has the command that installs for a GPU"
        )
    torch.set_num_threads(recipe.threads)
    generator = torch.Generator().manual_seed(int(setting.draws.bits("initial parameters")) & 0x7FFFFFFFFFFFFFFF)
    declared: Declared = setting.registry.make("model", recipe.model, path="model").declare(task.schema, generator)
    if recipe.mode != "standalone":
        declared = with_copies(placed(declared, recipe.local, task.schema), recipe.local)
        declared = with_controls(declared, recipe.local)
    tables = None
    if declared.tables:
        tables = CloudTables(
            declared,
            task.features,
            recipe.rows,
            generator,
            device=recipe.device,
            row_lr=row_lr,
            tower_lr=tower_lr,
            processes=setting.processes,
        )
    store = ClientStore(task.num_clients)
    for name, value in declared.device_parameters().items():
        store.declare(name, value)
    return Assembled(declared, tables, store)


def assemble_spread(setting: Setting) -> Assembled:
    """The model of a federated run, whose tables are all that several processes can share.

    Raises:
        RecipeError: there are several, and no tables.
    """
    model = assemble(setting)
    if model.tables is None and not setting.processes.is_alone:
        raise RecipeError(
            f"in simulated mode the {setting.processes.count} processes of a torchrun hold a model's tables, and the "
            f"model {setting.recipe.model.name!r} has none: leave torchrun out, or set mode = 'standalone'"
        )
    return model


class Federated:
    """Trains by rounds: cohorts, updates, folding."""

    def __init__(self, setting: Setting) -> None:
        recipe, make = setting.recipe, setting.registry.make
        refuse_half(recipe)
        refuse_personal(recipe, setting.task)
        self._setting = setting
        self._model = assemble_spread(setting)
        refuse_unjudged(recipe, setting.task, self._model.declared)
        self._public = _public_rows(setting, self._model)
        transforms = [make("transform", part, path=f"transforms.{i}") for i, part in enumerate(recipe.transforms)]
        optimizer = make("server_optimizer", recipe.server.part, path="server")
        runtime = make("runtime", recipe.runtime, path="runtime").open(self._model.declared, recipe.local)
        data = setting.task.client_data()
        aggregator = make("aggregator", recipe.aggregator, path="aggregator")
        client = ClientSide(
            data=runtime.prepares(data) if isinstance(runtime, Preparing) else data,
            runtime=runtime,
            rows=self._model.tables,
            transforms=transforms,
            store=self._model.store,
            hooks=setting.hooks,
            draws=setting.draws,
            device_state=self._model.declared.on_device,
        )
        sampler = _sampler_of(setting)
        transport = make("transport", recipe.transport, path="transport")
        if isinstance(transport, Simulates):
            sampler = transport = transport.over(VisitCosts(data, self._model.tables, store=self._model.store), sampler)
        self._parts = Parts(
            population=setting.task.num_clients,
            rounds=recipe.rounds,
            sampler=sampler,
            transport=transport,
            client=client,
            transforms=transforms,
            aggregator=aggregator,
            optimizer=optimizer,
            store=self._model.tables,
            local=recipe.local,
            rows=recipe.rows,
            lr=recipe.server.lr,
            schedule=Schedule(recipe.server.decay, recipe.server.decay_to, recipe.rounds),
            hooks=setting.hooks,
            draws=setting.draws,
            clock=transport.now if isinstance(transport, OwnTime) else setting.clock,
            checks=recipe.checks,
            public=self._public,
            deadline=None if recipe.deadline is None else make("deadline", recipe.deadline, path="deadline"),
            target=recipe.cohort.target,
            asynchronous=recipe.asynchronous,
            download=None if recipe.download is None else make("download", recipe.download, path="download"),
            root=_root_of(setting, self._model, aggregator, runtime),
        )
        parameters = self._model.declared.parameters()
        self._state = ServerState(0, parameters, optimizer.init(without_variates(parameters)))
        plan = make_plan(self._state, self._parts)
        client.declare(plan)
        if isinstance(aggregator, Instructed):
            aggregator.instructed(plan)  # what it has no rule for is told before anything is trained

    def rounds(self) -> Iterator[RoundReport]:
        """Train, one round an item; before the first one, as much on public data as the recipe says."""
        if self._public is not None and self._state.round == 0:
            self._public.warm_up(self._state.parameters, self._parts.schedule(1))
            self._state = replace(self._state, generation=self._public.generation)
        for state, report in rounds_of(self._parts)(self._state, self._parts):
            self._state = state
            yield report

    def learned(self) -> Learned:
        """The model as it stands."""
        learned, recipe = self._model.learned(self._state.parameters), self._setting.recipe
        if not recipe.evaluation.personal or recipe.mode == "deployed":  # there devices make it their own
            return learned
        if recipe.local.ditto is not None:
            return replace(learned, tuned=partial(kept, learned))
        return replace(learned, tuned=partial(tune, make_plan(self._state, self._parts), self._parts.client))

    def snapshot(self) -> Arrays:
        """The server's state, the tables of its generation, and what the clients keep."""
        state = self._state
        return {
            "round": np.asarray(state.round, dtype=np.int64),
            **under("parameters", state.parameters),
            **under("optimizer", state.optimizer),
            **under("aggregator", state.aggregator),
            **under("accountant", state.accountant),
            **under("deadline", state.deadline),
            **under("transport", state.transport),
            **under("download", state.download),
            **self._model.snapshot(),
            **under("public", {} if self._public is None else self._public.store.snapshot()),
        }

    def attachments(self) -> Attachments:
        """What the tables and the clients write themselves."""
        return self._model.attachments()

    def restore(self, arrays: Arrays, attached: Attached = NOTHING) -> None:
        """Continue from a snapshot and what was attached to it."""
        self._model.restore(arrays, attached)
        if self._public is not None:
            self._public.store.restore(grouped(arrays, "public"))
        self._state = replace(
            self._state,
            round=int(arrays["round"].item()),
            parameters=shared_parameters(arrays, self._state.parameters),
            optimizer=grouped(arrays, "optimizer"),
            aggregator=grouped(arrays, "aggregator"),
            accountant=grouped(arrays, "accountant"),
            deadline=grouped(arrays, "deadline"),
            transport=grouped(arrays, "transport"),
            download=grouped(arrays, "download"),
            generation=0 if self._model.tables is None else self._model.tables.generation,
        )


class Helper:
    """The part of a process that does not lead in a federated run: it holds its part of the tables, and answers."""

    def __init__(self, setting: Setting) -> None:
        self._processes = setting.processes
        self._model = assemble_spread(setting)

    def restore(self, arrays: Arrays, attached: Attached = NOTHING) -> None:
        """Continue from a snapshot and what was attached to it."""
        self._model.restore(arrays, attached)

    def follow(self) -> None:
        """Do what the leading process orders, until it is done."""
        self._processes.serve({} if self._model.tables is None else self._model.tables.help)


def rounds_of(parts: Parts) -> Callable[[ServerState, Parts], Iterator[tuple[ServerState, RoundReport]]]:
    """How these parts train: in rounds that wait for a cohort, or in versions that wait for nobody."""
    return run_rounds if parts.asynchronous is None else run_async


def _sampler_of(setting: Setting) -> Sampler:
    """The recipe's sampler, told how many examples clients hold where it has to know. Raises RecipeError where nobody
    can tell it.
    """
    recipe = setting.recipe
    sampler: Sampler = setting.registry.make("sampler", recipe.cohort.asked, path="cohort")
    if not isinstance(sampler, Informed):
        return sampler
    if recipe.mode == "deployed":
        raise RecipeError(
            f"cohort.name = {recipe.cohort.part.name!r} has to know how many examples each client holds, and of devices"
            f" it has only their word: one that claims most would be in every cohort; set cohort.name = 'uniform'"
        )
    return sampler.knowing(setting.task.examples_held)


def _public_rows(setting: Setting, model: Assembled) -> PublicRows | None:
    """What trains the rows on public data, where the recipe wants it."""
    rows, task = setting.recipe.rows, setting.task.public
    if task is None or (rows.train != "public" and not rows.public.warmup):
        return None
    if not setting.processes.is_alone:
        raise RecipeError(
            f"public data trains the rows in one process, and torchrun started {setting.processes.count}: leave "
            f'torchrun out, or set rows.train = "device_updates" and no rows.public.warmup'
        )
    return PublicRows(task, model.declared, model.tables, setting.recipe.local, rows.public)


def _root_of(setting: Setting, model: Assembled, aggregator: Aggregator, runtime: Runtime) -> RootUpdate | None:
    """What makes the server's own update, where the aggregator compares with one."""
    if not isinstance(aggregator, Rooted):
        return None
    if setting.task.public is None:
        raise RecipeError(
            f"the aggregator {setting.recipe.aggregator.name!r} compares updates with one that the cloud makes from "
            f"public data of its own: say with rows.public.share, such as 0.1, how many of the users are set apart "
            f"for it"
        )
    return RootUpdate(setting.task.public, model.declared, model.tables, runtime)


def shared_parameters(arrays: Arrays, like: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The shared parameters of a snapshot.

    Raises:
        CheckpointError: they are not those of this model, whose own are ``like``.
    """
    held = grouped(arrays, "parameters")
    for name in sorted({*held, *like}):
        there, here = (parameters[name].shape if name in parameters else None for parameters in (held, like))
        if there != here:
            raise CheckpointError(
                f"the checkpoint's parameter {name!r} has shape {there}, but this model's has {here}; was it written "
                f"by another recipe?"
            )
    return {name: np.array(value, dtype=np.float32) for name, value in held.items()}


def under(group: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays with ``group/`` before their names; :func:`fedtower.core.checkpoint.grouped` takes it away again."""
    return {f"{group}/{name}": value for name, value in arrays.items()}


def _devices() -> str:
    return f"cpu and {torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "the cpu only"
