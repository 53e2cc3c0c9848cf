"""From a recipe to a trained model: the only place where parts are put together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtower.core.checkpoint import read_attachments, read_checkpoint, write_checkpoint
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import Part, Recipe, check, load_recipe
from fedtower.core.registry import Registry, discover
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.goal import Goal
from fedtower.recsys.index_of_run import index_of
from fedtower.recsys.losses import RANKING, loss_of
from fedtower.recsys.processes import ALONE, Processes, together
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.tasks import Histories, make_task
from fedtower.recsys.trained import Recommendation, Trained
from fedtower.recsys.training import Arrays, Attached, Federated, Helper, OverDevices, Setting, Training
from fedtower.recsys.under_attack import besieged

RUNS = Path("runs")
State = tuple[Arrays, Attached]


@dataclass(frozen=True)
class Run:
    """A run on disk: what it reached, and the model it left."""

    folder: Path

    @property
    def summary(self) -> Mapping[str, Any]:
        """Final figures, baselines and totals; what ``summary.json`` holds."""
        return RunLog(self.folder).record().summary()

    @property
    def metrics(self) -> Mapping[str, float]:
        """The final figures on the test items, by the recipe's protocol."""
        final = RunLog(self.folder).record().final("test")
        return final[0]["metrics"] if final else {}

    @cached_property
    def trained(self) -> Trained:
        """The model of the newest checkpoint."""
        return load(self.folder)

    def evaluate(self) -> Evaluation:
        """Measure the model of the newest checkpoint on the test items again."""
        return self.trained.evaluate()

    def recommend(self, user: str, k: int = 10, *, exact: bool = False) -> list[Recommendation]:
        """The top ``k`` items for a user, without those she has touched; see :meth:`Trained.recommend`."""
        return self.trained.recommend(user, k, exact=exact)


def run(
    name_or_path: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    runs: str | Path = RUNS,
    registry: Registry | None = None,
    observers: Iterable[object] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> Run:
    """Train a recipe, by name or from a file, and give back the finished run.

    Under ``torchrun`` every process calls it: the first has the folder, the observers and the progress, and the others
    hold their part of the tables.

    Args:
        name_or_path: A shipped recipe's name, or a TOML file.
        overrides: Dotted keys, ``{"rounds": 20}`` or ``["rounds=20"]``.
        runs: The folder in which the run gets a folder of its own.
        registry: The plugins that count; by default all that are installed.
        observers: Objects with hook methods, told how the run goes.
        progress: Called with a sentence when something long begins.

    Raises:
        FedtowerError: see its subclasses; the message says what to do.
    """
    with together() as processes:
        registry = registry or discover(folder=Path.cwd())
        recipe = load_recipe(name_or_path, _as_overrides(overrides), registry)
        if recipe.mode == "deployed":
            raise RecipeError('mode = "deployed" is served to devices, not run in this process: fedtower serve RECIPE')
        if recipe.mode == "simulated" and recipe.local.loss == "in_batch_softmax":
            loss_of(RANKING, recipe.local.loss)  # refuses it, before there is a folder
        if not processes.leads:
            return _follow(recipe, registry, processes)
        hooks = _hooks(recipe, registry, observers)
        folder = RunFolder.create(recipe, registry, Path(runs))
        with folder.locked():
            hooks.observe("run_started", recipe=recipe, folder=folder.path)
            _train(recipe, registry, hooks, folder, progress, start=None, processes=processes)
        return Run(folder.path)


def resume(
    folder: str | Path,
    *,
    start: int | None = None,
    registry: Registry | None = None,
    observers: Iterable[object] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> Run:
    """Continue a run from its newest checkpoint (or the one of round ``start``): the same bits as if it had never
    stopped, or, on another number of processes, the same within rounding.
    """
    with together() as processes:
        place = RunFolder.open(Path(folder))
        registry = registry or discover()
        registry.use_folder(place.path)
        recipe = place.recipe()
        if recipe.mode == "deployed":
            raise RecipeError(f"{place.path} is served to devices: `fedtower serve {place.path}` goes on with it")
        check(recipe, registry)
        if not processes.leads:
            return _follow(recipe, registry, processes)
        hooks = _hooks(recipe, registry, observers)
        with place.locked():
            hooks.observe("run_started", recipe=recipe, folder=place.path)
            start = place.latest_round() if start is None else start
            _train(recipe, registry, hooks, place, progress, start=start, processes=processes)
        return Run(place.path)


def train_deployed(
    folder: Path,
    *,
    observers: Iterable[object] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Train a deployed run over its devices, from its newest checkpoint if it has one, to the end.

    What was accepted after that checkpoint is read from the journal again, and gives the same bits.
    """
    from fedtower.recsys.deployed import open_deployed

    place, registry = RunFolder.open(folder), discover()
    registry.use_folder(place.path)
    recipe = place.recipe()
    check(recipe, registry)
    hooks = _hooks(recipe, registry, observers)
    with place.locked():
        hooks.observe("run_started", recipe=recipe, folder=place.path)
        setting = _setting(recipe, registry, hooks, progress)
        task = setting.task
        hooks.observe("data_loaded", card=task.card.to_dict(), headline=task.headline)
        training = open_deployed(setting, place)
        try:
            _rounds(setting, training, place, place.latest_round() if place.has_checkpoint() else None, ALONE)
            training.finished("all rounds are done")
        finally:
            training.close()


def load(
    folder: str | Path, *, registry: Registry | None = None, progress: Callable[[str], None] = lambda message: None
) -> Trained:
    """The model of a run's newest checkpoint, with the data it was trained on.

    Raises:
        RecipeError: under torchrun, which is for training.
    """
    with together() as processes:
        if not processes.is_alone:
            raise RecipeError(
                f"{processes.count} processes were started to use a trained model, which is for one: leave torchrun "
                f"out. Tables that do not fit into one process are evaluated where they are trained, at the run's end"
            )
    place = RunFolder.open(Path(folder))
    registry = registry or discover()
    registry.use_folder(place.path)
    recipe = place.recipe()
    check(recipe, registry)
    setting = _setting(recipe, registry, Hooks.none(), progress)
    training = _training(setting)
    training.restore(*_state(place, place.latest_round()))
    return Trained(setting, training, place)


def _train(
    recipe: Recipe,
    registry: Registry,
    hooks: Hooks,
    folder: RunFolder,
    progress: Callable[[str], None],
    start: int | None,
    processes: Processes,
) -> None:
    """Load and build what the recipe says, and train it."""
    processes.tell((folder.path, recipe.to_dict()))
    setting = _setting(recipe, registry, hooks, progress, processes)
    task = setting.task
    hooks.observe("data_loaded", card=task.card.to_dict(), headline=task.headline)
    _rounds(setting, _training(setting), folder, start, processes)


def _rounds(setting: Setting, training: Training, folder: RunFolder, start: int | None, processes: Processes) -> None:
    """Train to the end, judge; on the way, evaluate and save as often as the recipe says."""
    recipe, task, hooks = setting.recipe, setting.task, setting.hooks
    learned = training.learned()
    shared_bytes = sum(value.nbytes for value in learned.parameters.values())
    hooks.observe("model_built", shared_bytes=shared_bytes, table_bytes=learned.declared.table_bytes)
    index = index_of(recipe, setting.registry, task, training.learned())
    judge_every, save_every = _pace(recipe, recipe.evaluation.every), _pace(recipe, recipe.checkpoint.every)
    last = saved = 0
    _restore(training, processes, None if start is None else _state(folder, start))
    if start is not None:
        hooks.observe("run_resumed", round=start)
        last = saved = start
    try:
        for report in training.rounds():
            last = report.round
            if _is_due(last, judge_every) and task.has_validation:
                hooks.observe("evaluated", round=last, subject="model", evaluation=_judged(setting, training, last))
            if _is_due(last, save_every):
                saved = _save(training, folder, last, recipe, hooks)
        if saved != last:
            _save(training, folder, last, recipe, hooks)
        for subject, evaluation in _final(setting, training, last):
            hooks.observe("evaluated", round=last, subject=subject, evaluation=evaluation)
        if index is not None and isinstance(task, Histories):
            searched, figures = index.build(task, training.learned(), setting.clock)
            index.save(folder.index, last, searched)
            hooks.observe("index_built", round=last, figures=figures.to_dict())
        processes.order("end")
    except (KeyboardInterrupt, RuntimeError) as stop:  # of processes, the others may have stopped first
        stop.add_note(folder.way_on())  # what is on the disk: it may have been stopped right after saving
        raise
    summary = RunLog(folder.path).record().summary()
    folder.write("summary.json", summary)
    hooks.observe("run_finished", summary=summary)


def _follow(recipe: Recipe, registry: Registry, processes: Processes) -> Run:
    """What a process that does not lead does of a training, in the order of :func:`_train`."""
    folder, of_all = processes.tell((Path(), recipe.to_dict()))
    if recipe.to_dict() != of_all:
        raise RecipeError(
            f"process {processes.rank} of {processes.count} was started with another recipe, or other options, than "
            f"the first; give all of them the same command"
        )
    setting = _setting(recipe, registry, Hooks.none(), lambda message: None, processes)
    training = Standalone(setting) if recipe.mode == "standalone" else Helper(setting)
    _restore(training, processes, None)
    training.follow()
    return Run(folder)


def _pace(recipe: Recipe, rounds: int) -> int:
    """How many rounds, or in standalone mode how many epochs, are between two of what the recipe wants every
    ``rounds``.

    Both modes have as many points of a learning curve, and as many checkpoints.
    """
    return max(1, recipe.planned * rounds // recipe.rounds) if rounds else 0


def _is_due(round: int, every: int) -> bool:
    return every > 0 and round % every == 0


def _save(training: Training, folder: RunFolder, round: int, recipe: Recipe, hooks: Hooks) -> int:
    state, attachments = training.snapshot(), training.attachments()
    path = write_checkpoint(folder.checkpoints, round, state, recipe.checkpoint.keep, attachments)
    hooks.observe("checkpoint_written", round=round, path=path)
    if isinstance(training, OverDevices):
        training.saved(round)
    return round


def _state(folder: RunFolder, round: int) -> State:
    """What a training is restored from to be where it was after ``round``; what is damaged is refused."""
    return read_checkpoint(folder.checkpoints, round), read_attachments(folder.checkpoints, round)


def _restore(training: Training | Helper, processes: Processes, state: State | None) -> None:
    """Bring the training of every process to the state that the leading one has read, if it has."""
    state = processes.tell(state)
    if state is not None:
        training.restore(*state)


def _setting(
    recipe: Recipe,
    registry: Registry,
    hooks: Hooks,
    progress: Callable[[str], None],
    processes: Processes = ALONE,
) -> Setting:
    draws = Draws(recipe.seed)
    data = registry.make("dataset", recipe.data.part, path="data").load(draws=draws, progress=progress)
    task = make_task(data, recipe, draws)
    if recipe.attack is not None:
        task = besieged(task, recipe.attack, registry, draws, hooks)
    return Setting(recipe, registry, task, hooks, draws, time.monotonic, processes)


def _training(setting: Setting) -> Training:
    return Standalone(setting) if setting.recipe.mode == "standalone" else Federated(setting)


def _judged(setting: Setting, training: Training, round: int) -> Evaluation:
    """What the model reaches on the validation items, which the devices have if there are any."""
    if isinstance(training, OverDevices):
        return training.judge("validation", round)
    return setting.task.judge(training.learned(), "validation")


def _final(setting: Setting, training: Training, round: int) -> Iterator[tuple[str, Evaluation]]:
    """The final figures, beside a baseline's where the data is here."""
    if isinstance(training, OverDevices):
        yield "model", training.judge("test", round + 1)
    else:
        yield from setting.task.final(training.learned())


def _hooks(recipe: Recipe, registry: Registry, observers: Iterable[object]) -> Hooks:
    """The hooks of the plugins, of the recipe's goal and trackers, and of ``observers``; JSON lines are always
    written.
    """
    hooks = Hooks.none()  # of this run alone: another one with the same registry must not be told of it
    for name, plugin in registry.manager.list_name_plugin():
        hooks.add(plugin, name)
    hooks.report = lambda message: hooks.observe("warned", message=message)
    parts = [Part("jsonl"), *(part for part in recipe.trackers if part.name != "jsonl")]
    trackers = [registry.make("tracker", part, path="trackers") for part in parts]
    if recipe.evaluation.until:
        hooks.add(Goal(recipe.evaluation.until), "evaluation.until")
    for position, observer in enumerate([*trackers, *observers]):
        hooks.add(observer, f"{type(observer).__name__} (observer {position} of this run)")
    return hooks


def _as_overrides(overrides: Mapping[str, Any] | Iterable[str]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={_toml(value)}" for key, value in overrides.items()]
    return list(overrides)


def _toml(value: Any) -> str:
    """A value as TOML writes it on one line. JSON's strings, numbers and booleans are written alike."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(held)}' for key, held in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)
