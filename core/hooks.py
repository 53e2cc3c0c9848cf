"""The doors a plugin comes in by: four families of hooks, never mixed, and the one object that calls them.

A plugin is a module (or an object) whose functions carry the marker below. It names only the arguments it wants:

    from fedtower.core.hooks import hookimpl

    @hookimpl
    def round_finished(report):
        print(report.round, report.loss)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from fedtower.core.errors import PluginError, nearest

if TYPE_CHECKING:
    import numpy as np

    from fedtower.core.cohort import Cohort
    from fedtower.core.draws import Draws
    from fedtower.core.plan import Plan
    from fedtower.core.recipe import Recipe
    from fedtower.core.registry import Registry
    from fedtower.core.round import RoundReport
    from fedtower.core.updates import Updates

PROJECT = "fedtower"
SPEC_VERSION = 1
"""The version of the hooks below. A plugin module may declare ``fedtower_spec = 1``; a newer one is refused."""

hookimpl = pluggy.HookimplMarker(PROJECT)
hookspec = pluggy.HookspecMarker(PROJECT)

Result = TypeVar("Result")


class Offering:
    """*Offer*: what a plugin brings, as strings. Called once, when plugins are discovered."""

    @hookspec
    def fedtower_kinds(self, registry: Registry) -> None:
        """Declare new kinds of part with ``registry.declare(Kind(...))``."""

    @hookspec
    def fedtower_register(self, registry: Registry) -> None:
        """Offer parts: ``registry.aggregator("median", "my_package.median:Median", summary="...")``."""


class Deciding:
    """*Decide*: the first plugin that gives an answer other than ``None`` decides."""

    @hookspec(firstresult=True)
    def select_clients(self, round: int, population: int, draws: Draws) -> np.ndarray | None:
        """The clients of this round, as distinct integers below ``population``, instead of the sampler's."""

    @hookspec(firstresult=True)
    def round_deadline(self, round: int) -> float | None:
        """Seconds after the start of the round from which on updates are dropped; the transport is told. It comes
        before what the recipe's ``[deadline]`` says.
        """

    @hookspec(firstresult=True)
    def accept_update(self, update: Updates, plan: Plan) -> str | None:
        """A reason to refuse this client's update (a block with C = 1, decoded, and past the checks of
        :mod:`fedtower.core.checking`); ``None`` has no objection.
        """

    @hookspec(firstresult=True)
    def device_busy(self) -> str | None:
        """On a device: a reason not to work now (on battery, metered, in use); ``None`` has no objection."""

    @hookspec(firstresult=True)
    def stop_run(self, report: RoundReport) -> str | None:
        """A reason to end the run after this round; ``None`` goes on."""


class Wrapping:
    """*Wrap*: a generator around a core action, marked ``@hookimpl(wrapper=True)``.

    It runs up to its ``yield``, is given the action's result (or its exception) there, and returns the result.
    """

    @hookspec(firstresult=True)
    def client_train(self, plan: Plan, clients: np.ndarray) -> Any:
        """Around the local training of a block of clients; the result is what ``Runtime.train`` returns."""

    @hookspec(firstresult=True)
    def aggregate(self, round: int) -> Any:
        """Around the folding of a round's updates; the result is what ``Aggregator.fold`` returns."""

    @hookspec(firstresult=True)
    def export(self, folder: Path) -> Any:
        """Around the export of a model to the bundle ``folder``; the result is a ``fedtower.recsys.bundle.Bundle``."""


class Observing:
    """*Observe*: everyone is told, one by one; an observer that fails is reported once and the run goes on."""

    @hookspec
    def run_started(self, recipe: Recipe, folder: Path) -> None:
        """The parts are made and the run's folder is there."""

    @hookspec
    def run_resumed(self, round: int) -> None:
        """The run goes on from the checkpoint after this round."""

    @hookspec
    def data_loaded(self, card: Mapping[str, Any], headline: tuple[str, ...]) -> None:
        """The data set is there; ``card`` is its data card as plain values, ``headline`` the metrics to look at
        first.
        """

    @hookspec
    def model_built(self, shared_bytes: int, table_bytes: int) -> None:
        """The model is there: so many bytes are sent to every client of a round, and the tables in the cloud have so
        many.
        """

    @hookspec
    def round_started(self, round: int, cohort: Cohort) -> None:
        """The cohort of this round has been chosen."""

    @hookspec
    def update_received(self, round: int, updates: Updates) -> None:
        """A block of updates has arrived, was decoded, and counts; its metric ``bytes_up`` is what came."""

    @hookspec
    def update_refused(self, round: int, client: int, reason: str, words: str) -> None:
        """A client's update does not count, for one of the reasons of ``fedtower.core.checking.Reason``; ``words`` say
        it to people.
        """

    @hookspec
    def client_dropped(self, round: int, clients: np.ndarray, reason: str) -> None:
        """These clients do not count in this round."""

    @hookspec
    def privacy_spent(self, round: int, spent: Mapping[str, float]) -> None:
        """What the run has spent with this round, by name, says the accountant."""

    @hookspec
    def deadline_changed(self, round: int, seconds: float, why: str) -> None:
        """After this round the deadline is another: ``seconds`` from the next one on, if no plugin decides."""

    @hookspec
    def round_finished(self, report: RoundReport) -> None:
        """The server has made its step."""

    @hookspec
    def evaluated(self, round: int, subject: str, evaluation: Any) -> None:
        """After this round ``subject`` (``model``, or a baseline's name) was judged:
        ``fedtower.recsys.evaluation.Evaluation``.
        """

    @hookspec
    def checkpoint_written(self, round: int, path: Path) -> None:
        """The state after this round is on disk."""

    @hookspec
    def index_built(self, round: int, figures: Mapping[str, Any]) -> None:
        """The items of the model after this round can be searched; ``figures`` is what ``summary.json`` holds of it."""

    @hookspec
    def warned(self, message: str) -> None:
        """Something is not as it should be, and the run goes on."""

    @hookspec
    def run_finished(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; ``summary`` is what ``summary.json`` holds."""


FAMILIES: Mapping[str, type] = {"offer": Offering, "decide": Deciding, "wrap": Wrapping, "observe": Observing}


def hook_names(family: str) -> tuple[str, ...]:
    """The hooks of one family, in the order in which a run meets them.

    >>> hook_names("wrap")
    ('client_train', 'aggregate', 'export')
    """
    return tuple(name for name in vars(FAMILIES[family]) if not name.startswith("_"))


def new_manager() -> pluggy.PluginManager:
    """A pluggy manager that knows fedtower's hooks and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    for family in FAMILIES.values():
        manager.add_hookspecs(family)
    return manager


def hooks_of(manager: pluggy.PluginManager, plugin: object) -> dict[str, str]:
    """The hooks that ``plugin`` implements, known or not, each with the name of the function that does."""
    marked = {name: manager.parse_hookimpl_opts(plugin, name) for name in dir(plugin)}
    return {options.get("specname") or name: name for name, options in marked.items() if options is not None}


def add_plugin(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register a plugin whole or not at all.

    Raises:
        PluginError: a hook is misspelt, has an argument that the hook does not have, or is in the wrong family's form.
    """
    try:
        _check_hooks(manager, plugin, name)
        manager.register(plugin, name=name)
    except ValueError as error:  # the same plugin twice
        raise PluginError(f"the plugin {name!r} cannot be registered: {error}") from error
    except pluggy.PluginValidationError as error:
        if manager.is_registered(plugin):  # some versions of pluggy keep the hooks they saw before the bad one
            manager.unregister(plugin)
        raise PluginError(" ".join(str(error).split())) from error


def _check_hooks(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    known = [hook for family in FAMILIES for hook in hook_names(family)]
    wraps = hook_names("wrap")
    for hook, function in hooks_of(manager, plugin).items():
        if hook not in known:
            raise PluginError(
                f"the plugin {name!r} implements {hook!r}, which is not a hook of fedtower{nearest(hook, known)}; "
                f"the hooks are {', '.join(known)}"
            )
        options = manager.parse_hookimpl_opts(plugin, function)
        assert options is not None  # hooks_of lists those that have them
        if options.get("hookwrapper"):
            raise PluginError(f"the plugin {name!r}: {hook} is an old-style hookwrapper; use @hookimpl(wrapper=True)")
        if bool(options.get("wrapper")) != (hook in wraps):
            wanted = "@hookimpl(wrapper=True) on a generator function" if hook in wraps else "a plain @hookimpl"
            raise PluginError(f"the plugin {name!r}: {hook} must be {wanted}")


class Hooks:
    """Calls the hooks of the plugins of one manager.

    Args:
        manager: The registered plugins; ``registry.manager`` for the installed ones.
        report: Given one message for every observer that fails, the first time that it fails; a warning by default.
    """

    def __init__(self, manager: pluggy.PluginManager, report: Callable[[str], None] | None = None) -> None:
        self.manager = manager
        self.report = report or _warn
        self._failed: set[tuple[str, str]] = set()

    @classmethod
    def none(cls, report: Callable[[str], None] | None = None) -> Hooks:
        """Hooks that nobody implements yet."""
        return cls(new_manager(), report)

    def add(self, plugin: object, name: str) -> None:
        """Let an object with marked methods take part, as trackers do."""
        add_plugin(self.manager, plugin, name)

    def implements(self, name: str) -> bool:
        """Whether some plugin implements this hook."""
        return bool(self._caller(name).get_hookimpls())

    def decide(self, name: str, **values: Any) -> Any:
        """The first answer that is not ``None``, or ``None``."""
        return self._caller(name)(**values)

    def wrap(self, name: str, action: Callable[[], Result], **values: Any) -> Result:
        """The result of ``action()``, run inside the wrappers of all plugins, the last registered outermost."""
        caller = self._caller(name)
        if not caller.get_hookimpls():
            return action()
        result: Result = caller.call_extra([lambda: action()], values)
        return result

    def observe(self, name: str, **values: Any) -> None:
        """Tell every observer. One that raises is reported once, and neither the others nor the run notice."""
        for implementation in reversed(self._caller(name).get_hookimpls()):
            arguments = [values[argument] for argument in implementation.argnames]
            try:
                implementation.function(*arguments)
            except Exception as error:
                self._contain(implementation.plugin_name, name, error)

    def _contain(self, plugin: str, hook: str, error: Exception) -> None:
        if (plugin, hook) not in self._failed:
            self._failed.add((plugin, hook))
            self.report(
                f"the plugin {plugin!r} failed in {hook}: {type(error).__name__}: {error}; "
                "the run goes on without what it wanted to do, and this is said only once"
            )

    def _caller(self, name: str) -> pluggy.HookCaller:
        caller: pluggy.HookCaller = getattr(self.manager.hook, name)
        return caller


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
