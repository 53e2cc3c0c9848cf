"""Settings: a part's frozen dataclass, built strictly from a mapping such as a section of a recipe.

A part is a class; its settings are its dataclass fields, and a field's help is in its metadata:

    @dataclass(frozen=True)
    class Clip:
        norm: float = field(metadata={"help": "the largest L2 norm of one client's deltas"})
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from fedtower.core.errors import PluginError, RecipeError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One part of a run: which one, by name, and its settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, key: str = "name") -> dict[str, Any]:
        """The section that this part is written as."""
        return {key: self.name, **plain(self.settings)}


@dataclass(frozen=True)
class Setting:
    """One setting, described for a reader."""

    name: str
    type: str
    default: str | None
    help: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is None


def describe(cls: type) -> list[Setting]:
    """The settings of a part, in order; none when the class is not a dataclass.

    >>> describe(Part)[0]
    Setting(name='name', type='str', default=None, help='')
    """
    if not dataclasses.is_dataclass(cls):
        return []
    hints = _hints(cls)
    return [
        Setting(f.name, type_name(hints[f.name]), _default(f), str(f.metadata.get("help", "")))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def build(cls: type[T], values: Mapping[str, Any], *, path: str) -> T:
    """An instance of ``cls`` with these settings; ``path`` is where they stand in the recipe, for messages.

    A whole number serves as a float, a list as a tuple, a string as a path. Nothing else is converted.

    Raises:
        RecipeError: a key that ``cls`` does not have, a missing one, a value of the wrong type, or a number that is
            none (TOML can write ``nan`` and ``inf``).
    """
    if not dataclasses.is_dataclass(cls):
        if values:
            raise RecipeError(f"{path}: {cls.__name__} has no settings, but {_listed(values)} was given; remove it")
        return cls()
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    part_field = next((f for f in fields.values() if f.metadata.get("part")), None)
    known = [name for name in fields if part_field is None or name != part_field.name]
    hints = _hints(cls)
    given = {name: convert(values[name], hints[name], path=_join(path, name)) for name in known if name in values}
    rest = {name: value for name, value in values.items() if name not in known}
    if part_field is not None:
        given[part_field.name] = build_part(rest, path=path, key=str(part_field.metadata["part"]))
    elif rest:
        unknown = next(iter(rest))
        raise RecipeError(
            f"{_join(path, unknown)} is not a setting of {cls.__name__}{nearest(unknown, known)}; "
            f"it has {', '.join(known) or 'none'}"
        )
    missing = [f for name, f in fields.items() if name not in given and _default(f) is None]
    if missing:
        raise RecipeError("; ".join(_missing(f, hints[f.name], path) for f in missing))
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:  # a part's own check in __post_init__
        raise RecipeError(f"{path}: {error}") from error


def build_part(values: Mapping[str, Any], *, path: str, key: str = "name") -> Part:
    """The part that a section names under ``key``; all other keys are its settings.

    >>> build_part({"name": "clip", "norm": 1.0}, path="transforms.0")
    Part(name='clip', settings={'norm': 1.0})
    """
    name = values.get(key)
    if not isinstance(name, str):
        got = f", but it is {_shown(name)}" if key in values else ""
        raise RecipeError(f'{path} needs {key} = "...", the name of a part{got}')
    return Part(name, {other: value for other, value in values.items() if other != key})


def convert(value: Any, hint: Any, *, path: str) -> Any:
    """``value`` as the type ``hint`` says, or a :class:`RecipeError` that names ``path``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, arguments, path)
    if origin is Literal:
        # True == 1 in Python, so the type counts too.
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            close = nearest(value, [str(choice) for choice in arguments]) if isinstance(value, str) else ""
            raise RecipeError(f"{path} must be {type_name(hint)}, but is {value!r}{close}")
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _convert_items(value, hint, path)
    if isinstance(value, Mapping):
        if hint is Part:
            return build_part(value, path=path)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return build(hint, value, path=path)
        if origin is not None and issubclass(origin, Mapping):
            inner = arguments[1] if arguments else Any
            return {key: convert(item, inner, path=_join(path, str(key))) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{path} must be a finite number, but is {value}")
    if hint is Any or (
        isinstance(hint, type) and isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
    ):
        return value
    raise RecipeError(f"{path} must be {type_name(hint)}, but is {_shown(value)}")


def _convert_union(value: Any, hint: Any, choices: tuple[Any, ...], path: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not types.NoneType)
    if len(choices) == 1:
        return convert(value, choices[0], path=path)
    # An exact type first, so that int | float keeps 1 an integer.
    for choice in sorted(choices, key=lambda choice: choice is not type(value)):
        try:
            return convert(value, choice, path=path)
        except RecipeError:
            continue
    raise RecipeError(f"{path} must be {type_name(hint)}, but is {_shown(value)}")


def _convert_items(value: Sequence[Any], hint: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
        if len(value) != len(arguments):
            raise RecipeError(f"{path} must be {type_name(hint)}, but has {len(value)} entries")
        inner = list(arguments)
    else:
        inner = [arguments[0]] * len(value)
    return origin(
        convert(item, each, path=_join(path, str(i))) for i, (item, each) in enumerate(zip(value, inner, strict=True))
    )


def type_name(hint: Any) -> str:
    """A type as a recipe's author reads it.

    >>> type_name(Literal["mean", "sum"]), type_name(tuple[int, ...]), type_name(float | None)
    ('"mean" or "sum"', 'a list of int', 'float, optional')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        names = " or ".join(type_name(choice) for choice in arguments if choice is not types.NoneType)
        return f"{names}, optional" if types.NoneType in arguments else names
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(type_name, arguments))}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    if hint is Part or dataclasses.is_dataclass(hint):
        return "a table"
    return "any value" if hint is Any else str(getattr(hint, "__name__", hint))


def settings_of(part: object) -> dict[str, Any]:
    """The settings of a part that has been built, as what TOML can hold."""
    if not dataclasses.is_dataclass(part):
        return {}
    given = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    flat: dict[str, Any] = plain(given)
    return flat


def plain(value: Any) -> Any:
    """``value`` as what TOML can hold: dataclasses as tables, tuples as lists, paths as strings, no ``None``.

    >>> plain({"k": (10, 20), "folder": None})
    {'k': [10, 20]}
    """
    if isinstance(value, Part):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            flat |= item.to_dict(f.metadata["part"]) if f.metadata.get("part") else plain({f.name: item})
        return flat
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise PluginError(
            f"the types of the settings of {cls.__module__}.{cls.__qualname__} cannot be read ({error}); "
            "import them outside of `if TYPE_CHECKING`"
        ) from error


def _default(f: dataclasses.Field[Any]) -> str | None:
    if f.default is not MISSING:
        return toml_value(f.default)
    if f.default_factory is not MISSING:
        return toml_value(f.default_factory())
    return None


def toml_value(value: Any) -> str:
    """A plain value as TOML writes it; ``none`` for ``None``, which TOML cannot.

    >>> toml_value((10, 20)), toml_value(True), toml_value("mean")
    ('[10, 20]', 'true', '"mean"')
    """
    # JSON's strings, numbers, booleans and lists are written like TOML's.
    return "none" if value is None else json.dumps(plain(value), default=str)


def _missing(f: dataclasses.Field[Any], hint: Any, path: str) -> str:
    help_text = f.metadata.get("help")
    return f"{_join(path, f.name)} is missing: {type_name(hint)}" + (f", {help_text}" if help_text else "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(values)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
