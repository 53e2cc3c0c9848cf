"""What a run on labelled examples is trained on, judged by and compared with; and a whole run of each model on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedtower
from fedtower.core.cli import call
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings
from fedtower.core.recipe import Recipe, load_recipe
from fedtower.core.registry import discover
from fedtower.core.rows import RowStore
from fedtower.core.store import ClientStore
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.datasets.criteo import example as clicks
from fedtower.plugins.datasets.mnist import example as digits
from fedtower.recsys.examples import ExampleCard, Examples, ExampleTable
from fedtower.recsys.learned import Learned
from fedtower.recsys.metrics import auc
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.tasks import Labelled, make_task
from fedtower.recsys.testing.examples import CLICKS, cases
from fedtower.recsys.training import Setting

REGISTRY = discover()


def labelled(seed: int = 1, *, num_classes: int = 0, overrides: tuple[str, ...] = ()) -> Labelled:
    """A task of five clients with 4 to 8 examples of the small click model's data."""
    draws = Draws(seed)

    def held(*lengths: int) -> Examples:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        place = np.arange(offsets[-1], dtype=np.int64)[:, None]
        edges = np.concatenate([[0], np.cumsum(CLICKS.cardinalities)]).astype(np.int64)
        within = draws.integers(np.diff(edges)[None, :], "category", place, np.arange(3, dtype=np.int64)[None, :])
        return Examples(
            np.arange(len(lengths), dtype=np.int64),
            offsets,
            draws.normal("dense", place, np.arange(3)[None, :]).astype(np.float32),
            within + edges[:-1],
            draws.integers(num_classes or 2, "label", place[:, 0]).astype(np.float32),
        )

    card = ExampleCard("small", 5, 30, 9, 13)
    table = ExampleTable(card, held(4, 5, 6, 7, 8), held(9), held(13), CLICKS.cardinalities, num_classes)
    loss = "cross_entropy" if num_classes else "bce"
    task = make_task(table, recipe(f"local.loss={loss}", *overrides), draws)
    assert isinstance(task, Labelled)
    return task


def recipe(*overrides: str) -> Recipe:
    return load_recipe("wide-deep-criteo", overrides, REGISTRY)


class Rows:
    """Rows of an id that are its own number, over and over."""

    def fetch(self, source: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        assert source == "category"
        return np.tile(ids[:, None] / 10.0, (1, 4)).astype(np.float32)


def learned() -> Learned:
    """The small click model as it is declared."""
    model = cases()["clicks"].model
    store: RowStore = Rows()  # type: ignore[assignment]
    return Learned(model, model.parameters(), ClientStore(5), store)


def test_the_data_says_which_task_it_is() -> None:
    task = labelled()
    assert (task.schema, task.num_clients, task.card.name) == (CLICKS, 5, "small")
    assert task.headline == ("AUC", "logloss")
    assert labelled(num_classes=4).headline == ("accuracy", "logloss")
    assert task.features(np.array([3, 1])).shape == (2, 0)


def test_an_epoch_of_standalone_training_meets_every_example_once() -> None:
    task = labelled(overrides=("standalone.batch_size=8",))
    steps = list(task.central(1))
    assert [int(work.examples[0]) for work in steps] == [8, 8, 8, 6]
    everything = task.examples.examples(np.arange(5))
    met = np.concatenate([work.inputs["dense"][0, 0] for work in steps])
    assert sorted(map(tuple, met.tolist())) == sorted(map(tuple, everything.dense.tolist()))
    ids = [work.row_ids["category"].ids[work.slots["category"][0, 0]] for work in steps]
    by_example = dict(zip(map(tuple, everything.dense.tolist()), everything.categories.tolist(), strict=True))
    assert [by_example[tuple(row)] for row in met.tolist()] == np.concatenate(ids).tolist()
    assert not np.array_equal(met, np.concatenate([work.inputs["dense"][0, 0] for work in task.central(2)]))


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_a_model_is_judged_on_every_held_out_example(batch_size: int) -> None:
    task, model = labelled(overrides=(f"evaluation.batch_size={batch_size}",)), learned()
    held = task.examples.held_out("test")
    slots = torch.from_numpy(Rows().fetch("category", held.categories.reshape(-1)).reshape(13, 3, 4))
    with torch.no_grad():
        tower: Any = model.declared.shared
        logits = tower.logits({"category": slots}, {"dense": torch.from_numpy(held.dense)}).numpy()
    evaluation = task.judge(model, "test")
    assert evaluation.metrics["AUC"] == pytest.approx(auc(held.labels, logits))
    assert (evaluation.role, evaluation.cases, evaluation.users) == ("test", 13, 0)


def test_the_final_figures_stand_beside_those_of_the_mean() -> None:
    task = labelled()
    figures = dict(task.final(learned()))
    rate = task.examples.examples(np.arange(5)).labels.mean()
    labels = task.examples.held_out("test").labels
    entropy = -np.mean(labels * np.log(rate) + (1 - labels) * np.log(1 - rate))
    assert figures["base rate"].metrics == pytest.approx({"AUC": 0.5, "logloss": entropy})
    assert figures["model"].cases == 13


def test_of_classes_the_mean_is_the_share_of_each() -> None:
    task = labelled(num_classes=4)
    labels = task.examples.examples(np.arange(5)).labels
    shares = np.bincount(labels.astype(int), minlength=4) / len(labels)
    test = task.examples.held_out("test").labels.astype(int)
    name, figures = next(task.final(learned()))
    assert name == "base rate"
    assert figures.metrics["logloss"] == pytest.approx(-np.mean(np.log(np.maximum(shares[test], 1e-12))))


def test_there_is_nothing_to_rank() -> None:
    with pytest.raises(RecipeError, match="leave --protocol out"):
        labelled().judge(learned(), "test", "full")


def test_a_vocabulary_of_everybodys_values_is_for_standalone_training_only() -> None:
    task = labelled()
    counted = replace(task, examples=replace(task.examples, counted_over_everyone=True))  # type: ignore[type-var]
    with pytest.raises(RecipeError, match="standalone"):
        counted.client_data()
    assert len(list(counted.central(1)))


def test_what_each_client_keeps_cannot_be_trained_centrally_on_pooled_examples() -> None:
    class Registered:
        def make(self, kind: str, part: Any, path: str) -> Any:
            return SimpleNamespace(declare=lambda schema, generator: cases()["clicks"].model)

    task = labelled(overrides=("mode=standalone",))
    registry: Any = Registered()
    setting = Setting(task.recipe, registry, task, Hooks.none(), task.draws, lambda: 0.0)
    with pytest.raises(RecipeError, match=r"the parameters own live on devices.*mode = 'simulated'"):
        Standalone(setting)


# Whole runs


@pytest.fixture
def click_run(tmp_path: Path) -> Callable[..., fedtower.Run]:
    """Runs a recipe of clicks on made-up lines."""
    data = clicks.write(tmp_path)

    def run(name: str, *overrides: str) -> fedtower.Run:
        given = [
            f"data.{key}={str(value)!r}" if key == "path" else f"data.{key}={value}" for key, value in data.items()
        ]
        small = ["local.share=0.5", "rounds=6", "evaluation.every=2", "checkpoint.every=2", "runtime.name=torch_loop"]
        return fedtower.run(name, [*given, *small, *overrides], runs=tmp_path / "runs")

    return run


@pytest.mark.parametrize("name", ["wide-deep-criteo", "dlrm-criteo"])
@pytest.mark.parametrize(
    "overrides",
    [(), ("data.silos=column",), ("mode=standalone",), ("mode=standalone", "data.categories=counted")],
    ids=["contiguous", "column", "standalone", "counted"],
)
def test_clicks_are_learnt(click_run: Callable[..., fedtower.Run], name: str, overrides: tuple[str, ...]) -> None:
    done = click_run(name, *overrides)
    assert set(done.metrics) == {"AUC", "logloss"}
    assert done.evaluate().metrics == pytest.approx(done.metrics)
    assert [baseline["name"] for baseline in done.summary["baselines"]] == ["base rate"]


def test_a_run_on_examples_that_is_stopped_ends_with_the_same_bits(
    click_run: Callable[..., fedtower.Run], tmp_path: Path
) -> None:
    whole = click_run("dlrm-criteo")
    again = fedtower.resume(click_run("dlrm-criteo", "checkpoint.keep=5").folder, start=2)
    mine, yours = (done.trained.training.learned() for done in (whole, again))
    assert_same_bits(dict(mine.parameters), dict(yours.parameters))
    ids = np.arange(51 * 26, dtype=np.int64)
    assert torch.equal(mine.fetch(ids), yours.fetch(ids))


@pytest.mark.parametrize("name", ["wide-deep-criteo", "dlrm-criteo"])
def test_public_clicks_train_the_rows_and_a_stopped_run_ends_with_the_same_bits(
    click_run: Callable[..., fedtower.Run], name: str
) -> None:
    settings = ["rows.train=public", "rows.public.share=0.4", "rows.public.warmup=2", "standalone.batch_size=16"]
    whole = click_run(name, *settings)
    again = fedtower.resume(click_run(name, *settings, "checkpoint.keep=5").folder, start=2)
    mine, yours = (dict(done.trained.training.snapshot()) for done in (whole, again))
    assert int(mine["tables/generation"]) == 2 + 6
    assert_same_bits(mine, yours)


def test_a_federated_run_on_a_counted_vocabulary_is_refused(click_run: Callable[..., fedtower.Run]) -> None:
    with pytest.raises(RecipeError, match="hashed"):
        click_run("dlrm-criteo", "data.categories=counted")


def test_a_model_of_histories_is_refused_and_so_is_a_loss_of_them(click_run: Callable[..., fedtower.Run]) -> None:
    with pytest.raises(RecipeError, match="learns from histories"):
        click_run("dlrm-criteo", "model.name=dssm")
    with pytest.raises(RecipeError, match="sampled_softmax"):
        click_run("dlrm-criteo", "local.loss=sampled_softmax")


@pytest.mark.parametrize(
    ("num_classes", "loss", "message"),
    [
        (
            0,
            "cross_entropy",
            r"'cross_entropy' does not fit this data, whose labels are 0 or 1: set local\.loss = 'bce'",
        ),
        (
            4,
            "bce",
            r"'bce' does not fit this data, whose labels are one of 4 classes: set local\.loss = 'cross_entropy'",
        ),
    ],
)
def test_a_loss_for_labels_of_the_other_kind_is_refused(num_classes: int, loss: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        labelled(num_classes=num_classes, overrides=(f"local.loss={loss}",))


@pytest.mark.parametrize("setting", ["split='time'", "validation=false", "test_fraction=0.1"])
def test_how_histories_are_split_is_no_setting_of_examples(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"data\.{name} = .* says how histories are split.*leave data\.{name} out"):
        labelled(overrides=(f"data.{setting}",))


def test_where_no_negatives_are_drawn_nobody_says_of_which_items() -> None:
    with pytest.raises(RecipeError, match=r"local\.negatives_from = 'untrained' .* holds labelled examples"):
        labelled(overrides=("local.negatives_from='untrained'",))
    with pytest.raises(RecipeError, match=r"'in_batch_softmax' draws none"):
        LocalSettings(steps=1, loss="in_batch_softmax", negatives_from="untrained")


@pytest.mark.parametrize("name", ["fedavg-mnist-mlp", "fedsgd-mnist-mlp", "fedavg-mnist-lenet5"])
@pytest.mark.parametrize("mode", ["simulated", "standalone"])
def test_digits_are_learnt(tmp_path: Path, name: str, mode: str) -> None:
    data = digits.write(tmp_path)
    given = [f"data.path={data['path']!r}", "data.clients=12", "data.validation_images=30"]
    small = ["rounds=2", "cohort.size=4", "standalone.epochs=1", f"mode={mode}"]
    done = fedtower.run(name, [*given, *small], runs=tmp_path / "runs")
    assert set(done.metrics) == {"accuracy", "logloss"}


def test_on_the_command_line_a_run_on_examples_shows_their_figures_and_recommends_nothing(
    click_run: Callable[..., fedtower.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(click_run("wide-deep-criteo").folder)
    assert call(["evaluate", folder]) == 0
    assert "AUC" in capsys.readouterr().out
    assert call(["recommend", folder, "--user", "1"]) == RecipeError.exit_code
    assert "there are no items to recommend" in " ".join(capsys.readouterr().err.split())
    assert call(["evaluate", folder, "--protocol", "full"]) == RecipeError.exit_code
    assert call(["data", "card", "criteo", "-o", f"data.path={tmp_path / 'train.txt'}", *_CARD]) == 0
    assert "training examples" in capsys.readouterr().out
    assert call(["report", folder]) == 0
    assert "base rate" in Path(folder, "report.html").read_text("utf-8")


def test_the_table_at_the_end_of_a_run_has_the_datas_own_figures(
    click_run: Callable[..., fedtower.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = click_run("wide-deep-criteo").folder
    again = [f"data.train_rows={110}", f"data.path={str(folder.parents[1] / 'train.txt')!r}"]
    words = [word for each in again for word in ("-o", each)]
    assert call(["run", str(folder / "recipe.toml"), *words, "--runs", str(folder.parent)]) == 0
    shown = capsys.readouterr().out
    heading = next(line for line in shown.splitlines() if "protocol" in line)
    assert list(heading.replace("┃", " ").split()) == ["protocol", "model", "AUC", "logloss"]
    assert "HR@10" not in shown


_CARD = ["-o", "data.train_rows=110", "-o", "data.validation_rows=20", "-o", "data.test_rows=20"]


def test_a_few_rounds_of_federated_averaging_tell_nine_digits_of_ten(shared_data: Path, tmp_path: Path) -> None:
    data = [f"data.path={str(shared_data / 'mnist')!r}"]
    done = fedtower.run("fedavg-mnist-mlp", [*data, "rounds=6", "evaluation.every=0"], runs=tmp_path)
    assert done.metrics["accuracy"] > 0.9
