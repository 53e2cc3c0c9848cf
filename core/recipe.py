"""Recipe: a whole run as data. TOML in, strict keys, dotted overrides, and the same TOML out again."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fedtower.core.chains import refuse_unfit
from fedtower.core.checking import CheckSettings
from fedtower.core.discovery import Gate
from fedtower.core.errors import MissingDependency, RecipeError, nearest
from fedtower.core.offers import read_target
from fedtower.core.overrides import NamedPart, apply_overrides
from fedtower.core.plan import LocalSettings, RowSettings, StandaloneSettings
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part, build, plain, settings_of
from fedtower.core.staleness import AsynchronousSettings

__all__ = [
    "AttackSection",
    "CheckSettings",
    "CheckpointSettings",
    "CohortSection",
    "DataSection",
    "EvaluationSettings",
    "Part",
    "PluginSection",
    "Recipe",
    "ServerSection",
    "check",
    "load_recipe",
    "override_values",
    "parse_recipe",
    "read_recipe",
    "written_out",
]


@dataclass(frozen=True)
class DataSection:
    """Which data set, and how it is split into training, validation and test."""

    part: Part = field(metadata={"part": "name"})
    split: Literal["leave_one_out", "leave_two_out", "time", "random", "ncf", "given"] = field(
        default="leave_one_out", metadata={"help": "what is held out of every user's events"}
    )
    validation: bool = field(
        default=True,
        metadata={"help": "hold a validation item out too: what the learning curve and all tuning look at"},
    )
    test_fraction: float = field(default=0.2, metadata={"help": "share of the events held out by time or at random"})


@dataclass(frozen=True)
class CohortSection:
    """What chooses the clients of a round, and how many more of them are asked than are needed."""

    part: Part = field(metadata={"part": "name"})
    over_selection: float = field(
        default=1.0,
        metadata={"help": "so many times cohort.size are asked, and the round ends with cohort.size updates"},
    )

    def __post_init__(self) -> None:
        if not self.over_selection >= 1.0:
            raise RecipeError(
                f"cohort.over_selection must be at least 1, not {self.over_selection}; 1.3 asks 30 % more clients than "
                f"are needed"
            )

    @property
    def asked(self) -> Part:
        """The sampler of those who are asked.

        Raises:
            RecipeError: more are to be asked than the sampler's size, and it has none.
        """
        if self.over_selection == 1.0:
            return self.part
        if not isinstance(self.part.settings.get("size"), int):
            raise RecipeError(
                f"cohort.over_selection asks more clients than cohort.size, and the sampler {self.part.name!r} has no "
                f"size; set over_selection = 1, or cohort.name = 'uniform'"
            )
        size = math.ceil(self.over_selection * self.part.settings["size"] - 1e-9)  # 1.1 x 10 is 11
        return Part(self.part.name, {**self.part.settings, "size": size})

    @property
    def target(self) -> int | None:
        """How many updates end a round; without over-selection all of the cohort's."""
        return None if self.over_selection == 1.0 else int(self.part.settings["size"])


@dataclass(frozen=True)
class ServerSection:
    """The server's optimiser of the shared parameters; its learning rate and decay are also the rows'."""

    part: Part = field(metadata={"part": "optimizer"})
    lr: float = field(metadata={"help": "the server's learning rate"})
    decay: Literal["none", "linear"] = field(
        default="none", metadata={"help": "how learning rates fall over the rounds"}
    )
    decay_to: float = field(default=0.1, metadata={"help": "the share of the learning rates that is left at the end"})


@dataclass(frozen=True)
class AttackSection:
    """What attackers do in a simulation, and how many there are."""

    part: Part = field(metadata={"part": "name"})
    share: float = field(
        metadata={"help": "of all clients, drawn by the seed; 0: nobody, and the same figures are told"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RecipeError(f"attack.share must be at least 0 and below 1, not {self.share}")


@dataclass(frozen=True)
class EvaluationSettings:
    """How the model is judged."""

    protocol: Literal["sampled", "full"] = field(
        default="sampled", metadata={"help": "rank among negatives, or all items"}
    )
    negatives: int = field(default=99, metadata={"help": "items that each held-out item is ranked among"})
    k: tuple[int, ...] = field(default=(10,), metadata={"help": "lengths of the lists"})
    every: int = field(
        default=20,
        metadata={"help": "rounds between looks at the validation items; 0: none. Standalone: as many in all"},
    )
    until: Mapping[str, float] = field(
        default_factory=dict,
        metadata={"help": "the run ends at a look that finds each of these metrics so good, {accuracy = 0.97}"},
    )
    personal: bool = field(
        default=False,
        metadata={
            "help": "each client trains a visit on its own data before it judges, for itself alone; with local.ditto "
            "it judges the copy that it keeps"
        },
    )
    batch_size: int = field(default=512, metadata={"help": "users scored at a time; it changes no figure"})


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run, so that it can go on after a kill."""

    every: int = field(default=20, metadata={"help": "rounds between checkpoints. Standalone: as many in all"})
    keep: int = field(default=2, metadata={"help": "how many checkpoints stay"})


@dataclass(frozen=True)
class PluginSection:
    """Which plugins this run may use."""

    allow: tuple[str, ...] = field(default=(), metadata={"help": "of the plugins of others, only these"})
    block: tuple[str, ...] = field(default=(), metadata={"help": "none of these"})


@dataclass(frozen=True)
class Recipe:
    """A whole run. Every section is either plain settings or names a part, whose settings are the section's others."""

    name: str
    rounds: int
    data: DataSection
    model: Part
    local: LocalSettings
    cohort: CohortSection
    server: ServerSection
    mode: Literal["simulated", "standalone", "deployed"] = "simulated"
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    rows: RowSettings = field(default_factory=RowSettings)
    runtime: Part = field(default_factory=lambda: Part("torch_loop"))
    transforms: tuple[Part, ...] = ()
    aggregator: Part = field(default_factory=lambda: Part("fedavg"))
    transport: Part = field(default_factory=lambda: Part("in_process"))
    download: Part | None = None
    deadline: Part | None = None
    journal: Part = field(default_factory=lambda: Part("sqlite"))
    signer: str = "ed25519"
    checks: CheckSettings = field(default_factory=CheckSettings)
    asynchronous: AsynchronousSettings | None = None
    attack: AttackSection | None = None
    standalone: StandaloneSettings = field(default_factory=StandaloneSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    index: Part | None = None
    trackers: tuple[Part, ...] = ()
    plugins: PluginSection = field(default_factory=PluginSection)

    def __post_init__(self) -> None:
        for path, value, least in (
            ("rounds", self.rounds, 1),
            ("threads", self.threads, 1),
            ("evaluation.negatives", self.evaluation.negatives, 1),
            ("evaluation.batch_size", self.evaluation.batch_size, 1),
            ("evaluation.every", self.evaluation.every, 0),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
        ):
            if value < least:
                raise RecipeError(f"{path} must be at least {least}, but is {value}")
        if not self.evaluation.k or min(self.evaluation.k) < 1:
            raise RecipeError(
                f"evaluation.k must be list lengths from 1 on, such as [10], but is {list(self.evaluation.k)}"
            )
        if self.evaluation.until and not self.evaluation.every:
            raise RecipeError(
                f"evaluation.until = {dict(self.evaluation.until)} ends a run at a look at the validation items, and "
                f"evaluation.every = 0 asks for none; set evaluation.every"
            )
        if not 0.0 < self.data.test_fraction < 1.0:
            raise RecipeError(f"data.test_fraction must be between 0 and 1, but is {self.data.test_fraction}")
        if self.attack is not None and self.mode != "simulated":
            raise RecipeError(
                f'[attack] is for mode = "simulated", where attackers are made up, and this is mode = "{self.mode}": '
                f"leave [attack] out"
            )

    @property
    def planned(self) -> int:
        """How many rounds the run is to have, or in standalone mode how many epochs."""
        return self.standalone.epochs if self.mode == "standalone" else self.rounds

    def parts(self) -> list[tuple[str, str, Part]]:
        """Every part that the recipe names: where it stands, its kind, and the part."""
        return [
            ("data", "dataset", self.data.part),
            ("model", "model", self.model),
            ("cohort", "sampler", self.cohort.part),
            ("runtime", "runtime", self.runtime),
            *((f"transforms.{i}", "transform", part) for i, part in enumerate(self.transforms)),
            ("aggregator", "aggregator", self.aggregator),
            *([("attack", "attack", self.attack.part)] if self.attack else []),
            ("server", "server_optimizer", self.server.part),
            ("transport", "transport", self.transport),
            *([("download", "download", self.download)] if self.download else []),
            *([("deadline", "deadline", self.deadline)] if self.deadline else []),
            ("journal", "journal", self.journal),
            *([("index", "index", self.index)] if self.index else []),
            *((f"trackers.{i}", "tracker", part) for i, part in enumerate(self.trackers)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """What TOML can hold; :func:`parse_recipe` makes an equal recipe of it."""
        flat: dict[str, Any] = plain(self)
        # TOML wants what belongs to no section first.
        return dict(sorted(flat.items(), key=lambda item: isinstance(item[1], dict | list)))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None) -> Recipe:
    """The recipe of that name, or in that ``.toml`` file, with ``"dotted.key=value"`` overrides; checked whole.

    Beside a file, its folder's ``fedtower_plugins.py`` counts. All settings of the parts are written out in it.

    Raises:
        RecipeError: the recipe does not exist, or a key, a part or a value is not known; the message names the nearest.
    """
    registry = discover(folder=Path.cwd()) if registry is None else registry
    return _loaded(name_or_path, overrides, registry, lambda recipe: check(recipe, registry))


def read_recipe(name_or_path: str | Path, overrides: Iterable[str], registry: Registry) -> Recipe:
    """The same, as it is written: its parts are neither looked for nor imported.

    Raises:
        RecipeError: the recipe does not exist, or one of its own keys is not known.
    """
    return _loaded(name_or_path, overrides, registry, lambda recipe: recipe)


def _loaded(
    name_or_path: str | Path, overrides: Iterable[str], registry: Registry, checked: Callable[[Recipe], Recipe]
) -> Recipe:
    """The recipe, ``checked``; what is wrong is told with where it stands."""
    text, origin = _read(name_or_path, registry)
    overrides = list(overrides)
    try:
        return checked(parse_recipe(override_values(tomllib.loads(text), overrides)))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin} is not TOML: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{origin}{', with your -o,' if overrides else ''} cannot be run: {error}") from error


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of these values. Its keys are checked, and its parts are not: that is :func:`check`."""
    return build(Recipe, values, path="")


def check(recipe: Recipe, registry: Registry) -> Recipe:
    """The recipe with all settings of its parts written out, once every part is found and accepts its settings.

    The recipe's own ``[plugins]`` restrict ``registry``. A part whose library is not installed is only looked up: a run
    that really needs it will say what is missing.
    """
    registry.restrict(Gate("the recipe's [plugins]", recipe.plugins.allow, recipe.plugins.block))
    registry.get("signer", recipe.signer)
    refuse_unfit(recipe.transforms, recipe.aggregator, registry, recipe.local.control)
    whole = written_out(recipe, registry)
    if whole.cohort.asked is not whole.cohort.part:
        registry.make("sampler", whole.cohort.asked, path="cohort")
    _refuse_weighing_twice(whole, registry)
    _refuse_download(whole)
    if whole.asynchronous is not None and whole.mode != "standalone":
        _check_asynchronous(whole, whole.asynchronous, registry)
    return whole


def written_out(recipe: Recipe, registry: Registry) -> Recipe:
    """The recipe with all settings of its parts, defaults too; nothing but that every part can be made is checked.

    Two recipes that ask for the same are equal then, whichever settings were said, or known when they were written.
    A part whose library is not installed keeps the settings that it has.
    """
    values = recipe.to_dict()
    for path, kind, part in recipe.parts():
        section, _, place = path.partition(".")
        try:
            made = registry.make(kind, part, path=path)
        except MissingDependency:
            continue
        (values[section][int(place)] if place else values[section]).update(settings_of(made))
    return parse_recipe(values)


def _refuse_weighing_twice(recipe: Recipe, registry: Registry) -> None:
    """Raise RecipeError where clients are drawn by their examples and then weighed by them (capability ``weighs``)."""
    if recipe.mode == "standalone" or not registry.get("sampler", recipe.cohort.part.name).capabilities.get("weighs"):
        return
    weights = recipe.aggregator.settings.get("weights")
    if weights == "examples" or registry.get("aggregator", recipe.aggregator.name).capabilities.get("weighs"):
        instead = 'aggregator.weights = "equal"' if weights else 'aggregator.name = "fedavg" with weights = "equal"'
        raise RecipeError(
            f"the sampler {recipe.cohort.part.name!r} draws clients by their examples and the aggregator "
            f"{recipe.aggregator.name!r} weighs them by their examples, so that examples would count twice: set "
            f"{instead}, or another cohort.name"
        )


def _refuse_download(recipe: Recipe) -> None:
    """Raise RecipeError for a ``[download]`` with what cannot be had with it."""
    if recipe.download is None:
        return
    name = recipe.download.name
    for given, why in (
        (recipe.mode == "standalone", 'nothing goes down with mode = "standalone"'),
        (
            recipe.asynchronous is not None,
            "[asynchronous] lets devices work from several versions at once, and a publication leads to one",
        ),
        (
            recipe.local.control != "none",
            f"local.control = {recipe.local.control!r} reckons with deltas from the server's own parameters, and sends "
            f"variates beside them",
        ),
    ):
        if given:
            raise RecipeError(f"download.name = {name!r} sends devices fewer bytes, and {why}: leave one of them out")


def _check_asynchronous(recipe: Recipe, settings: AsynchronousSettings, registry: Registry) -> None:
    """Raise RecipeError for parts that cannot do without a cohort that is waited for."""
    for path, kind, part, why in (
        ("aggregator", "aggregator", recipe.aggregator, "folds updates of several versions as they come"),
        ("transport", "transport", recipe.transport, "lets clients work from several versions at once"),
    ):
        can = registry.get(kind, part.name).capabilities
        if kind == "transport" and recipe.mode == "deployed" and "intake" not in can:
            continue  # who serves the recipe names one that reaches devices, or is told to
        if not can.get("asynchronous"):
            able = [each.name for each in registry.offers(kind) if each.capabilities.get("asynchronous")]
            raise RecipeError(
                f'{path}.name = "{part.name}" cannot be used with [asynchronous]: it is no {kind} that {why} (its '
                f"capability asynchronous says so); {', '.join(able)} can. Or leave [asynchronous] out"
            )
    for path, given, instead in (
        ("deadline", recipe.deadline is not None, "transport.deadline_seconds says for how long nothing may come"),
        ("cohort.over_selection", recipe.cohort.over_selection != 1.0, "asynchronous.buffer says how many are needed"),
    ):
        if given:
            raise RecipeError(
                f"{path} is for rounds that wait, and [asynchronous] ones do not: leave it out. {instead}"
            )
    if recipe.local.control != "none":
        raise RecipeError(
            f"local.control = {recipe.local.control!r} keeps the server's variates the mean of the clients' own, and "
            f"[asynchronous] discounts what comes late while the client keeps the whole of it: leave one of them out"
        )
    size = recipe.cohort.part.settings.get("size")
    if size is not None and settings.buffer > size:
        raise RecipeError(
            f"asynchronous.buffer ({settings.buffer}) is more than cohort.size ({size}): no more clients than that "
            f"begin from one version, so a step would wait for ever; raise cohort.size, or lower the buffer"
        )


def override_values(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A recipe's values with every ``"dotted.key=value"`` set; naming another part drops its settings."""
    return apply_overrides(values, overrides, SECTIONS)


def _sections() -> dict[str, NamedPart]:
    """The sections that name a part, as the recipe's types say."""
    found: dict[str, NamedPart] = {}
    for name, hint in get_type_hints(Recipe).items():
        if hint in (Part, Part | None, tuple[Part, ...]):
            found[name] = NamedPart(several=hint == tuple[Part, ...])
        elif (section := next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)) is not None:
            part = next((f for f in fields(section) if "part" in f.metadata), None)
            if part is not None:
                common = tuple(f.name for f in fields(section) if f is not part)
                found[name] = NamedPart(part.metadata["part"], common)
    return found


SECTIONS = _sections()
"""The sections of a recipe that name a part."""

SECTION_OF = {
    "dataset": "data",
    "model": "model",
    "sampler": "cohort",
    "runtime": "runtime",
    "transform": "transforms",
    "aggregator": "aggregator",
    "attack": "attack",
    "server_optimizer": "server",
    "transport": "transport",
    "download": "download",
    "deadline": "deadline",
    "journal": "journal",
    "index": "index",
    "tracker": "trackers",
}
"""The section in which a recipe names a part of each kind."""


def _read(name_or_path: str | Path, registry: Registry) -> tuple[str, str]:
    """The text of a recipe, and what to call it."""
    path = Path(name_or_path)
    offered = [offer.name for offer in registry.offers("recipe")]
    if name_or_path not in offered and (path / "recipe.toml").is_file():
        raise RecipeError(f"{path} is a folder; to train anew what it holds, give its recipe: {path / 'recipe.toml'}")
    if isinstance(name_or_path, str) and path.suffix != ".toml":
        offer = registry.get("recipe", name_or_path)
        return read_target(offer), f"the recipe {offer.name}"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {path} cannot be read ({error}); give a .toml file, or one of "
            f"{', '.join(offered) or 'no names'}{nearest(path.stem, offered)}"
        ) from error
    registry.use_folder(path.parent)
    return text, str(path)
