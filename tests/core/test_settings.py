"""Settings are strict: a key, a type or a missing value is refused where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.settings import Part, build, describe, plain, settings_of


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Everything:
    rate: float = field(metadata={"help": "how fast"})
    count: int = 3
    on: bool = False
    word: str = "a"
    place: Path = Path("here")
    choice: Literal["mean", "sum"] = "mean"
    lengths: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "x")
    free: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: float | None = None
    either: int | str = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Section:
    part: Part = field(metadata={"part": "optimizer"})
    lr: float = 1.0


def made(**values: Any) -> Everything:
    return build(Everything, {"rate": 1.0, **values}, path="a.b")


def test_what_fits_is_taken() -> None:
    built = made(
        rate=2,
        count=4,
        on=True,
        place="there",
        choice="sum",
        lengths=[10, 20],
        pair=[2, "y"],
        free={"x": 1},
        inner={"depth": 5},
        maybe=7,
        either="word",
        parts=[{"name": "clip", "norm": 2}],
    )
    assert built == Everything(
        rate=2.0,
        count=4,
        on=True,
        place=Path("there"),
        choice="sum",
        lengths=(10, 20),
        pair=(2, "y"),
        free={"x": 1.0},
        inner=Inner(5),
        maybe=7.0,
        either="word",
        parts=(Part("clip", {"norm": 2}),),
    )
    assert isinstance(built.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 1}, r"a\.b\.cuont is not a setting of Everything \(did you mean 'count'\?\)"),
        ({"count": 1.5}, r"a\.b\.count must be int, but is 1\.5 \(float\)"),
        ({"count": True}, r"a\.b\.count must be int, but is True \(bool\)"),
        ({"rate": "fast"}, r"a\.b\.rate must be float, but is 'fast' \(str\)"),
        ({"rate": True}, r"a\.b\.rate must be float"),
        ({"rate": float("nan")}, r"a\.b\.rate must be a finite number, but is nan"),
        ({"maybe": float("inf")}, r"a\.b\.maybe must be a finite number, but is inf"),
        ({"free": {"x": -float("inf")}}, r"a\.b\.free\.x must be a finite number, but is -inf"),
        ({"on": 1}, r"a\.b\.on must be bool"),
        ({"word": 1}, r"a\.b\.word must be str"),
        ({"choice": "maen"}, r"a\.b\.choice must be \"mean\" or \"sum\", but is 'maen' \(did you mean 'mean'\?\)"),
        ({"lengths": 10}, r"a\.b\.lengths must be a list of int, but is 10 \(int\)"),
        ({"lengths": [1, "2"]}, r"a\.b\.lengths\.1 must be int"),
        ({"pair": [1]}, r"a\.b\.pair must be a list of 2: int, str, but has 1 entries"),
        ({"free": {"x": "y"}}, r"a\.b\.free\.x must be float"),
        ({"inner": {"deph": 1}}, r"a\.b\.inner\.deph is not a setting of Inner \(did you mean 'depth'\?\)"),
        ({"inner": 1}, r"a\.b\.inner must be a table"),
        ({"maybe": "x"}, r"a\.b\.maybe must be float"),
        ({"either": 1.5}, r"a\.b\.either must be int or str"),
        ({"parts": [{"norm": 2}]}, r"a\.b\.parts\.0 needs name"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_stands(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(**values)


def test_a_missing_setting_is_named_with_its_type_and_help() -> None:
    with pytest.raises(RecipeError, match=r"a\.rate is missing: float, how fast"):
        build(Everything, {}, path="a")


def test_a_section_splits_its_own_keys_from_its_parts() -> None:
    built = build(Section, {"optimizer": "adam", "lr": 2, "beta": 0.5}, path="server")
    assert built == Section(Part("adam", {"beta": 0.5}), lr=2.0)
    assert plain(built) == {"optimizer": "adam", "beta": 0.5, "lr": 2.0}


def test_a_section_without_a_part_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'server needs optimizer = "\.\.\.", the name of a part'):
        build(Section, {"lr": 2}, path="server")
    with pytest.raises(RecipeError, match=r"but it is 3 \(int\)"):
        build(Section, {"optimizer": 3}, path="server")


def test_a_class_without_settings_takes_none() -> None:
    class Bare:
        pass

    assert isinstance(build(Bare, {}, path="x"), Bare)
    with pytest.raises(RecipeError, match="Bare has no settings, but size was given"):
        build(Bare, {"size": 1}, path="x")


def test_a_parts_own_check_is_a_recipe_error() -> None:
    @dataclass(frozen=True)
    class Positive:
        size: int

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("size must be positive")

    with pytest.raises(RecipeError, match="cohort: size must be positive"):
        build(Positive, {"size": 0}, path="cohort")


def test_settings_are_described_for_a_reader() -> None:
    described = {setting.name: setting for setting in describe(Everything)}
    assert described["rate"].required
    assert described["rate"].help == "how fast"
    assert described["choice"].type == '"mean" or "sum"'
    assert described["lengths"].default == "[1, 2]"
    assert described["maybe"].default == "none"
    assert described["on"].default == "false"


def test_the_settings_of_a_part_can_be_given_again() -> None:
    built = made(lengths=[5], maybe=1.5)
    assert build(Everything, settings_of(built), path="") == built
