"""The commands, as somebody types them and reads what comes; not a terminal, so plain lines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core.cli import call
from fedtower.core.registry import Registry
from fedtower.recsys.run import Run
from fedtower.recsys.tasks import Histories

Options = Callable[..., list[str]]
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Types a command line; its exit code, its output, and its complaint in one line."""

    def type_it(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return type_it


@pytest.fixture
def run_copy(federated_run: Run, tmp_path: Path) -> Path:
    """The finished run, to write into."""
    return Path(shutil.copytree(federated_run.folder, tmp_path / "run"))


def test_run_tells_what_it_does_and_what_to_do_next(run_root: Path, typed: Typed, options: Options) -> None:
    code, out, err = typed("run", "dssm-synthetic", *options({"rounds": 3}))
    assert (code, err) == (0, "")
    assert "synthetic: 60 users, 200 items" in out
    rounds = [line for line in out.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/3", "2/3", "3/3"]
    assert all(word in rounds[0] for word in ("loss", "clients", "dropped", "up", "down"))
    assert "\x1b" not in out
    model, popularity = (next(line for line in out.splitlines() if who in line) for who in ("trained", "ItemPop"))
    assert "sampled, 99 negatives" in model
    assert "sampled, 99 negatives" in popularity
    lines = out.splitlines()
    assert re.fullmatch(r"down:   [\d.]+ kB a client and visit; with the whole tables [\d.]+ times as much", lines[-5])
    assert len(lines[-5]) <= 80
    assert lines[-4].startswith("index:  exact, 200 items: recall@10 1.000")
    assert lines[-3] == "report: runs/dssm-synthetic-1/report.html"
    assert lines[-2] == "next:   fedtower run runs/dssm-synthetic-1/recipe.toml -o mode=standalone"
    assert lines[-1] == "        trains the same model centrally"
    assert (run_root / "runs/dssm-synthetic-1/report.html").stat().st_size > 10_000


def test_the_next_command_that_it_names_works_and_names_another(run_root: Path, typed: Typed, options: Options) -> None:
    _, out, _ = typed("run", "dssm-synthetic", *options({"rounds": 1, "standalone.epochs": 2}))
    words = out.splitlines()[-2].removeprefix("next:").split()
    code, out, err = typed(*words[1:])
    assert (code, err) == (0, "")
    assert "epoch 2/2" in out
    assert out.splitlines()[-2] == "next:   fedtower report runs/dssm-synthetic-2 OTHER-RUN"
    code, out, _ = typed("report", "runs/dssm-synthetic-2", "runs/dssm-synthetic-1")
    assert code == 0
    assert "report.html" in out


def test_resume_goes_on_and_ends_like_run(run_root: Path, typed: Typed, run_copy: Path) -> None:
    code, out, err = typed("resume", run_copy, "--from", 4)
    assert (code, err) == (0, "")
    rounds = [line.split()[1] for line in out.splitlines() if line.startswith("round ")]
    assert rounds == ["5/6", "6/6"]
    assert f"report: {run_copy}/report.html" in out.splitlines()


def test_evaluate_prints_the_figures_of_the_summary(typed: Typed, federated_run: Run) -> None:
    code, out, _ = typed("evaluate", federated_run.folder, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["role"], told["label"], told["cases"], told["users"]) == ("test", "sampled, 99 negatives", 60, 60)
    assert told["metrics"] == federated_run.metrics
    code, out, _ = typed("evaluate", federated_run.folder)
    assert out.splitlines()[0] == "test, sampled, 99 negatives, 60 cases"
    for name in federated_run.metrics:
        assert name in out


def test_evaluate_takes_another_protocol(typed: Typed, federated_run: Run) -> None:
    code, out, _ = typed("evaluate", federated_run.folder, "--protocol", "full", "--json")
    assert code == 0
    assert json.loads(out)["label"] == "full ranking"
    assert "coverage@10" in json.loads(out)["metrics"]


def test_recommend_lists_what_the_user_has_not_touched(typed: Typed, federated_run: Run) -> None:
    code, out, _ = typed("recommend", federated_run.folder, "--user", "u7", "-k", 5, "--json")
    told = json.loads(out)
    assert code == 0
    assert told == [
        {"item": each.item, "title": each.title, "score": each.score} for each in federated_run.recommend("u7", 5)
    ]
    task = federated_run.trained.setting.task
    assert isinstance(task, Histories)
    events = task.population.events(np.array([7]))
    assert not {each["item"] for each in told} & {f"i{item}" for item in events.items}
    code, out, _ = typed("recommend", federated_run.folder, "--user", "u7", "-k", 5)
    assert code == 0
    for each in told:
        assert each["title"] in out
        assert each["item"] in out
    _, out, _ = typed("recommend", federated_run.folder, "--user", "7", "--json")
    assert len(json.loads(out)) == 10


def test_recipes_lists_names_and_summaries(typed: Typed, registry: Registry) -> None:
    code, out, _ = typed("recipes", "--json")
    assert code == 0
    assert [each["name"] for each in json.loads(out)] == [offer.name for offer in registry.offers("recipe")]
    code, out, _ = typed("recipes")
    assert code == 0
    for offer in registry.offers("recipe"):
        assert offer.name in out


def test_report_is_one_file_about_the_run(typed: Typed, run_copy: Path) -> None:
    code, out, err = typed("report", run_copy)
    assert (code, err) == (0, "")
    page = (run_copy / "report.html").read_text("utf-8")
    assert str(run_copy / "report.html") in "".join(out.split("\n"))
    assert "dssm-synthetic" in page
    assert "src=" not in page


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["recommend", "RUN", "--user", "u60"], 3, "there is no user 'u60': the generated users are u0 to u59"),
        (["recommend", "RUN", "--user", "ann"], 3, "there is no user 'ann'"),
        (["recommend", "RUN"], 2, "give a RUN and a --user"),
        (["recommend", "--user", "u1"], 2, "give a RUN and a --user"),
        (["recommend", "RUN", "--user", "u1", "-k", "0"], 2, "0 is not in the range x>=1"),
        (["evaluate", "RUN", "--protocol", "some"], 2, "'some' is not one of 'sampled', 'full'"),
        (["evaluate", "nowhere"], 5, "nowhere does not exist; a run folder is what `fedtower run` makes"),
        (["recommend", "nowhere", "--user", "u1"], 5, "nowhere does not exist"),
        (["resume", "nowhere"], 5, "nowhere does not exist"),
        (["report", "nowhere"], 5, "nowhere does not exist"),
        (["resume", "RUN", "--from", "3"], 5, "000003 has no readable manifest.json"),
        (["run", "dssm-sintetic"], 2, "no plugin offers the recipe 'dssm-sintetic' (did you mean 'dssm-synthetic'?)"),
        (["run", "there-is-no.toml"], 2, "the recipe there-is-no.toml cannot be read"),
        (["rum"], 2, "there is no command 'rum' (did you mean 'run'?)"),
        (["run", "dssm-synthetic", "-o", "rounds"], 2, "an override is key=value"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph_and_an_exit_code(
    run_root: Path, typed: Typed, run_copy: Path, words: list[str], code: int, said: str
) -> None:
    got, out, err = typed(*(run_copy if word == "RUN" else word for word in words))
    assert got == code
    assert said in err
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert not (run_root / "runs").exists()


def test_a_mistake_in_the_recipe_is_told_before_torch_is_loaded(run_root: Path) -> None:
    program = (
        "import sys\n"
        "from fedtower.core.cli import call\n"
        "codes = [call(['run', 'dssm-synthetic', '-o', 'rouns=3']), call(['recipes']), call(['evaluate', 'nowhere'])]\n"
        "print(codes, sorted({'torch', 'pandas', 'torchrec'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[2, 0, 5] []"


def test_the_real_command_prints_nothing_but_what_it_means_to(run_root: Path, options: Options) -> None:
    command = [sys.executable, "-W", "error", "-m", "fedtower", "run", "dssm-synthetic", *options({"rounds": 1})]
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("synthetic: 60 users")
