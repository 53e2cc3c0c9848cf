"""Overrides: ``aggregator.name=median`` on top of a recipe's values."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedtower.core.errors import RecipeError


@dataclass(frozen=True)
class NamedPart:
    """A section that names a part: the key that does, the keys that are not the part's, and if there are several."""

    key: str = "name"
    common: tuple[str, ...] = ()
    several: bool = False


def apply_overrides(
    values: Mapping[str, Any], overrides: Iterable[str], sections: Mapping[str, NamedPart]
) -> dict[str, Any]:
    """``values`` with every ``"dotted.key=value"`` set; a value is TOML, or else a string.

    Naming another part drops the settings of the one it replaces, since they are not the new one's.

    >>> apply_overrides({"transforms": [{"name": "clip", "norm": 1.0}]}, ["transforms.0.norm=2"], {})
    {'transforms': [{'name': 'clip', 'norm': 2}]}
    >>> sections = {"server": NamedPart("optimizer", common=("lr",))}
    >>> apply_overrides({"server": {"optimizer": "adam", "beta1": 0.9, "lr": 0.1}}, ["server.optimizer=sgd"], sections)
    {'server': {'lr': 0.1, 'optimizer': 'sgd'}}
    """
    changed: dict[str, Any] = deepcopy(dict(values))
    # Names first: a setting is of the part that is named in the end, in whatever order the two were typed.
    parsed = [(keys, value, _named_part(keys, sections)) for keys, value in map(_split, overrides)]
    for keys, value, named in sorted(parsed, key=lambda override: override[2] is None):
        _set(changed, keys, value, named)
    return changed


def _split(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"an override is key=value, such as aggregator.name=median, but this is {override!r}")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return keys, parsed["value"] if set(parsed) == {"value"} else text.strip()


def _set(values: dict[str, Any], keys: list[str], value: Any, named: NamedPart | None) -> None:
    place: Any = values
    for depth, (key, following) in enumerate(pairwise(keys), start=1):
        place = _enter(place, key, following, ".".join(keys[:depth]))
    last, path = keys[-1], ".".join(keys)
    if isinstance(place, list):
        _enter(place, last, "", path)
        place[int(last)] = value
        return
    if not isinstance(place, dict):
        raise RecipeError(f"{path} cannot be set: {'.'.join(keys[:-1])} is {place!r}, which has nothing inside")
    if named is not None and place.get(last) != value:
        kept = {name: place[name] for name in place if name in named.common}
        place.clear()
        place.update(kept)
    place[last] = value


def _enter(place: Any, key: str, following: str, path: str) -> Any:
    """What is at ``key``, made if it is not there: an entry may be appended to a list, and a section begun."""
    if isinstance(place, list):
        if not key.isdecimal() or int(key) > len(place):
            raise RecipeError(f"{path} is not there: the list has {len(place)} entries, from 0 on")
        if int(key) == len(place):
            place.append({})
        return place[int(key)]
    if isinstance(place, dict):
        return place.setdefault(key, [] if following.isdecimal() else {})
    raise RecipeError(f"{path} is not there: what should hold it is {place!r}")


def _named_part(keys: list[str], sections: Mapping[str, NamedPart]) -> NamedPart | None:
    """The section whose part these keys name, if they name one."""
    section = sections.get(keys[0])
    if section is None or keys[-1] != section.key or len(keys) != (3 if section.several else 2):
        return None
    return section
