"""Shared parameters that go down in fewer bytes, in whole runs: what is kept, what is counted, and what is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtower
from fedtower.core.checkpoint import grouped, list_checkpoints
from fedtower.core.client import VisitCosts
from fedtower.core.hooks import hookimpl
from fedtower.core.round import make_plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.run import Run
from fedtower.recsys.runlog import RunLog
from fedtower.recsys.testing.states import saved
from fedtower.recsys.training import Federated, Setting

SELECTIVE = {"download.name": "selective", "download.share": 0.05}
QUANTIZE = {"download.name": "quantize", "download.bits": 4}


class StopAfter:
    """A plugin that ends the run after some round."""

    def __init__(self, round: int) -> None:
        self.round = round

    @hookimpl
    def stop_run(self, report: Any) -> str | None:
        return "it was told to" if report.round == self.round else None


def state(run: Run) -> dict[str, Any]:
    """The newest checkpoint, with what clients keep."""
    checkpoints = run.folder / "checkpoints"
    return saved(checkpoints, list_checkpoints(checkpoints)[-1])


def bytes_down(run: Run) -> list[int]:
    return [each["bytes_down"] for each in RunLog(run.folder).record().rounds]


@pytest.mark.parametrize("download", [SELECTIVE, QUANTIZE], ids=["selective", "quantize"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits_and_bytes(
    tmp_path: Path, small: Mapping[str, Any], download: Mapping[str, Any]
) -> None:
    settings = {**small, **download, "evaluation.every": 0}
    straight = fedtower.run("dssm-synthetic", settings, runs=tmp_path)
    # Blocks of another width change no bit, either.
    stopped = fedtower.run(
        "dssm-synthetic", {**settings, "transport.block": 5}, runs=tmp_path, observers=[StopAfter(3)]
    )
    fedtower.resume(stopped.folder)
    assert_same_bits(state(stopped), state(straight))
    assert bytes_down(stopped) == bytes_down(straight)


def test_a_share_of_one_is_a_run_without_to_the_last_bit(
    tmp_path: Path, small: Mapping[str, Any], federated_run: Run
) -> None:
    run = fedtower.run("dssm-synthetic", {**small, "download.name": "selective", "download.share": 1.0}, runs=tmp_path)
    ours, theirs = state(run), state(federated_run)
    assert set(ours) - set(theirs) == {name for name in ours if "download" in name}
    assert_same_bits({name: ours[name] for name in theirs}, theirs)
    # What stands still for a round, a dead unit's weights, does not even then go down again.
    assert all(mine <= yours for mine, yours in zip(bytes_down(run), bytes_down(federated_run), strict=True))
    assert bytes_down(run)[0] == bytes_down(federated_run)[0]


@pytest.mark.parametrize("download", [SELECTIVE, QUANTIZE], ids=["selective", "quantize"])
def test_the_servers_own_parameters_are_judged_and_what_stays_on_devices_is_not_sent(
    setting_of: Callable[..., Setting], download: Mapping[str, Any]
) -> None:
    training = Federated(setting_of({**download, "rounds": 3}))
    for _ in training.rounds():
        pass
    sent, held = make_plan(training._state, training._parts).parameters, training.learned().parameters
    assert "user_vector" not in sent
    assert any(not np.array_equal(sent[name], value) for name, value in held.items())
    assert_same_bits(dict(held), grouped(training.snapshot(), "parameters"))


def test_a_visit_is_known_to_cost_what_it_turns_out_to(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of({**SELECTIVE, "rounds": 3})
    training = Federated(setting)
    for _ in training.rounds():
        pass
    parts, clients = training._parts, np.arange(40)
    plan = make_plan(training._state, parts)
    costs = VisitCosts(setting.task.client_data(), parts.client.rows, block=7, store=parts.client.store)
    updates = parts.client.visit(plan, clients)
    np.testing.assert_array_equal(costs(plan, clients).bytes_down, updates.metrics["bytes_down"])
    assert plan.publication is not None
    needed = set(plan.bytes_down(np.array([0, 1, 2, 3])).tolist())
    assert len(needed) == 4, "who was never there, and who was there in each of the rounds"
