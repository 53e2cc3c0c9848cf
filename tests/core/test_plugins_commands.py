"""``fedtower plugins``: list, show and check; ``new`` is tried for every kind in tests/third_party."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedtower.core.cli import call
from fedtower.core.testing.verdict import Claim, Verdict, judge


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with plugins of its own: an aggregator that keeps its promises, one that does not, and hooks."""
    (tmp_path / "fedtower_plugins.py").write_text(
        "from fedtower.core.hooks import hookimpl\n"
        "from fedtower.plugins.aggregators.fedavg import FedAvg\n"
        "class Mean(FedAvg):\n"
        "    '''A mean like any other.'''\n"
        "class Last:\n"
        "    def fold(self, blocks, state):\n"
        "        return [block.slice(len(block) - 1, len(block)) for block in blocks][-1], state\n"
        "@hookimpl\n"
        "def fedtower_register(registry):\n"
        "    registry.aggregator('my_mean', 'fedtower_plugins:Mean', summary='mine', capabilities={'rows': True})\n"
        "    registry.aggregator('my_last', 'fedtower_plugins:Last')\n"
        "@hookimpl\n"
        "def stop_run(report):\n"
        "    '''Never.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_list_has_every_part_once_under_its_kind(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  ") and line.split()]
    assert names.count("my_mean") == names.count("fedavg") == 1
    kinds = [line.strip() for line in lines if line and not line.startswith(" ")]
    assert kinds.index("aggregator") < kinds.index("hooks")
    assert any("fedtower_plugins.py" in line and "active" in line for line in lines)


def test_the_list_can_be_of_one_kind(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "list", "--kind", "aggregator"]) == 0
    said = capsys.readouterr().out
    assert "my_mean" in said
    assert "uniform" not in said
    assert call(["plugins", "list", "--kind", "agregator"]) == 4
    assert "did you mean 'aggregator'" in capsys.readouterr().err


def test_a_failed_plugin_is_listed_with_its_reason(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "fedtower_plugins.py").write_text("raise RuntimeError('the reason why')\n")
    assert call(["plugins", "list"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is failed: RuntimeError: the reason why" in said
    assert call(["plugins", "show", "fedtower_plugins.py"]) == 4
    assert "the reason why" in " ".join(capsys.readouterr().err.split())


def test_the_list_is_json_on_request(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "list", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    mine = next(part for part in said["parts"] if part["name"] == "my_mean")
    assert (mine["kind"], mine["status"], mine["summary"], mine["capabilities"]) == (
        "aggregator",
        "active",
        "mine",
        {"rows": True},
    )
    plugin = next(plugin for plugin in said["plugins"] if plugin["name"] == "fedtower_plugins.py")
    assert plugin["hooks"] == ["stop_run"]
    assert plugin["offers"] == ["aggregator my_mean", "aggregator my_last"]


def test_show_says_all_there_is_to_know(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # a temporary folder's path is long, and is folded where it does not fit
    assert call(["plugins", "show", "my_mean"]) == 0
    said = capsys.readouterr().out
    for wanted in (
        "aggregator my_mean - mine",
        "A mean like any other.",
        "fedtower_plugins.py:3",
        "fedtower.core.aggregation:Aggregator",
        "can: rows",
        '"examples" or "equal"',
        '"examples"',
        '[aggregator]\nname = "my_mean"',
    ):
        assert wanted in said, wanted


def test_show_marks_what_is_required_and_gives_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "show", "clip"]) == 0
    said = capsys.readouterr().out
    assert "(required)" in said
    assert '[[transforms]]\nname = "clip"\nnorm = 1.0' in said
    assert "dense parameters and rows together" in " ".join(said.split()), "a docstring's first paragraph, whole"


def test_show_knows_recipes_hooks_and_the_near_miss(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "show", "dssm-synthetic"]) == 0
    assert 'name = "dssm-synthetic"' in capsys.readouterr().out
    assert call(["plugins", "show", "fedtower_plugins.py"]) == 0
    said = capsys.readouterr().out
    assert "hooks of fedtower_plugins.py" in said
    assert "stop_run: Never." in said
    assert call(["plugins", "show", "fedagv"]) == 4
    assert "did you mean 'fedavg'" in capsys.readouterr().err


def test_check_says_which_promises_are_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "check", "my_mean"]) == 0
    said = capsys.readouterr().out
    assert "kept    a single client is returned as it is\n" in said
    assert "BROKEN" not in said
    assert said.splitlines()[-1] == "aggregator my_mean: 28 of 28 promises kept"


def test_check_fails_when_a_promise_is_broken(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "check", "my_last"]) == 4
    said = capsys.readouterr().out
    assert "BROKEN  the order of arrival changes no bit" in said
    assert "kept    a single client is returned as it is" in said


def test_check_of_a_plugin_checks_its_parts_and_its_hooks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plugins", "check", "fedtower_plugins.py"]) == 4
    last = [line for line in capsys.readouterr().out.splitlines() if "promises kept" in line]
    assert last[0].startswith("aggregator my_mean: 28 of 28")
    assert last[-1] == "hooks of fedtower_plugins.py: 7 of 7 promises kept"


def test_a_part_that_cannot_be_imported_is_a_broken_promise(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "fedtower_plugins.py"
    file.write_text(file.read_text().replace("fedtower_plugins:Last", "not_there_at_all:Last"))
    assert call(["plugins", "check", "my_last"]) == 4
    assert "not_there_at_all" in capsys.readouterr().out


def test_a_part_that_cannot_be_tried_says_what_is_wanted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "fedtower_plugins.py"
    settings = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Last:\n    bound: float\n"
    file.write_text(file.read_text().replace("class Last:\n", settings))
    assert call(["plugins", "check", "my_last"]) == 4
    assert "capabilities={'example': {'bound': ...}}" in " ".join(capsys.readouterr().err.split())


def test_a_broken_promise_says_what_was_compared(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "fedtower_plugins.py"
    weightless = "        total, state = FedAvg().fold(blocks, state)\n"
    weightless += (
        "        total.rows.update((name, replace(rows, row_weights=None)) for name, rows in total.rows.items())\n"
    )
    weightless += "        return total, state\n"
    source = re.sub(r"        return \[block.*\n", weightless, file.read_text())
    file.write_text("from dataclasses import replace\n" + source)
    assert call(["plugins", "check", "my_last"]) == 4
    assert "assert None is not None" in capsys.readouterr().out


def test_check_without_pytest_says_so(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtower.core.testing.verdict.find_spec", lambda name: None)
    assert call(["plugins", "check", "my_mean"]) == 7
    assert "pip install 'fedtower[test]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["agregator", "mine"], 4, "a plugin of kind 'agregator' cannot be begun (did you mean 'aggregator'?)"),
        (["aggregator", "fedavg"], 4, "offers the aggregator 'fedavg' already"),
        (["aggregator", "numpy"], 4, "a module 'numpy' can be imported already"),
        (["aggregator", "2fast"], 2, "must be letters, digits, _ and -"),
        (["aggregator", "class"], 2, "must be letters, digits, _ and -"),
        (["aggregator", "../out"], 2, "must be letters, digits, _ and -"),
        (["aggregator", "taken"], 6, "taken is there already"),
    ],
)
def test_new_refuses_what_would_not_work(
    words: list[str], code: int, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "taken").mkdir()
    before = sorted(project.rglob("*"))
    assert call(["plugins", "new", *words]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path for path in sorted(project.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


def test_a_promise_that_does_not_apply_is_not_counted_and_one_that_is_skipped_is_broken() -> None:
    part = (
        "type('TestPart', (), {"
        "'test_kept': lambda self: None,"
        "'test_of_others': lambda self: __import__('fedtower.core.testing.promises', fromlist=['']).not_promised('no'),"
        "'test_skipped': lambda self: __import__('pytest').skip('not today')})"
    )
    assert judge(Claim("part", part)) == [Verdict("kept", True), Verdict("skipped", False, "not today")]
