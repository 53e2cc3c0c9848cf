"""The index of a run: built at the end, judged, saved, used by recommend, and refused where there can be none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cli import call
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.recipe import load_recipe, parse_recipe
from fedtower.plugins.datasets.criteo import example as clicks
from fedtower.recsys.index_of_run import keys_of, queries_of
from fedtower.recsys.retrieval import recall
from fedtower.recsys.run import Run, load, resume
from fedtower.recsys.tasks import Histories
from fedtower.recsys.trained import Trained


@pytest.fixture(scope="session")
def faiss_run(small: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with an index that looks at two of forty lists only."""
    given = {**small, "rounds": 2, "index.name": "faiss", "index.nlist": 40, "index.nprobe": 2}
    return fedtower.run("dssm-synthetic", given, runs=tmp_path_factory.mktemp("faiss"))


@pytest.fixture
def copy(faiss_run: Run, tmp_path: Path) -> Path:
    """The same, to write into."""
    return Path(shutil.copytree(faiss_run.folder, tmp_path / "run"))


def histories(trained: Trained) -> Histories:
    assert isinstance(trained.setting.task, Histories)
    return trained.setting.task


def test_products_of_queries_and_keys_are_the_models_scores(federated_run: Run) -> None:
    trained, clients = federated_run.trained, np.arange(60)
    task, learned = histories(trained), trained.training.learned()
    scorer, cut = task.scorer(learned, "now"), task.population.events(clients).lengths
    products = queries_of(learned, scorer.vectors(clients, cut)) @ keys_of(learned, 200).T
    np.testing.assert_allclose(products, scorer.score_all(clients, cut), rtol=1e-4, atol=1e-5)


def test_without_a_word_about_it_a_run_has_the_exact_index(federated_run: Run) -> None:
    figures = federated_run.summary["index"]
    assert (figures["name"], figures["items"], figures["at"], figures["round"]) == ("exact", 200, 10, 6)
    assert figures["recall"] == 1.0
    assert figures["bytes"] == 200 * (9 * 4 + 8)
    saved = read_checkpoint(federated_run.folder / "index", 6)
    np.testing.assert_array_equal(saved["vectors"], keys_of(federated_run.trained.training.learned(), 200))


def test_recall_is_of_the_users_of_test_items(faiss_run: Run) -> None:
    figures, trained = faiss_run.summary["index"], faiss_run.trained
    task, learned = histories(trained), trained.training.learned()
    (cases,) = {event["cases"] for event in faiss_run.summary["evaluations"] if event["role"] == "test"}
    assert figures["queries"] == cases
    assert figures["name"] == "faiss"
    assert trained.index is not None
    clients = np.arange(task.num_clients)
    events = task.population.events(clients)
    # The last event of each user is the test item: she is looked up as she was before it.
    asked = queries_of(learned, task.scorer(learned, "test").vectors(clients, events.lengths - 1))
    best = np.argsort(-(asked @ keys_of(learned, 200).T), axis=1, kind="stable")[:, :10]
    assert figures["recall"] == pytest.approx(recall(trained.index.search(asked, 10)[0], best), abs=1e-9)
    assert 0.2 < figures["recall"] < 1.0


def test_recommend_takes_its_candidates_from_the_index(faiss_run: Run) -> None:
    task = histories(faiss_run.trained)
    differs = 0
    for client in range(30):
        user = task.population.user_name(client)
        seen = {task.population.item_name(int(item)) for item in task.population.events(np.array([client])).items}
        quick, exact = (faiss_run.recommend(user, 10, exact=exact) for exact in (False, True))
        assert len(quick) == len(exact) == 10
        assert not seen & {each.item for each in quick}
        scores = {each.item: each.score for each in faiss_run.recommend(user, 200, exact=True)}
        for each in quick:
            assert each.score == pytest.approx(scores[each.item], rel=1e-4, abs=1e-5)
            assert each.title == task.population.item_title(int(each.item.removeprefix("i")))
        differs += [each.item for each in quick] != [each.item for each in exact]
    assert differs > 0, "an index that looks at a twentieth of the items must miss some"


def test_more_than_the_index_looks_at_is_found_by_scoring_all(faiss_run: Run) -> None:
    quick, exact = (faiss_run.recommend("u3", 150, exact=exact) for exact in (False, True))
    assert [each.item for each in quick] == [each.item for each in exact]


def test_a_run_whose_index_is_gone_recommends_by_scoring_all(copy: Path) -> None:
    shutil.rmtree(copy / "index")
    trained = load(copy)
    assert trained.index is None
    assert trained.recommend("u3", 5) == trained.recommend("u3", 5, exact=True)


@pytest.mark.parametrize("file", ["0000.npy", "manifest.json"])
def test_a_damaged_index_is_told_with_two_ways_on(copy: Path, file: str) -> None:
    path = copy / "index" / "000002" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"index/000002 .*recommend RUN --exact.*resume RUN"):
        load(copy).recommend("u3", 5)
    assert len(load(copy).recommend("u3", 5, exact=True)) == 5
    resume(copy)
    assert len(load(copy).recommend("u3", 5)) == 5


def test_an_index_of_other_settings_is_refused(copy: Path) -> None:
    recipe = (copy / "recipe.toml").read_text("utf-8")
    (copy / "recipe.toml").write_text(recipe.replace('"ivf_flat"', '"sq8"'), "utf-8")
    with pytest.raises(CheckpointError, match="was it built with another"):
        load(copy).recommend("u3", 5)


def test_a_model_without_inner_products_has_no_index_and_refuses_one_in_words(tmp_path: Path) -> None:
    data = {
        f"data.{key}": str(value) if isinstance(value, Path) else value for key, value in clicks.write(tmp_path).items()
    }
    given = {**data, "rounds": 1, "local.share": 0.1, "runtime.name": "torch_loop", "evaluation.every": 0}
    done = fedtower.run("wide-deep-criteo", given, runs=tmp_path)
    assert "index" not in done.summary
    assert not (done.folder / "index").exists()
    with pytest.raises(RecipeError, match=r"index.name = 'exact' cannot be built.*scores of the model 'wide_deep' are"):
        fedtower.run("wide-deep-criteo", {**given, "index.name": "exact"}, runs=tmp_path / "refused")
    (refused,) = (tmp_path / "refused").iterdir()
    assert not (refused / "checkpoints").exists(), "it is refused before anything is trained"


def test_naming_an_index_is_enough_in_a_recipe_and_a_misspelt_one_is_refused(small: Mapping[str, Any]) -> None:
    options = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in small.items()]
    recipe = load_recipe("dssm-synthetic", [*options, "index.kind=hnsw", "index.name=faiss"])
    assert recipe.index is not None
    assert recipe.index.settings == {"kind": "hnsw", "metric": "nearest"}
    assert parse_recipe(recipe.to_dict()) == recipe
    assert load_recipe("dssm-synthetic", options).index is None
    with pytest.raises(RecipeError, match=r"no plugin offers the index 'fais' .did you mean 'faiss'"):
        load_recipe("dssm-synthetic", [*options, "index.name=fais"])


def test_commands_tell_of_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["recommend", str(copy), "--user", "u3", "-k", "3", "--json"]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert call(["recommend", str(copy), "--user", "u3", "-k", "3", "--exact", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert [set(each) for each in quick] == [{"item", "title", "score"}] * 3
    assert exact[0]["score"] >= quick[0]["score"] - 1e-5
    assert call(["report", str(copy)]) == 0
    page = (copy / "report.html").read_text("utf-8")
    assert "Retrieval" in page
    assert "recall against all scored" in page
    capsys.readouterr()
    assert call(["resume", str(copy)]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("index:")]
    assert said.startswith("index:  faiss, 200 items: recall@10 0.")
