"""What a suite's file may say, and the figures that are made of runs, by hand."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import t as students_t

from fedtower.core.errors import RecipeError
from fedtower.core.registry import discover
from fedtower.core.settings import build
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.suite import Column, Entry, Layout, Plot, Suite, load_suite, tasks_of
from fedtower.recsys.suite_figures import Finished, Results, difference, finished_run, mean_curve, reached
from fedtower.recsys.suite_page import console_table, in_markdown, render_suite

ENTRIES = (
    Entry("small", "dssm-synthetic", "Small", ("cohort.size=5",), published={"HR@10": 0.7}, source="Somebody, 2020"),
    Entry("large", "dssm-synthetic", "Large <b>", ("cohort.size=9",), ("rounds=2",), against="small"),
)
TABLE = Layout("Figures", ("HR@10", Column("accuracy", 0.9), "bytes_up"))
SUITE = Suite("Sizes", ENTRIES, (TABLE,), seeds=(1, 2, 3), plots=(Plot("Bytes", y="HR@10", x="bytes_up"),))


def run_of(entry: str, seed: int, hits: float, reach: float | None = None) -> Finished:
    figures = {"HR@10": hits, "bytes_up": 1e6 * seed} | ({} if reach is None else {"rounds to accuracy 0.9": reach})
    return Finished(entry, seed, "runs/x", figures=figures, protocol="sampled, 99 negatives")


RUNS = (
    *(run_of("small", seed, hits, 10.0) for seed, hits in ((1, 0.70), (2, 0.72), (3, 0.71))),
    run_of("large", 1, 0.73, 8.0),
    run_of("large", 2, 0.74),
    Finished("large", 3, error="the disk is full"),
)
RESULTS = Results("sizes", SUITE, quick=False, runs=RUNS, planned=6)


def test_mean_and_deviation_are_over_the_seeds_that_finished() -> None:
    small, large = RESULTS.table(TABLE)
    found = small.figures["HR@10"]
    assert found is not None
    assert [found.mean, found.deviation, found.count] == pytest.approx([0.71, 0.01, 3])
    assert (large.runs, large.failed) == (3, 1)


def test_a_difference_is_paired_by_seed_and_its_p_is_students() -> None:
    ours, theirs = {1: 0.73, 2: 0.74, 3: 0.76, 9: 0.1}, {1: 0.70, 2: 0.72, 3: 0.71, 8: 0.9}
    found = difference("small", ours, theirs)
    assert found is not None
    apart = [0.03, 0.02, 0.05]
    mean = sum(apart) / 3
    deviation = (sum((each - mean) ** 2 for each in apart) / 2) ** 0.5
    assert [found.mean, found.count] == pytest.approx([mean, 3])
    assert found.p == pytest.approx(2 * students_t.sf(mean / (deviation / 3**0.5), df=2))


def test_fewer_bytes_are_those_of_the_same_seeds_and_of_nobody_but_whom_it_is_held_against() -> None:
    less = Finished("large", 1, figures={"HR@10": 0.7, "bytes_up": 2.5e5})
    results = Results("sizes", SUITE, quick=False, runs=(*RUNS[:3], less), planned=4)
    assert [row.fewer for row in results.table(TABLE)] == [None, 4.0]
    large = next(line for line in in_markdown(results).splitlines() if line.startswith("| Large"))
    assert [cell.strip() for cell in large.split("|")][-3:-1] == ["250 kB", "4"]
    alone = Results("sizes", SUITE, quick=False, runs=RUNS[:3], planned=3)
    assert "times fewer" not in in_markdown(alone)


def test_a_table_says_whom_its_rows_are_held_against_once() -> None:
    third = Entry("third", "dssm-synthetic", "Third", against="small")
    last = Entry("last", "dssm-synthetic", "Last", against="third")
    for entries, said in (
        ((*ENTRIES, third), "Differences: from Small."),
        ((*ENTRIES, third, last), "Differences: Large <b>, Third against Small; Last against Third."),
    ):
        suite = Suite("Sizes", entries, (TABLE,))
        runs = tuple(run_of(entry.name, 1, 0.7) for entry in entries)
        assert said in in_markdown(Results("sizes", suite, quick=False, runs=runs, planned=4))


def test_one_seed_or_equal_differences_say_nothing_of_significance() -> None:
    for ours, theirs in (({1: 2.0}, {1: 1.0}), ({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})):
        found = difference("other", ours, theirs)
        assert found is not None
        assert (found.mean, found.p) == (1.0, None)
    rounded = difference("other", {1: 0.3, 2: 0.8}, {1: 0.2, 2: 0.7})  # a tenth, and a tenth
    assert rounded is not None
    assert rounded.mean == pytest.approx(0.1)
    assert rounded.p is None


@pytest.mark.parametrize(
    ("points", "target", "falling", "expected"),
    [
        ([(1, 0.90), (2, 0.96), (3, 0.95), (4, 0.98)], 0.97, False, 3.5),
        ([(5, 0.99)], 0.97, False, 5.0),
        ([(1, 0.5), (2, 0.9)], 0.97, False, None),
        ([], 0.97, False, None),
        ([(1, 0.8), (2, 0.6), (3, 0.7), (4, 0.4)], 0.5, True, 3.5),
    ],
)
def test_rounds_to_a_target_by_hand(
    points: list[tuple[float, float]], target: float, falling: bool, expected: float | None
) -> None:
    found = reached(points, target, falling=falling)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_mean_curve_has_the_rounds_that_all_have() -> None:
    assert mean_curve([[(1, 1.0), (2, 2.0), (4, 4.0)], [(2, 4.0), (4, 0.0)]]) == [(2, 3.0), (4, 2.0)]
    assert mean_curve([]) == []


def test_the_figures_of_a_run_are_those_of_its_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append("run_started", name="x", mode="simulated", seed=1, rounds=3)
    for round, accuracy in ((1, 0.8), (2, 0.9), (3, 0.95)):
        log.append("round", round=round, loss=1 / round, clients=4, bytes_up=100, bytes_down=300, seconds=0.5)
        log.append("evaluation", round=round, role="validation", label="v", metrics={"accuracy": accuracy})
    log.append("evaluation", round=3, role="test", label="held out", metrics={"accuracy": 0.93})
    columns = [Column("accuracy"), Column("accuracy", 0.85), Column("bytes_up"), Column("bytes_down_a_visit")]
    plots = [Plot("curve", "accuracy"), Plot("loss", "loss")]
    found = finished_run("x", 1, log.record(), [*columns, Column("rounds"), Column("AUC")], plots)
    assert found.figures == {
        "accuracy": 0.93,
        "rounds to accuracy 0.85": pytest.approx(1.5),
        "bytes_up": 300,
        "bytes_down_a_visit": 75,
        "rounds": 3,
    }
    assert found.curves["accuracy"] == [(1, 0.8), (2, 0.9), (3, 0.95)]
    assert found.curves["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_passes_are_examples_over_what_everybody_holds(tmp_path: Path) -> None:
    log, there = RunLog(tmp_path), Column("accuracy", 0.9, unit="passes")
    log.append("run_started", name="x", mode="simulated", seed=1, rounds=3)
    log.append("data", card={"name": "x", "training examples": 1000})
    for round, examples in ((1, 100), (2, 300), (3, 100), (4, 100)):
        log.append("round", round=round, loss=1.0, clients=4, examples=examples, seconds=0.5)
    for round, accuracy in ((2, 0.8), (4, 1.0)):
        log.append("evaluation", round=round, role="validation", label="v", metrics={"accuracy": accuracy})
    found = finished_run("x", 1, log.record(), [there, Column("accuracy", 0.9)], [])
    # Halfway between the looks after rounds 2 and 4: after 0.4 passes, and after 0.6.
    assert found.figures == {"passes to accuracy 0.9": pytest.approx(0.5), "rounds to accuracy 0.9": pytest.approx(3)}
    log.append("round", round=1, loss=1.0, clients=4, seconds=0.5)  # of a log that does not count examples
    assert finished_run("x", 1, log.record(), [there], []).figures == {}


@pytest.mark.parametrize(
    ("card", "accuracy", "rounds", "passes"),
    [
        ({"training examples": 100}, [0.8, 0.95], "1.7", "1.7"),
        ({"training examples": 100}, [0.8, 0.85], "never", "never"),
        ({"interactions": 100}, [0.8, 0.95], "1.7", "–"),  # of histories
        ({"interactions": 100}, [0.8, 0.85], "never", "–"),
        ({"training examples": 100}, [], "–", "–"),  # with evaluation.every = 0
    ],
)
def test_never_is_said_of_what_was_looked_for(
    tmp_path: Path, card: dict[str, int], accuracy: list[float], rounds: str, passes: str
) -> None:
    columns = (Column("accuracy", 0.9), Column("accuracy", 0.9, unit="passes"))
    layout, log = Layout("To 90 %", columns), RunLog(tmp_path)
    log.append("run_started", name="x", mode="simulated", seed=1, rounds=2)
    log.append("data", card={"name": "x", **card})
    for round in (1, 2):
        log.append("round", round=round, loss=1.0, clients=4, examples=100, seconds=0.5)
    for round, value in enumerate(accuracy, start=1):
        log.append("evaluation", round=round, role="validation", label="v", metrics={"accuracy": value})
    runs = (finished_run("small", 1, log.record(), columns, []), Finished("small", 2, error="the disk is full"))
    suite = Suite("X", ENTRIES, (layout,))
    text = in_markdown(Results("x", suite, quick=False, runs=runs, planned=2))
    assert re.search(rf"^\| Small *\| *{rounds} \| *{passes} \|$", text, re.MULTILINE), text


def test_what_is_read_says_who_failed_who_never_came_there_and_what_is_published() -> None:
    text, page = in_markdown(RESULTS), render_suite(RESULTS)
    assert "| 0.710 ± 0.010 |" in text
    assert "8.0 (1 never)" in text
    assert "Published: Somebody, 2020." in text
    assert "the disk is full" in page
    assert "Large &lt;b&gt;" in page
    assert "Large <b>" not in page
    half = Results("sizes", SUITE, quick=True, runs=RUNS[:2], planned=6)
    assert "2 of 6 runs are done; the same command goes on." in in_markdown(half)


def test_a_terminal_of_80_columns_shows_every_figure_whole() -> None:
    wide = Layout("Wide", ("HR@10", "NDCG@10", "bytes_up_a_visit", "bytes_down_a_visit", "seconds"))
    entries = (
        Entry(
            "central",
            "dssm-synthetic",
            "PFedRec, items as they are sent",
            published={"HR@10": 0.7161, "NDCG@10": 0.4342},
        ),
        Entry("other", "dssm-synthetic", "DSSM, federated, rows frozen", against="central"),
    )
    suite = Suite("Wide", entries, (wide,))
    figures = {"bytes_up_a_visit": 123456.0, "bytes_down_a_visit": 234567.0, "seconds": 230.0}
    runs = tuple(
        Finished(name, seed, figures=figures | {"HR@10": at + at * 0.02 * seed**2, "NDCG@10": at / 2 + 0.011 * seed})
        for name, at in (("central", 0.713), ("other", 0.421))
        for seed in (1, 2)
    )
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(console_table(Results("wide", suite, quick=True, runs=runs, planned=4), wide))
    text = shown.export_text()
    assert "…" not in text
    for figure in ("0.749 ± 0.030", " 0.716 ", "−0.307 ", "(p 0.018)", "123 kB", "235 kB", "3 min 50 s"):
        assert figure in text, figure


def test_a_source_of_several_is_named_once_and_whole_rounds_are_whole() -> None:
    to_90 = Layout("To 90 %", (Column("accuracy", 0.9),))
    entries = tuple(
        Entry(name, "dssm-synthetic", published={"rounds to accuracy 0.9": rounds}, source="Somebody, 2020")
        for name, rounds in (("small", 87.0), ("large", 12.5))
    )
    runs = (run_of("small", 1, 0.7, 10.25), run_of("large", 1, 0.8))
    text = in_markdown(Results("x", Suite("X", entries, (to_90,)), quick=False, runs=runs, planned=2))
    assert text.count("Somebody, 2020") == 1
    assert re.findall(r"\| *(\S+) \| *(\S+) \|$", text, re.MULTILINE)[-2:] == [("10.2", "87"), ("never", "12.5")]


def test_who_sends_nothing_makes_no_visits(tmp_path: Path) -> None:
    log, columns = RunLog(tmp_path), [Column("bytes_up"), Column("bytes_up_a_visit")]
    log.append("run_started", name="x", mode="standalone", seed=1, rounds=1)
    log.append("round", round=1, loss=1.0, clients=4, bytes_up=0, bytes_down=0, seconds=0.5)
    assert finished_run("x", 1, log.record(), columns, []).figures == {"bytes_up": 0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"titel": "x"}, "titel is not a setting of Suite"),
        ({"seeds": []}, "at least one seed"),
        ({"entries": [{"name": "a", "recipe": "r"}, {"name": "a", "recipe": "r"}]}, "'a' is there twice"),
        ({"entries": [{"name": "a", "recipe": "r", "against": "b"}]}, "against names the entry 'b'"),
        ({"tables": [{"title": "t", "columns": ["AUC"], "entries": ["dssn"]}]}, "did you mean 'dssm'"),
        ({"tables": [{"title": "t", "columns": [{"of": "AUC", "reech": 1.0}]}]}, "tables.0.columns.0"),
        ({"tables": [{"title": "t", "columns": [{"of": "AUC", "unit": "passes"}]}]}, "a reach as well"),
    ],
)
def test_a_suite_that_is_wrong_says_what(change: dict[str, object], complaint: str) -> None:
    right = {
        "title": "t",
        "entries": [{"name": "dssm", "recipe": "dssm-synthetic"}],
        "tables": [{"title": "t", "columns": ["AUC"]}],
    }
    assert build(Suite, right, path="").seeds == (1, 2, 3)
    with pytest.raises(RecipeError, match=complaint):
        build(Suite, {**right, **change}, path="")


def test_the_runs_of_a_suite_are_its_entries_with_every_seed() -> None:
    registry = discover()
    tasks = tasks_of(SUITE, registry)
    assert [task.name for task in tasks] == [f"{name}-s{seed}" for seed in (1, 2, 3) for name in ("small", "large")]
    assert [task.recipe.cohort.part.settings["size"] for task in tasks[:2]] == [5, 9]
    assert {task.recipe.seed for task in tasks} == {1, 2, 3}
    quick = tasks_of(SUITE, registry, quick=True, only=["large"], options=["local.lr=0.5"])
    assert [(task.recipe.rounds, task.recipe.local.lr) for task in quick] == [(2, 0.5)]
    with pytest.raises(RecipeError, match="did you mean 'large'"):
        tasks_of(SUITE, registry, only=["larg"])
    with pytest.raises(RecipeError, match=r"the entry 'small'.*chort"):
        tasks_of(SUITE, registry, options=["chort.size=3"])


def test_a_suite_that_nobody_offers_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'movielens'"):
        load_suite("movielans", discover())
