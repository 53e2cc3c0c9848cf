"""A run from Python: its figures, its observers, its example in the README, and what it gains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import list_checkpoints
from fedtower.core.errors import CheckpointError, DataError, RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import discover
from fedtower.recsys.evaluation import ItemPop, make_cases, sample_negatives
from fedtower.recsys.metrics import ranks
from fedtower.recsys.run import Run
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import Histories
from fedtower.recsys.training import Setting


class Watcher:
    """An observer that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def run_started(self, recipe: Any) -> None:
        self.heard.append(f"started {recipe.name}")

    @hookimpl
    def data_loaded(self, card: Mapping[str, Any]) -> None:
        self.heard.append(f"{card['users']} users")

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Any) -> None:
        self.heard.append(f"{round} {subject} {evaluation.role} {evaluation.protocol_label}")

    @hookimpl
    def checkpoint_written(self, round: int) -> None:
        self.heard.append(f"{round} saved")

    @hookimpl
    def warned(self, message: str) -> None:
        self.heard.append(message)

    @hookimpl
    def run_finished(self, summary: Mapping[str, Any]) -> None:
        self.heard.append(f"finished {summary['rounds']}")


def task_of(run: Run) -> Histories:
    """What the run was on: users and their split."""
    task = run.trained.setting.task
    assert isinstance(task, Histories)
    return task


class Broken:
    """An observer that fails whenever it can."""

    @hookimpl
    def round_finished(self, report: Any) -> None:
        raise ValueError("no such luck")


def test_figures_are_those_of_the_summary(federated_run: Run) -> None:
    written = json.loads((federated_run.folder / "summary.json").read_text("utf-8"))
    assert federated_run.summary == written
    (sampled, full) = [event for event in written["evaluations"] if event["role"] == "test"]
    assert (sampled["label"], full["label"]) == ("sampled, 99 negatives", "full ranking")
    assert federated_run.metrics == sampled["metrics"]
    assert (written["rounds"], written["mode"], written["seed"]) == (6, "simulated", 1)
    assert written["dropped"] > 0
    assert {event["name"] for event in written["baselines"]} == {"ItemPop"}


def test_what_row_selection_saves_is_told(federated_run: Run, standalone_run: Run) -> None:
    model = federated_run.trained.training.learned()
    assert isinstance(model.rows, CloudTables)
    towers = sum(value.nbytes for value in model.parameters.values())
    told, record = federated_run.summary["row_selection"], RunLog(federated_run.folder).record()
    assert told["with_whole_tables"] == towers + model.rows.num_bytes
    assert told["bytes_down_a_visit"] == round(record.total("bytes_down") / record.total("clients")) > towers
    assert told["times_as_much"] == pytest.approx(told["with_whole_tables"] / told["bytes_down_a_visit"], rel=1e-3)
    assert "row_selection" not in standalone_run.summary


def test_measuring_again_gives_the_same_figures(federated_run: Run, standalone_run: Run) -> None:
    for run in (federated_run, standalone_run):
        assert run.evaluate().metrics == run.metrics
        again = fedtower.load(run.folder).evaluate("full")
        assert again.metrics == next(
            event["metrics"]
            for event in run.summary["evaluations"]
            if event["role"] == "test" and event["label"] == again.protocol_label
        )


def test_test_items_are_looked_at_once_at_the_end(federated_run: Run) -> None:
    looked = [(event["round"], event["role"]) for event in RunLog(federated_run.folder).record().evaluations]
    assert looked == [(2, "validation"), (4, "validation"), (6, "validation"), (6, "test"), (6, "test")]


def test_a_run_keeps_as_many_checkpoints_as_it_is_told(federated_run: Run) -> None:
    assert list_checkpoints(federated_run.folder / "checkpoints") == [4, 6]


def test_observers_hear_what_happens_in_its_order(run_root: Path, small: Mapping[str, Any]) -> None:
    watcher, told = Watcher(), list[str]()
    run = fedtower.run(
        "dssm-synthetic",
        {**small, "rounds": 3, "checkpoint.every": 2},
        observers=[Broken(), watcher],
        progress=told.append,
    )
    assert run.folder == Path("runs/dssm-synthetic-1")
    failed = [line for line in watcher.heard if "no such luck" in line]
    assert len(failed) == 1, "a failing observer is told of once, and the run goes on"
    assert [line for line in watcher.heard if line not in failed] == [
        "started dssm-synthetic",
        "60 users",
        "2 model validation sampled, 99 negatives",
        "2 saved",
        "3 saved",
        "3 ItemPop test sampled, 99 negatives",
        "3 model test sampled, 99 negatives",
        "3 ItemPop test full ranking",
        "3 model test full ranking",
        "finished 3",
    ]


def test_a_registry_serves_several_runs_and_none_hears_of_another(run_root: Path, small: Mapping[str, Any]) -> None:
    registry, watchers = discover(), [Watcher(), Watcher()]
    runs = [
        fedtower.run("dssm-synthetic", {**small, "rounds": rounds}, registry=registry, observers=[watcher])
        for rounds, watcher in zip((1, 2), watchers, strict=True)
    ]
    assert [run.summary["rounds"] for run in runs] == [1, 2]
    assert [watcher.heard[-1] for watcher in watchers] == ["finished 1", "finished 2"]
    assert [watcher.heard.count("started dssm-synthetic") for watcher in watchers] == [1, 1]


def test_overrides_may_be_words_or_values(run_root: Path, small: Mapping[str, Any]) -> None:
    (run_root / "my.toml").write_text(
        (run_root / fedtower.run("dssm-synthetic", {**small, "rounds": 1}).folder / "recipe.toml").read_text("utf-8"),
        "utf-8",
    )
    by_words = fedtower.run("my.toml", ["rounds=2", "name=words", "evaluation.k=[5, 10]", "transforms=[]"])
    by_values = fedtower.run(
        Path("my.toml"),
        {"rounds": 2, "name": "Größe 😀", "evaluation.k": (5, 10), "transforms": [{"name": "clip", "norm": 1e9}]},
    )
    assert by_values.folder.name == "Größe 😀-1"
    assert by_words.metrics == by_values.metrics
    assert "HR@5" in by_values.metrics


def test_a_run_without_validation_items_is_judged_at_its_end(run_root: Path, small: Mapping[str, Any]) -> None:
    run = fedtower.run("dssm-synthetic", {**small, "rounds": 2, "data.validation": False})
    assert {event["role"] for event in run.summary["evaluations"]} == {"test"}


def test_recommendations_are_new_to_the_user_and_in_order(federated_run: Run) -> None:
    population = task_of(federated_run).population
    for client in (0, 7, 59):
        touched = {population.item_name(int(item)) for item in population.events(np.array([client])).items}
        best = federated_run.recommend(population.user_name(client), k=15)
        assert len({each.item for each in best}) == 15
        assert not touched & {each.item for each in best}
        assert [each.score for each in best] == sorted((each.score for each in best), reverse=True)
        assert all(each.title == population.item_title(int(each.item.removeprefix("i"))) for each in best)
        everything = federated_run.recommend(population.user_name(client), k=10_000)
        assert len(everything) == population.num_items - len(touched)
        assert everything[:15] == best


def test_recommendations_are_the_best_by_the_models_scores(federated_run: Run) -> None:
    task, learned = task_of(federated_run), federated_run.trained.training.learned()
    events = task.population.events(np.array([3]))
    scores = task.scorer(learned, "now").score_all(events.clients, events.lengths)[0]
    left = [item for item in np.argsort(-scores, kind="stable").tolist() if item not in set(events.items.tolist())]
    assert [each.item for each in federated_run.recommend("u3", k=5)] == [f"i{item}" for item in left[:5]]


def test_a_user_that_is_not_there_is_refused(federated_run: Run) -> None:
    with pytest.raises(DataError, match="there is no user 'u60': the generated users are u0 to u59"):
        federated_run.recommend("u60")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        fedtower.load(tmp_path)
    with pytest.raises(CheckpointError, match="is not a run folder"):
        fedtower.resume(tmp_path)


def test_deployed_is_served_and_not_run_in_this_process(run_root: Path) -> None:
    with pytest.raises(RecipeError, match=r'"deployed" is served to devices.*fedtower serve'):
        fedtower.run("dssm-synthetic", {"mode": "deployed"})


def test_the_readmes_example_runs_as_written(run_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    examples = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fedtower.run(" in block]
    assert len(examples[0].strip().splitlines()) <= 10
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "dssm-synthetic-1" in capsys.readouterr().out
    assert (run_root / "runs" / "dssm-synthetic-1" / "summary.json").is_file()


REDUCED = {
    "data.users": 600,
    "data.items": 500,
    "data.mean_events": 50,
    "model.dim": 16,
    "model.hidden": 32,
    "local.negatives": 50,
    "local.history_length": 30,
    "rounds": 30,
    "cohort.size": 60,
    "evaluation.every": 0,
}


def hits_of(run: Run) -> tuple[Any, Any]:
    """Whether each user's test item is among the first ten of a hundred: for the model, and for item popularity."""
    task = task_of(run)
    cases = make_cases(task.population, task.split, np.arange(task.num_clients), "test")
    negatives = sample_negatives(task.population, cases, 99, task.draws)
    candidates = np.concatenate([cases.targets[:, None], negatives], axis=1)
    hits = []
    for scorer in (task.scorer(run.trained.training.learned(), "test"), ItemPop.count(task.population, task.split)):
        scores = scorer.score(cases.clients, cases.cut, candidates)
        hits.append(ranks(scores[:, 0], scores[:, 1:]) < 10)
    return hits[0], hits[1]


def gain_of(run: Run) -> tuple[float, float, float]:
    """HR@10 of the model over that of item popularity; their difference; its standard error, over paired users."""
    model, popularity = hits_of(run)
    assert run.metrics["HR@10"] == pytest.approx(model.mean())
    difference = model.astype(float) - popularity
    return model.mean() / popularity.mean(), difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))


def test_where_there_is_taste_the_model_finds_it(tmp_path: Path) -> None:
    ratio, gain, error = gain_of(fedtower.run("dssm-synthetic", REDUCED, runs=tmp_path))
    assert ratio >= 1.25
    assert gain > 5 * error


def test_where_there_is_no_taste_the_same_recipe_gains_nothing(tmp_path: Path) -> None:
    _, gain, error = gain_of(fedtower.run("dssm-synthetic", {**REDUCED, "data.taste": 0.0}, runs=tmp_path))
    assert gain < 2 * error  # which chance alone would break once in forty seeds, and this is one seed
    assert error < 0.02  # so that what the test above finds could not hide here


def test_the_mode_alone_makes_the_same_recipe_central(
    tmp_path: Path, small: Mapping[str, Any], standalone_run: Run, setting_of: Callable[..., Setting]
) -> None:
    recipe = setting_of().recipe
    again = fedtower.run(
        "dssm-synthetic",
        [*(f"{key}={json.dumps(value)}" for key, value in small.items()), "mode=standalone"],
        runs=tmp_path,
    )
    assert again.metrics == standalone_run.metrics
    assert again.trained.setting.recipe.local == recipe.local
