"""Attacks in whole runs: who attacks and who is judged, what is told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.recipe import CohortSection, Part, load_recipe
from fedtower.core.registry import Registry
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.tasks import Histories
from fedtower.recsys.training import Federated, Setting
from fedtower.recsys.under_attack import besieged

SettingOf = Callable[..., Setting]


def attacked(setting: Setting) -> Setting:
    """The setting as a run makes it of a recipe with ``[attack]``."""
    section = setting.recipe.attack
    assert section is not None
    task = besieged(setting.task, section, setting.registry, setting.draws, setting.hooks)
    return replace(setting, task=task)


def figures(setting: Setting, rounds: int = 6) -> Mapping[str, float]:
    """What the test says after so many rounds."""
    training = Federated(setting)
    for _ in zip(range(rounds), training.rounds(), strict=False):
        pass
    return setting.task.judge(training.learned(), "test").metrics


def learnt(setting: Setting, rounds: int) -> dict[str, Any]:
    """The shared model and the tables after so many rounds."""
    training = Federated(setting)
    for _ in zip(range(rounds), training.rounds(), strict=False):
        pass
    return dict(training.snapshot())


def histories_of(setting: Setting) -> Histories:
    assert isinstance(setting.task, Histories)
    return setting.task


def test_attackers_are_drawn_by_the_seed_and_the_others_are_judged(setting_of: SettingOf) -> None:
    given = {"attack.name": "promote", "attack.share": 0.25}
    task = histories_of(attacked(setting_of(given)))
    again, other = (histories_of(attacked(setting_of({**given, "seed": seed}))) for seed in (task.recipe.seed, 99))
    assert task.siege is not None
    assert again.siege is not None
    assert other.siege is not None
    assert len(task.siege.attackers) == 15
    np.testing.assert_array_equal(task.siege.attackers, again.siege.attackers)
    assert task.siege.market.promoted == again.siege.market.promoted
    assert not np.array_equal(task.siege.attackers, other.siege.attackers)
    assert len(task.siege.honest(task.num_clients)) == 45
    judged = task.judge(Federated(replace(setting_of(given), task=task)).learned(), "test")
    assert judged.users <= 45
    assert "honest users" in judged.protocol_label
    assert task.headline == ("HR@10", "NDCG@10", "ER@10")
    assert {"HR@10", "ER@10"} <= judged.metrics.keys()


def test_only_attackers_make_events_up_and_the_promoted_item_is_rare(setting_of: SettingOf) -> None:
    plain = histories_of(setting_of())
    task = histories_of(attacked(setting_of({"attack.name": "promote", "attack.share": 0.25, "attack.every": 5})))
    assert task.siege is not None
    everyone = np.arange(task.num_clients)
    before, after = plain.population.events(everyone), task.population.events(everyone)
    np.testing.assert_array_equal(before.offsets, after.offsets)
    np.testing.assert_array_equal(before.times, after.times)
    theirs = np.isin(before.owners, task.siege.attackers)
    np.testing.assert_array_equal(before.items[~theirs], after.items[~theirs])
    promoted = task.siege.market.promoted
    assert np.count_nonzero(after.items[theirs] == promoted) > 10 * np.count_nonzero(before.items == promoted)
    touched = np.bincount(before.items, minlength=plain.population.num_items)
    assert touched[promoted] <= np.median(touched)


def test_nobody_attacks_with_a_share_of_nought_and_the_bits_are_those_of_no_attack(setting_of: SettingOf) -> None:
    for name in ("promote", "sign_flip", "label_flip", "alie"):
        nobody = attacked(setting_of({"attack.name": name, "attack.share": 0.0}))
        found, plain = figures(nobody, 2), figures(setting_of(), 2)
        assert {**plain, "ER@10": found["ER@10"]} == found


@pytest.mark.parametrize("name", ["promote", "sign_flip", "label_flip", "alie"])
def test_an_attack_changes_what_is_learnt(name: str, setting_of: SettingOf) -> None:
    given = {"attack.name": name, "attack.share": 0.2, "transport.block": 12}
    with_it, without = (learnt(attacked(setting_of({**given, "attack.share": share})), 3) for share in (0.2, 0.0))
    assert any(not np.array_equal(value, without[name]) for name, value in with_it.items())


ALIE = {"attack.name": "alie", "attack.share": 0.25}


def test_what_is_made_of_the_whole_cohort_does_not_depend_on_the_block(setting_of: SettingOf) -> None:
    just, wider = (learnt(attacked(setting_of({**ALIE, "transport.block": block})), 2) for block in (12, 50))
    assert_same_bits(just, wider)


def in_process(block: int) -> Part:
    return Part("in_process", {"block": block, "dropout": 0.0})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"transport": in_process(11)}, r"'alie' .* transport\.block = 11 .*: set transport\.block = 12,"),
        (
            {"transport": in_process(32), "cohort": CohortSection(Part("uniform", {"size": 90}))},
            r"set transport\.block = 60, as many as a cohort may have",
        ),
        (
            {"transport": in_process(59), "cohort": CohortSection(Part("poisson", {"client_rate": 0.1}))},
            r"set transport\.block = 60,",
        ),
        ({"cohort": CohortSection(Part("uniform", {"size": 9}), 1.5)}, r"leave cohort\.over_selection out"),
        ({"asynchronous": AsynchronousSettings(concurrency=6, buffer=3)}, r"leave \[asynchronous\] out"),
        ({"transport": Part("hers")}, r"'hers' has no setting `block` .* transport\.name = \"in_process\""),
    ],
)
def test_what_is_made_of_the_whole_cohort_is_refused_where_it_comes_in_parts(
    other: Mapping[str, Any], words: str, setting_of: SettingOf
) -> None:
    def made(**given: Any) -> Setting:
        setting = setting_of({**ALIE, **{f"attack.{key}": value for key, value in given.items()}})
        recipe = replace(setting.recipe, **other)
        return attacked(replace(setting, recipe=recipe, task=replace(histories_of(setting), recipe=recipe)))

    made(share=0.0)
    made(name="sign_flip")
    with pytest.raises(RecipeError, match=words):
        made()


# Attackers would leave the transform that clips out.
LONGER = {"transforms.0.norm": 1e9, "transport.dropout": 0.0, "cohort.size": 20, "transport.block": 20, "rounds": 20}


@pytest.fixture(scope="module")
def after_twenty_rounds(setting_of: SettingOf) -> Callable[..., Mapping[str, float]]:
    """The figures of a run under an attack."""

    def train(share: float, name: str, **given: Any) -> Mapping[str, float]:
        attack = {"attack.name": name, "attack.share": share, "model.user_vector": False}
        dotted = {key.replace("__", "."): value for key, value in given.items()}
        return figures(attacked(setting_of({**LONGER, **attack, **dotted})), 20)

    return train


@pytest.fixture(scope="module")
def clean(after_twenty_rounds: Callable[..., Mapping[str, float]]) -> Mapping[str, float]:
    """The figures of a run in which nobody attacks."""
    return after_twenty_rounds(0.0, "promote")


def test_undefended_a_tenth_ruins_the_model_and_a_median_does_not_mind(
    clean: Mapping[str, float], after_twenty_rounds: Callable[..., Mapping[str, float]]
) -> None:
    bare = after_twenty_rounds(0.1, "sign_flip")
    median = after_twenty_rounds(0.1, "sign_flip", aggregator__name="median")
    assert bare["HR@10"] < clean["HR@10"] - 0.1
    assert median["HR@10"] > bare["HR@10"] + 0.1


def test_undefended_the_promoted_item_is_shown_to_everybody(
    clean: Mapping[str, float], after_twenty_rounds: Callable[..., Mapping[str, float]]
) -> None:
    bare = after_twenty_rounds(0.2, "promote", attack__every=5)
    assert clean["ER@10"] < 0.2
    assert bare["ER@10"] > 0.8


def test_a_run_tells_its_exposure_and_goes_on_with_the_same_bits(small: Mapping[str, Any], tmp_path: Any) -> None:
    given = {**small, "attack.name": "alie", "attack.share": 0.2, "attack.z": 1.5}
    done = fedtower.run("dssm-synthetic", given, runs=tmp_path)
    assert 0.0 <= done.metrics["ER@10"] <= 1.0
    assert done.evaluate().metrics == done.metrics
    text = (done.folder / "recipe.toml").read_text()
    assert "[attack]" in text
    assert "share = 0.2" in text


@pytest.mark.parametrize("mode", ["standalone", "deployed"])
def test_other_modes_have_no_attackers(mode: str, registry: Registry) -> None:
    given = ["attack.name=alie", "attack.share=0.1", f"mode={mode}"]
    with pytest.raises(RecipeError, match=rf'\[attack\] is for mode = "simulated", .* this is mode = "{mode}"'):
        load_recipe("dssm-synthetic", given, registry)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attack.share": 1.0}, r"attack\.share must be at least 0 and below 1, not 1\.0"),
        ({"attack.share": -0.1}, r"attack\.share must be at least 0 and below 1"),
        ({"attack.share": 0.1, "attack.name": "aliee"}, r"alie"),
        ({"attack.share": 0.1, "attack.zz": 1}, r"attack\.zz is not a setting of ALIE"),
        ({}, r"attack\.share is missing"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_recipe_is_read(
    given: Mapping[str, Any], words: str, setting_of: SettingOf
) -> None:
    with pytest.raises(RecipeError, match=words):
        setting_of({"attack.name": "alie", **given})


def test_a_share_that_leaves_nobody_is_refused(setting_of: SettingOf) -> None:
    with pytest.raises(RecipeError, match=r"attack\.share = 0\.999 makes all 60 clients attackers"):
        attacked(setting_of({"attack.name": "alie", "attack.share": 0.999}))


def test_made_up_events_want_a_split_that_holds_the_last_ones_out(setting_of: SettingOf) -> None:
    given = {"attack.share": 0.1, "data.split": "time"}
    attacked(setting_of({"attack.name": "alie", **given}))
    with pytest.raises(RecipeError, match=r"'promote' makes events up, .* not 'time'"):
        attacked(setting_of({"attack.name": "promote", **given}))


def test_labelled_examples_are_refused(registry: Registry, setting_of: SettingOf) -> None:
    setting = setting_of({"attack.name": "sign_flip", "attack.share": 0.1})

    class Digits:
        card = setting.task.card

    assert setting.recipe.attack is not None
    with pytest.raises(RecipeError, match=r"\[attack\] is on histories of items, and .* holds labelled examples"):
        besieged(Digits(), setting.recipe.attack, registry, Draws(1), setting.hooks)  # type: ignore[arg-type]
