"""The report: it needs nothing from outside, shows what the run reached, and puts several runs side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fedtower.core.errors import CheckpointError, StorageError
from fedtower.recsys.chart import Line, line_chart, thin, ticks
from fedtower.recsys.report import report_command, write_report
from fedtower.recsys.runlog import RunLog

MakeRun = Callable[..., Path]

FULL, SAMPLED = "full ranking", "sampled, 99 negatives"
POPULAR = {SAMPLED: {"HR@10": 0.4521, "NDCG@10": 0.2532}, FULL: {"HR@10": 0.0414, "NDCG@10": 0.0204}}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes run folders as a run of so many rounds leaves them."""

    def make(
        name: str, *, mode: str = "simulated", rounds: int = 40, until: int | None = None, better: float = 0.0
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        log = RunLog(folder)
        log.append("run_started", name="dssm-small", mode=mode, seed=7, rounds=rounds)
        card = {"name": "small <data>", "users": 6040, "items": 3706, "interactions": 1000209, "density": 0.0447}
        card |= {"first_time": "2000-04-25T23:05:32+00:00", "extra": {"licence": "R&D only"}}
        log.append("data", card=card, headline=["HR@10", "NDCG@10"])
        log.append("model", shared_bytes=150_000, table_bytes=850_000 if mode == "simulated" else 0)
        for number in range(1, (until or rounds) + 1):
            costs = {"clients": 200, "dropped": 2, "bytes_up": 20_000_000, "bytes_down": 50_000_000, "seconds": 0.25}
            log.append("round", round=number, loss=5.0 - number / rounds - better, **costs)
            if number % 10 == 0:
                figures = {"HR@10": 0.5 + number / 1000 + better, "NDCG@10": 0.3, "MRR": 0.2}
                log.append(
                    "evaluation", round=number, role="validation", label=SAMPLED, metrics=figures, cases=9, users=9
                )
        log.append("warning", message="<script>alert(1)</script>")
        if until is None:
            for label, base in POPULAR.items():
                log.append("baseline", name="ItemPop", role="test", label=label, metrics=base)
                reached = {metric: value * 1.5 + better for metric, value in base.items()}
                log.append(
                    "evaluation", round=rounds, role="test", label=label, metrics=reached, cases=6040, users=6040
                )
            log.append("run_finished", **log.record().summary())
            (folder / "summary.json").write_text(json.dumps(log.record().summary()), "utf-8")
        (folder / "recipe.toml").write_text('name = "dssm-small"\n# a < b & "c"\n', "utf-8")
        plugin = {"name": "broken", "distribution": "somebody-s", "version": "9", "status": "failed"}
        environment = {"fedtower": "0.1.0", "numpy": "2.4.6", "seed": 7, "plugins": [plugin]}
        (folder / "environment.json").write_text(json.dumps(environment), "utf-8")
        return folder

    return make


class Page(HTMLParser):
    """A page's elements, its tables as rows of cells, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"{self._open} are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open[-2:]):
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> dict[str, dict[str, str]]:
        """The first table that has a row called ``corner``: the cells by row and by column."""
        found = next(table for table in self.tables if any(row and row[0] == corner for row in table))
        return {row[0]: dict(zip(found[0][1:], row[1:], strict=True)) for row in found[1:]}


def test_the_page_asks_for_nothing_from_a_network(make_run: MakeRun, tmp_path: Path) -> None:
    text = write_report([make_run("a"), make_run("b")], tmp_path / "both.html").read_text("utf-8")
    for tag, attributes in Page(text).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert name not in attributes, (tag, name)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", text, re.IGNORECASE)


def test_figures_are_those_of_the_summary_and_the_protocol_is_named(make_run: MakeRun) -> None:
    folder = make_run("a")
    page = Page(write_report([folder]).read_text("utf-8"))
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert [event["label"] for event in summary["evaluations"] if event["role"] == "test"] == [SAMPLED, FULL]
    tables = [table for table in page.tables if table[1][0] == "HR@10"]
    tested = [event for event in summary["evaluations"] if event["role"] == "test"]
    for table, event, base in zip(tables, tested, summary["baselines"], strict=True):
        cells = {row[0]: row[1:] for row in table[1:]}
        assert cells == {
            name: [f"{base['metrics'][name]:.4f}", f"{value:.4f}", f"{value / base['metrics'][name]:.2f}"]
            for name, value in event["metrics"].items()
        }
        assert table[0] == ["", "ItemPop", "this run", "times ItemPop"]
        assert f"Protocol: {event['label']}; 6,040 cases of 6,040 users" in page.text
    assert page.table("sent up")["sent up"] == {"this run": "800 MB"}
    assert summary["bytes_up"] == 800_000_000
    assert page.table("sent up")["sent down a round"] == {"this run": "50.0 MB"}
    assert page.table("sent up")["time"] == {"this run": "10 s"}
    assert page.table("sent up")["both ways, a client and visit"] == {"this run": "350 kB"}
    assert page.table("sent up")["down, a client and visit"] == {"this run": "250 kB"}
    assert page.table("sent up")["the same with the whole tables"] == {"this run": "1.0 MB"}
    assert page.table("sent up")["which is as much"] == {"this run": "4 times"}


def test_a_deployed_run_is_gone_on_with_by_serving_and_says_what_was_refused(make_run: MakeRun) -> None:
    folder = make_run("a", mode="deployed", until=3)
    RunLog(folder).append("round", round=4, loss=4.0, clients=197, dropped=3, refused={"norm": 2, "weight": 1})
    page = Page(write_report([folder]).read_text("utf-8"))
    assert f"fedtower serve {folder} goes on" in page.text
    assert page.table("sent up")["dropped in all"] == {"this run": "9"}
    assert page.table("sent up")["of these refused"] == {"this run": "3 (norm 2, weight 1)"}


def test_the_page_tells_of_data_versions_plugins_and_recipe(make_run: MakeRun) -> None:
    page = Page(write_report([make_run("a")]).read_text("utf-8"))
    assert page.table("users")["interactions"] == {"small <data>": "1,000,209"}
    assert page.table("users")["from"] == {"small <data>": "2000-04-25"}
    assert "R&D only" in page.text
    assert page.table("numpy")["numpy"] == {"version": "2.4.6"}
    assert page.table("broken")["broken"] == {"distribution": "somebody-s", "version": "9", "status": "failed"}
    assert '# a < b & "c"' in page.text
    assert "simulated" in page.text
    assert "seed 7" in page.text


def test_what_others_wrote_is_text_and_not_markup(make_run: MakeRun) -> None:
    text = write_report([make_run("a")]).read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_several_runs_are_side_by_side_with_their_difference(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run("a"), make_run("b", better=0.02)
    page = Page(write_report([first, second], tmp_path / "both.html").read_text("utf-8"))
    assert page.table("HR@10")["HR@10"] == {
        "ItemPop": "0.4521",
        "a": f"{0.4521 * 1.5:.4f}",
        "b": f"{0.4521 * 1.5 + 0.02:.4f}",
        "difference": "+0.0200 (+2.9 %)",
    }
    assert list(page.table("sent up")["sent up"]) == ["a", "b"]
    # The data and the versions are the same, and told once.
    assert list(page.table("users")["users"]) == ["small <data>"]
    drawings = [
        attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and "aria-label" in attributes
    ]
    assert drawings[0] == "training loss by round: a from 4.975 to 4.000; b from 4.955 to 3.980"
    assert len(drawings) == 3


def test_a_worse_run_differs_downwards(make_run: MakeRun, tmp_path: Path) -> None:
    page = Page(write_report([make_run("a", better=0.02), make_run("b")], tmp_path / "both.html").read_text("utf-8"))
    assert page.table("HR@10")["HR@10"]["difference"] == "−0.0200 (−2.9 %)"


def test_runs_that_count_differently_are_drawn_over_their_share(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", mode="standalone", rounds=10)]
    page = Page(write_report(runs, tmp_path / "both.html").read_text("utf-8"))
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.elements if tag == "svg"]
    assert sum("by % of the run" in label for label in labels) == 3
    assert "10 epochs" in page.text
    assert "40 rounds" in page.text


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("a")
    second = tmp_path / "elsewhere" / "a"
    second.parent.mkdir()
    first.rename(second)
    first = make_run("a")
    page = Page(write_report([first, second], tmp_path / "both.html").read_text("utf-8"))
    assert list(page.table("sent up")["sent up"]) == [str(first), str(second)]


def test_an_unfinished_run_is_told_as_far_as_it_went_and_says_so(make_run: MakeRun) -> None:
    folder = make_run("a", until=23)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"event": "round", "round": 24, "lo')
    page = Page(write_report([folder]).read_text("utf-8"))
    assert "a is not finished: it stands at round 23 of 40" in page.text
    assert f"fedtower resume {folder}" in page.text
    assert "No run here has been judged on its test data yet." in page.text
    assert page.table("sent up")["rounds"] == {"this run": "23"}


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    RunLog(tmp_path).append("run_started", name="small", mode="simulated", seed=1, rounds=5)
    text = write_report([tmp_path]).read_text("utf-8")
    assert "No round is finished yet." in Page(text).text
    assert "recipe.toml is not there" in text


def test_the_command_writes_beside_the_run_and_says_where(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_run("a"), make_run("b")
    monkeypatch.chdir(first.parent)
    assert CliRunner().invoke(report_command, ["a"]).output == "a/report.html\n"
    assert (first / "report.html").is_file()
    assert CliRunner().invoke(report_command, ["a", str(second)]).output == "report.html\n"
    assert Path("report.html").is_file()
    assert CliRunner().invoke(report_command, ["a", "--out", "there.html"]).output == "there.html\n"
    assert sorted(path.name for path in first.iterdir() if path.name.startswith(".")) == []


def test_a_folder_that_is_no_run_and_a_place_that_cannot_be_written_are_refused(make_run: MakeRun) -> None:
    folder = make_run("a")
    with pytest.raises(CheckpointError, match=r"runs/b does not exist.*log\.jsonl.*runs/a"):
        write_report([folder.parent / "b"])
    with pytest.raises(StorageError, match="--out"):
        write_report([folder], folder / "no" / "such" / "place.html")


def test_ticks_are_round_and_hold_the_values() -> None:
    assert ticks(0, 450, 6) == [0, 100, 200, 300, 400, 500]
    assert ticks(0.0413, 0.0498, 5) == [0.04, 0.042, 0.044, 0.046, 0.048, 0.05]
    for low, high in ((1e-9, 3e-9), (-5.0, 5.0), (7.0, 7.0), (0.0, 0.0), (1.0, 100_000.0)):
        found = ticks(low, high, 5)
        assert found[0] <= low <= high <= found[-1]
        assert 2 <= len(found) <= 6


def test_a_thinned_line_keeps_the_mean() -> None:
    points: list[Any] = [(x, float(x % 7)) for x in range(1000)]
    thinned = thin(points, 200)
    assert len(thinned) == 200
    assert sum(y for _, y in thinned) * 5 == pytest.approx(sum(y for _, y in points))
    assert thin(points[:200], 200) == points[:200]


def test_a_chart_stays_within_its_frame_and_names_its_points() -> None:
    drawn = Page(line_chart([Line("a", [(1, 0.5), (2, 0.7)])], name="HR@10", x_name="round", y_format=str))
    dots = [attributes for tag, attributes in drawn.elements if tag == "circle"]
    assert all(0 <= float(dot["cx"] or -1) <= 420 and 0 <= float(dot["cy"] or -1) <= 260 for dot in dots)
    assert float(dots[0]["cy"] or 0) > float(dots[1]["cy"] or 0)
    assert "round 2: HR@10 0.7" in drawn.text
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([Line("a", [])], name="x", x_name="y", y_format=str)


def test_a_run_that_waits_for_nobody_says_how_stale_updates_were(make_run: MakeRun, tmp_path: Path) -> None:
    waits, does_not = make_run("waits"), make_run("does-not", until=10)
    log = RunLog(does_not)
    log.append("round", round=11, loss=1.0, clients=1, staleness={"mean": 4.0, "max": 4.0})
    log.append("round", round=12, loss=1.0, clients=3, staleness={"mean": 1.0, "max": 9.0})
    assert log.record().staleness == log.record().summary()["staleness"] == {"mean": 1.75, "max": 9.0}
    assert "staleness" not in RunLog(waits).record().summary()
    assert "versions behind" not in write_report([waits], tmp_path / "one.html").read_text("utf-8")
    page = write_report([waits, does_not], tmp_path / "two.html").read_text("utf-8")
    assert re.search(r"versions behind, an update</th><td>–</td><td>1\.75; at most 9</td>", page)
