"""Plugins are found, kept out, isolated and listed; offers are strings until they are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtower.core.discovery import Gate, Source
from fedtower.core.errors import MissingDependency, PluginError, RecipeError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.offers import Kind, how_to_install
from fedtower.core.registry import Registry, discover
from fedtower.core.settings import Part

Register = Callable[[Registry], None]


def source(name: str, register: Register | None = None, distribution: str = "other", **attributes: Any) -> Source:
    """A plugin that registers what it is told to."""
    module = ModuleType(name)
    if register is not None:

        @hookimpl
        def fedtower_register(registry: Registry) -> None:
            register(registry)

        module.fedtower_register = fedtower_register  # type: ignore[attr-defined]
    for key, value in attributes.items():
        setattr(module, key, value)
    return Source(name, distribution, "1.2", f"{name}_module", lambda: module)


def kinds() -> Source:
    """The plugin that declares the kind."""

    @hookimpl
    def fedtower_kinds(registry: Registry) -> None:
        registry.declare(Kind("tool", "click:Command", "x:Y", "", "things to try the registry with"))

    return source("kinds", distribution="fedtower", fedtower_kinds=fedtower_kinds)


def offers(name: str, target: str = "tests_of_registry:Tool") -> Register:
    return lambda registry: registry.tool(name, target)


def statuses(registry: Registry) -> dict[str, str]:
    return {plugin.name: plugin.status for plugin in registry.plugins()}


def reason(registry: Registry, name: str) -> str:
    return next(plugin.reason for plugin in registry.plugins() if plugin.name == name)


def failing(error: BaseException) -> Register:
    def register(registry: Registry) -> None:
        registry.tool("half", "x:Half")
        raise error

    return register


def test_an_offer_says_who_made_it() -> None:
    registry = Registry([kinds(), source("one", offers("hammer"))])
    offer = registry.get("tool", "hammer")
    assert (offer.plugin, offer.distribution, offer.version) == ("one", "other", "1.2")
    assert offer.origin == "one of other 1.2"
    assert [plugin.offers for plugin in registry.plugins() if plugin.name == "one"] == [(offer,)]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("oops"), ImportError("no such thing"), SystemExit(3), SyntaxError("what")]
)
def test_a_plugin_that_cannot_be_imported_harms_nobody(error: BaseException) -> None:
    def load() -> object:
        raise error

    broken = Source("broken", "bad-package", "0.1", "broken", load)
    registry = Registry([kinds(), broken, source("good", offers("hammer"))])
    assert statuses(registry) == {"kinds": "active", "broken": "failed", "good": "active"}
    assert type(error).__name__ in reason(registry, "broken")
    assert [offer.name for offer in registry.offers("tool")] == ["hammer"]


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), SystemExit(3)])
def test_a_plugin_that_fails_half_way_leaves_nothing(error: BaseException) -> None:
    @hookimpl
    def stop_run(report: Any) -> str:
        return "never"

    registry = Registry([kinds(), source("broken", failing(error), stop_run=stop_run)])
    assert statuses(registry)["broken"] == "failed"
    assert not registry.offers("tool")
    assert not Hooks(registry.manager).implements("stop_run")


def test_a_misspelt_hook_fails_its_plugin_only() -> None:
    @hookimpl
    def round_finnished(report: Any) -> None: ...

    registry = Registry(
        [kinds(), source("typo", offers("nail"), round_finnished=round_finnished), source("good", offers("hammer"))]
    )
    assert statuses(registry) == {"kinds": "active", "typo": "failed", "good": "active"}
    assert "did you mean 'round_finished'" in reason(registry, "typo")
    assert [offer.name for offer in registry.offers("tool")] == ["hammer"]


def test_two_offers_of_one_name_fail_the_second_and_name_both() -> None:
    registry = Registry(
        [
            kinds(),
            source("first", offers("hammer", "a:First"), distribution="package-a"),
            source(
                "second", lambda r: [offers("nail")(r), offers("hammer", "b:Second")(r)][0], distribution="package-b"
            ),
        ]
    )
    assert statuses(registry) == {"kinds": "active", "first": "active", "second": "failed"}
    assert registry.get("tool", "hammer").target == "a:First"
    assert [offer.name for offer in registry.offers("tool")] == ["hammer"]
    for said in ("first of package-a 1.2", "a:First", "second of package-b 1.2", "b:Second", "rename the second"):
        assert said in reason(registry, "second")


def test_one_plugin_cannot_offer_a_name_twice() -> None:
    registry = Registry([kinds(), source("twice", lambda r: [offers("hammer")(r), offers("hammer")(r)][0])])
    assert statuses(registry)["twice"] == "failed"
    assert not registry.offers("tool")


def test_blocking_the_first_lets_the_second_in() -> None:
    registry = Registry(
        [kinds(), source("first", offers("hammer", "a:First")), source("second", offers("hammer", "b:Second"))]
    )
    registry.restrict(Gate("a test", block=("first",)))
    assert statuses(registry) == {"kinds": "active", "first": "blocked", "second": "active"}
    assert reason(registry, "first") == "blocked by a test"
    assert registry.get("tool", "hammer").target == "b:Second"


@pytest.mark.parametrize("name", ["mine", "my-package", "My_Package"])
def test_plugins_are_blocked_by_entry_point_or_distribution(name: str) -> None:
    registry = Registry([kinds(), source("mine", offers("hammer"), distribution="my_package")])
    registry.restrict(Gate("a test", block=(name,)))
    assert statuses(registry)["mine"] == "blocked"


def test_an_allow_list_keeps_out_other_peoples_plugins_and_never_ours() -> None:
    registry = Registry([kinds(), source("mine", offers("hammer")), source("yours", offers("nail"))])
    registry.restrict(Gate("a test", allow=("mine",)))
    assert statuses(registry) == {"kinds": "active", "mine": "active", "yours": "blocked"}
    assert reason(registry, "yours") == "not among those allowed by a test"


def test_every_gate_must_admit_a_plugin() -> None:
    registry = Registry([kinds(), source("mine", offers("hammer"))], [Gate("first", allow=("mine",))])
    registry.restrict(Gate("second", block=("mine",)))
    assert reason(registry, "mine") == "blocked by second"


def test_a_blocked_plugin_is_not_even_imported() -> None:
    def load() -> object:
        raise AssertionError("it was imported")

    registry = Registry([Source("mine", "other", "1", "mine", load)], [Gate("a test", block=("mine",))])
    assert statuses(registry) == {"mine": "blocked"}


def test_the_environment_allows_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTOWER_PLUGINS_BLOCK", "transform-clip, not-installed-here")
    registry = discover()
    assert statuses(registry)["transform-clip"] == "blocked"
    assert "FEDTOWER_PLUGINS_BLOCK" in reason(registry, "transform-clip")


@pytest.mark.parametrize(
    ("wanted", "status"), [(1, "active"), (2, "failed"), (0, "failed"), ("1", "failed"), (True, "failed")]
)
def test_the_spec_version_is_checked(wanted: object, status: str) -> None:
    registry = Registry([kinds(), source("one", offers("hammer"), fedtower_spec=wanted)])
    assert statuses(registry)["one"] == status
    if wanted == 2:
        assert "written for plugin spec 2, and this fedtower has spec 1; upgrade fedtower" in reason(registry, "one")


def test_a_kind_may_be_declared_by_a_later_plugin() -> None:
    registry = Registry([source("early", offers("hammer")), kinds()])
    assert statuses(registry) == {"early": "active", "kinds": "active"}


def test_a_kind_is_declared_once() -> None:
    again = kinds()
    registry = Registry([kinds(), Source("again", "other", "1", "again", again.load)])
    assert statuses(registry) == {"kinds": "active", "again": "failed"}


@pytest.mark.parametrize("target", ["no_colon", ":Name", "module:", ""])
def test_a_target_must_name_a_module_and_a_thing(target: str) -> None:
    registry = Registry([kinds(), source("one", offers("hammer", target))])
    assert 'must be "package.module:Name"' in reason(registry, "one")


def test_an_unknown_kind_names_the_nearest() -> None:
    registry = Registry([kinds(), source("one", lambda registry: registry.tol("hammer", "a:B"))])
    assert "did you mean 'tool'" in reason(registry, "one")
    with pytest.raises(PluginError, match="did you mean 'tool'"):
        registry.kind("tol")


def test_an_unknown_name_names_the_nearest_and_what_was_lost() -> None:
    registry = Registry([kinds(), source("one", offers("hammer")), source("hamster", failing(ValueError("no wheel")))])
    with pytest.raises(RecipeError, match=r"no plugin offers the tool 'hamer' \(did you mean 'hammer'\?\)"):
        registry.get("tool", "hamer")
    with pytest.raises(RecipeError, match="the plugin hamster of other is failed: ValueError: no wheel"):
        registry.get("tool", "hamster")


def test_the_same_name_in_two_distributions_is_two_plugins() -> None:
    registry = Registry(
        [kinds(), source("plugin", offers("hammer"), "package-a"), source("plugin", offers("nail"), "package-b")]
    )
    assert [offer.name for offer in registry.offers("tool")] == ["hammer", "nail"]


def test_this_process_can_offer_too_and_stays_when_the_rest_is_opened_again() -> None:
    registry = Registry([kinds()])
    registry.tool("hammer", "a:A")
    with pytest.raises(PluginError, match="two plugins offer the tool 'hammer'"):
        registry.tool("hammer", "a:B")
    registry.restrict(Gate("a test", allow=("kinds",)))
    assert registry.get("tool", "hammer").origin == "this process"


def test_what_is_wrong_with_a_target_is_said_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_grpc.py").write_text("import grpc_that_is_not_there\n")
    (tmp_path / "wants_itself.py").write_text("import wants_itself.missing\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("Median = 1\n")
    (tmp_path / "class_without_methods.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = discover()
    for name in ("wants_grpc", "wants_itself", "breaks", "empty", "class_without_methods"):
        registry.sampler(name, f"{name}:{'Medain' if name == 'empty' else 'Thing'}")
    with pytest.raises(MissingDependency, match="needs grpc_that_is_not_there, which is not installed"):
        registry.load("sampler", "wants_grpc")
    with pytest.raises(PluginError, match="cannot be imported from wants_itself:Thing"):
        registry.load("sampler", "wants_itself")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        registry.load("sampler", "breaks")
    with pytest.raises(PluginError, match=r"empty has no 'Medain' \(did you mean 'Median'\?\)"):
        registry.load("sampler", "empty")
    with pytest.raises(PluginError, match=r"lacks sample; a sampler needs what fedtower\.core\.cohort:Sampler has"):
        registry.load("sampler", "class_without_methods")


def test_the_extra_is_read_from_the_distributions_metadata() -> None:
    for missing in ("torch", "faiss"):
        assert how_to_install(missing, "fedtower").startswith(
            "`pip install 'fedtower[cloud]'` brings it where there is"
        )
    device = "`pip install 'fedtower[device]'` brings it; `fedtower doctor` has the command for this machine"
    assert how_to_install("grpc", "fedtower") == device
    assert "often `pip install unheard_of`" in how_to_install("unheard_of", "fedtower")


def test_where_there_is_no_cuda_another_command_brings_torch() -> None:
    said = how_to_install("torch", "fedtower")
    assert "on a CPU `pip install -r requirements/cpu.txt`" in said
    assert "`fedtower doctor`" in said
    assert (Path(__file__).parents[2] / "requirements" / "cpu.txt").is_file()


def test_a_part_is_made_of_its_settings() -> None:
    sampler = discover().make("sampler", Part("uniform", {"size": 4}), path="cohort")
    assert sampler.size == 4
    with pytest.raises(RecipeError, match=r"cohort\.sise is not a setting of Uniform"):
        discover().make("sampler", Part("uniform", {"sise": 4}), path="cohort")


def test_a_projects_own_plugins_count_and_can_be_broken(tmp_path: Path) -> None:
    (tmp_path / "fedtower_plugins.py").write_text("1 / 0\n")
    registry = discover(folder=tmp_path)
    assert statuses(registry)["fedtower_plugins.py"] == "failed"
    assert "ZeroDivisionError" in reason(registry, "fedtower_plugins.py")
    assert "fedtower_plugins" not in sys.modules
    assert registry.get("sampler", "uniform").name == "uniform"


def test_discovery_imports_no_heavy_library() -> None:
    program = (
        "import sys; from fedtower.core.registry import discover; discover();"
        "print([name for name in ('torch', 'torchrec', 'pandas', 'click', 'rich', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
