"""The live progress: which rounds have a row, what is in it, and that it fits."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtower.core.hooks import Hooks
from fedtower.core.recipe import Recipe, parse_recipe
from fedtower.core.round import RoundReport
from fedtower.recsys.display import Display
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.examples import ExampleCard
from fedtower.recsys.population import DataCard


def recipe(rounds: int, mode: str = "simulated") -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "rounds": rounds,
            "mode": mode,
            "local": {"steps": 1},
            "data": {"name": "synthetic"},
            "model": {"name": "dssm"},
            "cohort": {"name": "uniform", "size": 5},
            "server": {"optimizer": "sgd", "lr": 1.0},
        }
    )


RANKING = {"HR@10": 0.51234, "NDCG@10": 0.3, "MRR": 0.2}


def run(
    display: Display,
    rounds: int,
    *,
    every: int = 20,
    mode: str = "simulated",
    dropped: int = 0,
    figures: dict[str, float] = RANKING,
) -> None:
    """Tell a display what a run tells, through the hooks; the first two figures are its headline."""
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(display, "display")
    hooks.observe("run_started", recipe=recipe(rounds, mode), folder=Path("runs/small-1"))
    hooks.observe("data_loaded", card={"name": "small", "users": 9}, headline=tuple(figures)[:2])
    for number in range(1, rounds + 1):
        hooks.observe("round_started", round=number, cohort=None)
        report = RoundReport(
            number, rounds, 5.0, 1200, dropped, 20_800_000, 936_000_000, 71.0, metrics={"clipped": 0.5}
        )
        hooks.observe("round_finished", report=report)
        if number % every == 0:
            hooks.observe(
                "evaluated",
                round=number,
                subject="model",
                evaluation=Evaluation("validation", "sampled", figures, 9, 9),
            )
            hooks.observe("checkpoint_written", round=number, path=Path("x"))
    for subject in ("ItemPop", "model"):
        final = Evaluation("test", "full ranking", {"HR@10": 0.0414, "MRR": 0.02}, 6040, 6040)
        hooks.observe("evaluated", round=rounds, subject=subject, evaluation=final)
    hooks.observe("run_finished", summary={})


def shown(rounds: int, *, terminal: bool, verbose: bool = False, **settings: Any) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None, highlight=False)
    display = Display(console, verbose=verbose, clock=lambda: 0.0)
    with display:
        run(display, rounds, **settings)
    written = out.getvalue() if terminal else out.getvalue().replace("\x1b", "escape")
    lines = [re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", line.split("\x1b[2K")[-1]).rstrip() for line in written.splitlines()]
    assert "small: 9 users" in lines
    return [line for line in lines if line != "small: 9 users"]


def test_in_a_file_a_round_is_a_plain_line() -> None:
    lines = shown(20, terminal=False)
    assert lines[0] == "round 1/20  loss 5.000  clients 1,200  dropped 0  up 20.8 MB  down 936 MB  71 s"
    assert lines[19].startswith("round 20/20  loss 5.000  HR@10 0.512  NDCG@10 0.300  clients 1,200")
    assert len(lines) == 20
    assert "escape" not in "".join(lines)


def test_a_long_run_shows_the_rounds_that_were_evaluated_and_both_ends() -> None:
    rounds = [line.split()[1] for line in shown(450, terminal=False, every=200) if line.startswith("round")]
    assert rounds == ["1/450", "200/450", "400/450", "450/450"]


def test_a_long_run_shows_when_clients_are_first_dropped() -> None:
    rounds = [line.split()[1] for line in shown(60, terminal=False, every=50, dropped=3) if line.startswith("round")]
    assert rounds == ["1/60", "50/60", "60/60"]


def test_the_round_at_which_a_long_run_was_stopped_is_shown() -> None:
    out = io.StringIO()
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(display := Display(Console(file=out, width=80)), "display")
    hooks.observe("run_started", recipe=recipe(450), folder=Path("x"))
    for number in (1, 2, 3):
        hooks.observe("round_started", round=number, cohort=None)
        hooks.observe("round_finished", report=RoundReport(number, 450, 0.5, 5, 0, 1, 1, 2.0))
    display.close()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/450", "3/450"]


@pytest.mark.parametrize(("rounds", "verbose"), [(40, False), (60, True)])
def test_a_short_run_and_a_verbose_one_show_every_round(rounds: int, verbose: bool) -> None:
    assert len([line for line in shown(rounds, terminal=False, verbose=verbose) if "loss" in line]) == rounds


def test_every_line_on_a_terminal_fits_into_80_columns() -> None:
    lines = shown(1000, terminal=True, every=500, dropped=12)
    table = [line for line in lines if line and ("/1000" in line or "dropped" in line)]
    assert max(map(len, table)) <= 80
    headings = next(line for line in table if "dropped" in line)
    assert headings.split() == ["round", "loss", "HR@10", "NDCG@10", "clients", "dropped", "up", "down", "time"]
    row = next(line for line in table if "500/1000" in line and "MB" in line)
    assert row.split() == ["500/1000", "5.000", "0.512", "0.300", "1,200", "12", "20.8", "MB", "936", "MB", "71", "s"]


def test_sentences_are_broken_between_words_on_a_terminal_and_not_in_a_file() -> None:
    place = "/a/path/" + "that-is-longer-than-any-terminal/" * 3
    many = "so many words that a line does not hold them, " * 3
    said = f"a data set of 1,234 users, and {many}and\n  licence: {place}"

    def told(*, terminal: bool) -> list[str]:
        out = io.StringIO()
        console = Console(file=out, width=80, force_terminal=terminal, color_system=None, highlight=False)
        display = Display(console)
        display.say(said)
        display.warned(f"of something, {said.splitlines()[0]}")
        return out.getvalue().splitlines()

    assert told(terminal=False) == [*said.splitlines(), f"warning: of something, {said.splitlines()[0]}"]
    lines = told(terminal=True)
    assert [line for line in lines if len(line) > 80] == [f"    {place}"]
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(told(terminal=False)).split())
    assert lines[1].startswith("  ")


def test_the_columns_are_those_of_the_data_that_the_run_is_on() -> None:
    figures = {"accuracy": 0.98123, "logloss": 0.125}
    lines = shown(2, terminal=True, every=1, figures=figures)
    headings = next(line for line in lines if "dropped" in line)
    assert headings.split()[1:4] == ["loss", "accuracy", "logloss"]
    assert next(line for line in lines if "1/2" in line and "MB" in line).split()[2:4] == ["0.981", "0.125"]
    assert "accuracy 0.981  logloss 0.125" in shown(2, terminal=False, every=1, figures=figures)[0]


def test_columns_stand_under_their_headings() -> None:
    lines = shown(3, terminal=True, every=2)
    headings, *rows = [line for line in lines if "dropped" in line or ("/3" in line and "MB" in line)]
    assert len(rows) == 3
    for heading, cell in (("loss", "5.000"), ("clients", "1,200"), ("down", "936 MB")):
        assert {row.index(cell) + len(cell) for row in rows} == {headings.index(heading) + len(heading)}


def test_a_standalone_run_counts_epochs() -> None:
    assert shown(2, terminal=False, mode="standalone")[0].startswith("epoch 1/2")


def test_warnings_stand_alone_and_after_the_round_they_belong_to() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=80))
    hooks = Hooks.none()
    hooks.add(display, "display")
    hooks.observe("run_started", recipe=recipe(2), folder=Path("x"))
    hooks.observe("round_finished", report=RoundReport(1, 2, float("nan"), 0, 5, 0, 0, 0.004))
    hooks.observe("warned", message="something is wrong with [this]")
    display.close()
    assert out.getvalue().splitlines() == [
        "round 1/2  loss –  clients 0  dropped 5  up 0 B  down 0 B  4 ms",
        "warning: something is wrong with [this]",
    ]


def test_the_data_and_where_a_run_goes_on_are_said() -> None:
    out = io.StringIO()
    hooks = Hooks.none(report=pytest.fail)
    hooks.add(Display(Console(file=out, width=80, highlight=False)), "display")
    card = DataCard("movielens 1m", 6040, 3706, 1000209, 956703932, 1046454590, {"times": "as given"})
    hooks.observe("data_loaded", card=card.to_dict(), headline=("HR@10",))
    examples = ExampleCard(
        "clicks", clients=100, training=64_000, validation=8_000, test=9_000, extra={"numbers": "13"}
    )
    hooks.observe("data_loaded", card=examples.to_dict(), headline=("AUC",))
    hooks.observe("run_resumed", round=40)
    assert out.getvalue().splitlines() == [
        "movielens 1m: 6,040 users, 3,706 items, 1,000,209 interactions, density 4.47 %, 2000-04-25 to 2003-02-28",
        "  times: as given",
        "clicks: 100 clients, 64,000 training examples, 8,000 validation examples, 9,000 test examples",
        "  numbers: 13",
        "going on after round 40",
    ]


def test_the_live_line_says_how_long_the_rest_takes() -> None:
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    display = Display(console, clock=lambda: now[0])
    hooks = Hooks.none()
    hooks.add(display, "display")
    hooks.observe("run_started", recipe=recipe(100), folder=Path("x"))
    # A resumed run: the pace is that of the rounds since.
    for number in (51, 52):
        hooks.observe("round_started", round=number, cohort=None)
        now[0] += 2.0
        hooks.observe("round_finished", report=RoundReport(number, 100, 0.5, 5, 0, 1, 1, 2.0))
    console.print(display._line())
    display.close()
    assert "round 52/100" in out.getvalue()
    assert "loss 0.500" in out.getvalue()
    assert "96 s left" in out.getvalue()
