"""The four families of hooks: who is asked, who wins, who wraps whom, and what a failure costs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from fedtower.core.errors import PluginError
from fedtower.core.hooks import FAMILIES, Hooks, hook_names, hookimpl
from fedtower.core.testing import examples
from fedtower.core.testing.observer import a_run


class Note:
    """Writes down the rounds it sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    @hookimpl
    def round_finished(self, report: Any) -> None:
        self.seen.append(report.round)


class Broken:
    @hookimpl
    def round_finished(self, report: Any) -> None:
        raise ZeroDivisionError("no luck")


def observe(hooks: Hooks, *rounds: int) -> None:
    for number in rounds:
        hooks.observe("round_finished", report=SimpleNamespace(round=number))


def test_a_hook_may_take_fewer_arguments_than_it_is_offered() -> None:
    class Sparing:
        def __init__(self) -> None:
            self.reasons: list[str] = []

        @hookimpl
        def client_dropped(self, reason: str) -> None:
            self.reasons.append(reason)

    hooks, sparing = Hooks.none(), Sparing()
    hooks.add(sparing, "sparing")
    hooks.observe("client_dropped", round=1, clients=[1], reason="late")
    assert sparing.reasons == ["late"]


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_failing_observer_is_reported_once_and_stops_nobody(broken_first: bool) -> None:
    reports: list[str] = []
    hooks, note = Hooks.none(reports.append), Note()
    plugins = [(Broken(), "broken"), (note, "note")]
    for plugin, name in plugins if broken_first else plugins[::-1]:
        hooks.add(plugin, name)
    observe(hooks, 1, 2, 3)
    assert note.seen == [1, 2, 3]
    (report,) = reports
    assert "'broken' failed in round_finished: ZeroDivisionError: no luck" in report


def test_a_failure_is_a_warning_when_nobody_collects_them() -> None:
    hooks = Hooks.none()
    hooks.add(Broken(), "broken")
    with pytest.warns(RuntimeWarning, match="no luck"):
        observe(hooks, 1)


def test_a_mistake_of_the_caller_is_not_blamed_on_the_observer() -> None:
    hooks = Hooks.none()
    hooks.add(Note(), "note")
    with pytest.raises(KeyError):
        hooks.observe("round_finished", rapport=1)


def test_the_first_answer_decides() -> None:
    class Never:
        @hookimpl
        def stop_run(self) -> None:
            return None

    class Always:
        @hookimpl
        def stop_run(self, report: Any) -> str:
            return f"enough after {report.round}"

    hooks = Hooks.none()
    assert hooks.decide("stop_run", report=SimpleNamespace(round=4)) is None
    hooks.add(Always(), "always")
    hooks.add(Never(), "never")
    assert hooks.decide("stop_run", report=SimpleNamespace(round=4)) == "enough after 4"


def test_a_decision_that_fails_is_not_swallowed() -> None:
    class Undecided:
        @hookimpl
        def round_deadline(self, round: int) -> float:
            raise ZeroDivisionError

    hooks = Hooks.none()
    hooks.add(Undecided(), "undecided")
    with pytest.raises(ZeroDivisionError):
        hooks.decide("round_deadline", round=1)


class Wrapper:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    @hookimpl(wrapper=True)
    def aggregate(self, round: int) -> Generator[None, Any, Any]:
        self.log.append(f"{self.name} in {round}")
        result = yield
        self.log.append(f"{self.name} out")
        return f"{self.name}({result})"


def test_wrappers_stand_around_the_action_the_last_outermost() -> None:
    log: list[str] = []
    hooks = Hooks.none()
    assert hooks.wrap("aggregate", lambda: "plain", round=1) == "plain"
    hooks.add(Wrapper("inner", log), "inner")
    hooks.add(Wrapper("outer", log), "outer")

    def action() -> str:
        log.append("action")
        return "total"

    assert hooks.wrap("aggregate", action, round=7) == "outer(inner(total))"
    assert log == ["outer in 7", "inner in 7", "action", "inner out", "outer out"]


def test_a_wrapped_action_that_fails_fails() -> None:
    hooks = Hooks.none()
    hooks.add(Wrapper("one", []), "one")

    def action() -> str:
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        hooks.wrap("aggregate", action, round=1)


def test_a_misspelt_hook_is_refused_with_the_nearest() -> None:
    class Misspelt:
        @hookimpl
        def round_finnished(self, report: Any) -> None: ...

    with pytest.raises(PluginError, match="did you mean 'round_finished'"):
        Hooks.none().add(Misspelt(), "misspelt")


def test_an_argument_that_a_hook_does_not_have_is_refused_and_nothing_stays() -> None:
    class Greedy:
        @hookimpl
        def evaluated(self, round: int) -> None: ...

        @hookimpl
        def round_finished(self, report: Any, model: Any) -> None: ...

    hooks = Hooks.none()
    with pytest.raises(PluginError, match="model"):
        hooks.add(Greedy(), "greedy")
    assert not hooks.implements("evaluated")


def test_a_wrapper_must_be_marked_as_one() -> None:
    class Plain:
        @hookimpl
        def aggregate(self, round: int) -> None: ...

    with pytest.raises(PluginError, match="wrapper=True"):
        Hooks.none().add(Plain(), "plain")


def test_an_observer_cannot_be_a_wrapper() -> None:
    class Odd:
        @hookimpl(wrapper=True)
        def round_finished(self, report: Any) -> Generator[None, None, None]:
            yield

    with pytest.raises(PluginError, match="a plain @hookimpl"):
        Hooks.none().add(Odd(), "odd")


def test_a_function_may_have_a_name_of_its_own() -> None:
    class Renamed:
        @hookimpl(specname="round_deadline")
        def soon(self, round: int) -> float:
            return 60.0

    hooks = Hooks.none()
    hooks.add(Renamed(), "renamed")
    assert hooks.decide("round_deadline", round=1) == 60.0


def test_no_hook_is_in_two_families() -> None:
    names = [name for family in FAMILIES for name in hook_names(family)]
    assert len(names) == len(set(names))


def test_the_promises_call_every_observing_hook_with_every_argument(tmp_path: Any) -> None:
    manager = Hooks.none().manager
    shown = dict(a_run(tmp_path))
    assert set(shown) == set(hook_names("observe"))
    for name, values in shown.items():
        spec = getattr(manager.hook, name).spec
        assert set(values) == set(spec.argnames), name


def test_the_example_evaluation_has_the_fields_of_the_real_one() -> None:
    from fedtower.recsys.evaluation import Evaluation

    assert [f.name for f in fields(examples.Evaluation)] == [f.name for f in fields(Evaluation)]
