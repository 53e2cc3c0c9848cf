"""The log of a run: what is written comes back, and what was overtaken does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedtower.core.errors import CheckpointError, StorageError
from fedtower.recsys.runlog import RunLog, open_run


def log_with_rounds(folder: Path, *rounds: int) -> RunLog:
    log = RunLog(folder)
    log.append("run_started", name="small", mode="simulated", seed=3, rounds=9)
    for number in rounds:
        log.append("round", round=number, loss=1 / number, bytes_up=10, bytes_down=20, seconds=0.5, dropped=1)
    return log


def test_a_line_is_one_json_object_with_its_event_and_time(tmp_path: Path) -> None:
    log = RunLog(tmp_path, clock=lambda: datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC))
    log.append("warning", message="two\nlines")
    written = {"event": "warning", "time": "2031-05-04T03:02:01+00:00", "message": "two\nlines"}
    assert json.loads((tmp_path / "log.jsonl").read_text("utf-8")) == written
    assert (tmp_path / "log.jsonl").read_text("utf-8").count("\n") == 1
    assert list(log.events()) == [written]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(
        "round", round=np.int64(1), loss=float("nan"), metrics={"x": np.float32(0.5), "y": np.inf}, path=tmp_path
    )
    event = next(iter(log.events()))
    assert (event["round"], event["loss"], event["metrics"], event["path"]) == (
        1,
        None,
        {"x": 0.5, "y": None},
        str(tmp_path),
    )


def test_a_torn_last_line_is_left_out_and_what_comes_after_it_is_not(tmp_path: Path) -> None:
    log = log_with_rounds(tmp_path, 1, 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-20])
    assert [event["round"] for event in log.record().rounds] == [1]
    log.append("resumed", round=1)
    log.append("round", round=2, loss=0.25)
    assert [(event["round"], event["loss"]) for event in log.record().rounds] == [(1, 1.0), (2, 0.25)]
    assert [event["round"] for event in log.record().resumed] == [1]


@pytest.mark.parametrize("cut", range(1, 60))
def test_wherever_a_kill_tears_the_last_line_the_others_are_read(tmp_path: Path, cut: int) -> None:
    log = log_with_rounds(tmp_path, 1, 2)
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    expected = [1, 2] if cut == 1 else [1]
    assert [event["round"] for event in log.record().rounds] == expected


def test_of_a_round_that_ran_twice_the_later_counts(tmp_path: Path) -> None:
    log = log_with_rounds(tmp_path, 1, 2, 3)
    log.append("evaluation", round=2, role="validation", label="x", metrics={"HR@10": 0.1})
    log.append("evaluation", round=3, role="validation", label="x", metrics={"HR@10": 0.2})
    log.append("resumed", round=1)
    log.append("round", round=2, loss=0.125, bytes_up=10)
    record = log.record()
    assert [(event["round"], event["loss"]) for event in record.rounds] == [(1, 1.0), (2, 0.125)]
    assert record.evaluations == ()
    assert record.total("bytes_up") == 20
    assert record.last_round == 2


def test_a_resumed_run_is_not_finished(tmp_path: Path) -> None:
    log = log_with_rounds(tmp_path, 1)
    log.append("run_finished", rounds=1)
    assert log.record().finished
    log.append("resumed", round=1)
    assert log.record().finished is None


def test_a_baseline_and_a_card_survive_a_resume(tmp_path: Path) -> None:
    log = log_with_rounds(tmp_path, 1, 2)
    log.append("data", card={"name": "small", "users": 3})
    log.append("baseline", name="ItemPop", role="test", label="x", metrics={"HR@10": 0.1})
    log.append("resumed", round=0)
    record = log.record()
    assert (record.card["users"], record.baselines[0]["name"], record.rounds) == (3, "ItemPop", ())


def test_the_newest_evaluation_of_each_protocol_is_final(tmp_path: Path) -> None:
    log = log_with_rounds(tmp_path, 1, 2)
    for number, label, value in ((1, "a", 0.1), (1, "b", 0.2), (2, "a", 0.3)):
        log.append("evaluation", round=number, role="test", label=label, metrics={"HR@10": value}, cases=5, users=5)
    log.append("evaluation", round=2, role="validation", label="a", metrics={"HR@10": 0.9})
    summary = log.record().summary()
    assert {event["label"]: event["metrics"]["HR@10"] for event in log.record().final()} == {"a": 0.3, "b": 0.2}
    assert [event["role"] for event in summary["evaluations"]] == ["validation", "test", "test"]
    assert (summary["rounds"], summary["seconds"], summary["bytes_down"], summary["dropped"]) == (2, 1.0, 40, 2)


def test_row_selection_is_held_against_the_whole_tables(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append("model", shared_bytes=100, table_bytes=900)
    for number in (1, 2):
        log.append("round", round=number, loss=1.0, clients=4, bytes_up=10, bytes_down=800)
    log.append("resumed", round=1)
    told = {"bytes_down_a_visit": 200, "with_whole_tables": 1000, "times_as_much": 5.0}
    assert log.record().summary()["row_selection"] == told


@pytest.mark.parametrize(("tables", "clients"), [(0, 4), (900, 0)], ids=["no tables", "nobody answered"])
def test_where_no_rows_were_selected_nothing_is_said_of_it(tmp_path: Path, tables: int, clients: int) -> None:
    log = RunLog(tmp_path)
    log.append("model", shared_bytes=100, table_bytes=tables)
    log.append("round", round=1, loss=1.0, clients=clients, bytes_up=10, bytes_down=100 * clients)
    assert "row_selection" not in log.record().summary()


def test_a_log_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StorageError, match="resume"):
        RunLog(tmp_path).append("warning", message="x")


def test_a_folder_that_is_no_run_is_refused_with_those_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "dssm-1"
    run.mkdir(parents=True)
    log_with_rounds(run)
    assert open_run(run).folder == run
    with pytest.raises(
        CheckpointError, match=r"runs/dssm-2 does not exist \(did you mean 'dssm-1'\?\).*log\.jsonl.*dssm-1"
    ):
        open_run(Path("runs/dssm-2"))
    with pytest.raises(CheckpointError, match=r"is not a run folder.*runs nearby are .*dssm-1"):
        open_run(tmp_path / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(RunLog(tmp_path).events())
