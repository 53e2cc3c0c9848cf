"""The status of a served run: what its folder says, in words and figures; and the logs of its processes."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedtower.core.cli import call
from fedtower.core.errors import CheckpointError, StorageError
from fedtower.core.journal import Journal, since_boot
from fedtower.core.registry import Registry
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.transports.grpc.seats import Counted, Seat
from fedtower.plugins.transports.grpc.windows import Window
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.process_log import FollowedLogs, ProcessLog, logged
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.runlog import Followed, RunLog
from fedtower.recsys.running import Running, to_json
from fedtower.recsys.status import SILENT, Status, Watched
from fedtower.recsys.status_command import newest, pictured

DSSM = resources.files("fedtower.recsys").joinpath("recipes/dssm-synthetic.toml").read_text("utf-8")
RECIPE = DSSM.replace("simulated", "deployed") + '[transport]\nname = "grpc"\ndeadline_seconds = 60\n'
NAMES = ("supervisor", "intake", "table")


class Served:
    """The folder of a served run, made by hand, with a real journal."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.folder, self.registry, self.log = folder, registry, RunLog(folder)
        (folder / "recipe.toml").write_text(RECIPE)
        (folder / "federation.json").write_text(json.dumps({"name": "ours", "run": "1", "keys": str(folder)}))
        self.log.append("run_started", name="dssm-synthetic", mode="deployed", seed=1, rounds=60)
        self.journal: Journal = SQLite().open(folder / "journal", "ours")
        self.epoch = self.journal.claim()

    def run(self, *names: str) -> None:
        """Let these processes be alive: all are this one."""
        (self.folder / "processes.json").write_text(json.dumps(to_json({n: Running.of(n, os.getpid()) for n in names})))

    def open(self, round: int, task: Any = "train", target: int = 3) -> None:
        window = Window(round, task, pb.SignedArtefact(), np.arange(4), target, 9.0, 3.0, 60.0, since_boot())
        window.write(self.folder / "windows")
        self.journal.open_round(self.epoch, round, task, "ab")

    def status(self) -> Status:
        watched = Watched(RunFolder.open(self.folder), self.registry)
        try:
            return watched.status()
        finally:
            watched.close()


@pytest.fixture
def served(tmp_path: Path, registry: Registry) -> Iterator[Served]:
    made = Served(tmp_path, registry)
    yield made
    made.journal.close()


def nothing(_served: Served) -> None:
    pass


def loaded(served: Served) -> None:
    served.log.append("model", shared_bytes=1, table_bytes=1)


def opened(served: Served) -> None:
    loaded(served)
    served.open(7)


def closed(served: Served) -> None:
    opened(served)
    served.journal.advance(served.epoch, 7, "train", "closed")


def judged(served: Served) -> None:
    closed(served)
    served.journal.advance(served.epoch, 7, "train", "committed")
    served.open(7, "evaluate")


def ended(served: Served) -> None:
    judged(served)
    served.log.append("run_finished", rounds=60)


@pytest.mark.parametrize(
    ("names", "before", "phase", "words"),
    [
        ((), opened, "stopped", "nobody serves it"),
        (NAMES, nothing, "starting", "the data and the model are being loaded"),
        (NAMES, loaded, "waiting", "waiting for devices: 0 of 100 are there"),
        (NAMES, opened, "open", r"round 7 is open: 0 of 3 have answered, (60|59) s left"),
        (NAMES, closed, "folding", "a round is being folded"),
        (NAMES, judged, "evaluating", r"devices evaluate: 0 of 3 have answered, (60|59) s left"),
        (("supervisor", "intake"), loaded, "restarting", "a process is being started again"),
        (("supervisor", "table"), closed, "restarting", "a process is being started again"),
        ((), ended, "finished", "all is done"),
    ],
)
def test_the_phase(
    served: Served, names: tuple[str, ...], before: Callable[[Served], None], phase: str, words: str
) -> None:
    served.run(*names)
    before(served)
    seen = served.status()
    assert seen.phase == phase
    assert re.fullmatch(words, seen.words)
    assert [each["alive"] for each in seen.processes] == [True] * len(names)


def test_a_model_that_an_earlier_process_loaded_is_not_loaded_now(served: Served) -> None:
    RunLog(served.folder, clock=lambda: RunLog(served.folder).clock().replace(year=2020)).append("model")
    served.run(*NAMES)
    assert served.status().phase == "starting"


def test_figures_of_rounds_windows_and_the_public_port(served: Served) -> None:
    for number in range(1, 1001):
        work = {"device_seconds": 300.25, "wasted_seconds": 70.0, "late": 2}
        more = {"refused": {"norm": 1, "repeated": 5}, **work} if number == 3 else {}
        served.log.append(
            "round", round=number, loss=5.0 - number / 1000, clients=8, dropped=2, bytes_up=1, bytes_down=1, **more
        )
    served.log.append(
        "evaluation", round=1000, role="validation", label="on devices", metrics={"HR@10": 0.5, "MRR": 0.1}
    )
    served.open(1000)
    served.journal.advance(served.epoch, 1000, "train", "abandoned", "there were too few")
    seat = Seat.take(served.folder)
    refusals = [({"reason": "late"}, 3.0), ({"reason": "norm"}, 4.0)]
    uploads = [({"task": "train", "duplicate": "false"}, 7.0), ({"task": "train", "duplicate": "true"}, 2.0)]
    counted: Counted = {"fedtower_refusals": refusals, "fedtower_uploads": uploads, "fedtower_sent_bytes": [({}, 9e6)]}
    seat.write({**counted, "fedtower_leases": [({"task": "train"}, 8.0)], "fedtower_received_bytes": [({}, 5e5)]})
    other = Seat.take(served.folder)
    other.write({"fedtower_refusals": [({"reason": "late"}, 2.0)]})
    seen = served.status()
    assert (seen.round, seen.rounds, seen.clients) == (1000, 60, 8000)
    assert seen.work == {"seconds": 300.25, "wasted": 70.0, "late": 2}
    assert seen.dropped == {SILENT: 1999, "refused: norm": 1}
    assert seen.refusals == {"late": 5, "norm": 4}
    assert (seen.leases, seen.acknowledged, seen.duplicates) == ({"train": 8}, {"train": 7}, 2)
    assert (seen.bytes_up, seen.bytes_down) == (500_000, 9_000_000)
    assert seen.loss == 4.0
    assert len(seen.curves["training loss"]) == 200
    assert seen.curves["training loss"][0] == pytest.approx((3.0, 4.997))
    assert seen.windows == [
        {"round": 1000, "task": "train", "state": "abandoned", "accepted": 0, "reason": "there were too few"}
    ]
    assert len(json.dumps(seen.to_dict())) < 20_000
    console = Console(width=80, record=True, file=StringIO())
    console.print(pictured(seen.to_dict()))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    for part in ("late 5, norm 4", f"{SILENT} 1,999, refused: norm 1", "500 kB up, 9.0 MB down", "there were too few"):
        assert part in text
    assert "5 min 00 s, of that 70 s for nothing" in text
    seat.leave()
    other.leave()


def test_a_journal_that_cannot_be_read_is_said_and_the_rest_is_told(served: Served) -> None:
    served.journal.close()
    (served.folder / "journal" / "index.sqlite").write_bytes(b"no database at all" * 100)
    for beside in ("-wal", "-shm"):
        (served.folder / "journal" / f"index.sqlite{beside}").unlink(missing_ok=True)
    seen = served.status()
    assert "index.sqlite is damaged" in seen.trouble
    assert (seen.name, seen.windows) == ("dssm-synthetic", [])


def test_a_run_that_was_never_served_is_refused(tmp_path: Path, registry: Registry, capsys: Any) -> None:
    (tmp_path / "recipe.toml").write_text(DSSM)
    assert call(["status", str(tmp_path)]) == 5
    assert "was not served to devices" in " ".join(capsys.readouterr().err.split())
    assert call(["status", str(tmp_path / "nowhere")]) == 5
    assert call(["status", "--server", "127.0.0.1:1"]) == 11
    assert "is that the address of a live page?" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CheckpointError, match="was served to devices"):
        newest(tmp_path)


def test_the_command_imports_no_torch(served: Served) -> None:
    code = f"""
import sys
from fedtower.core.cli import call
assert call(["status", {str(served.folder)!r}, "--json"]) == 0
print(sorted({{"torch", "pandas", "pyarrow", "onnx"}} & set(sys.modules)))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == "[]"


def test_a_log_that_is_followed_says_what_one_that_is_read_whole_says(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    followed = Followed(log)
    assert followed.record().rounds == ()
    log.append("run_started", name="a", rounds=9)
    for number in range(1, 6):
        log.append("round", round=number, loss=1.0)
        followed.record()
    with log.path.open("ab") as file:
        file.write(b'{"event": "round", "rou')  # torn by a kill
    assert followed.record() == log.record()
    log.append("resumed", round=3)
    log.append("round", round=4, loss=0.5)
    assert followed.record() == log.record()
    assert [event["loss"] for event in followed.record().rounds] == [1.0, 1.0, 1.0, 0.5]
    before = followed.record()
    log.path.write_bytes(log.path.read_bytes().replace(b'"loss": 0.5', b'"loss": 7.5'))  # which is not read again
    assert followed.record() == before
    assert log.record() != before


def test_a_process_is_its_id_and_its_start(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        running = Running.of("table", child.pid)
        assert alive(running)
        assert not Running("table", child.pid, running.started + 1).is_alive  # another that had its id before
        assert abs(running.since.timestamp() - time.time()) < 60.0
        child.kill()
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        assert not alive(running)  # ended, and nobody has asked how
    assert not alive(running)


def alive(running: Running) -> bool:
    return running.is_alive


def test_lines_are_json_and_the_oldest_files_go(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path, "intake", most_bytes=2_000, kept=4)
    for number in range(200):
        log.write("refused", round=number, reason="norm", message='a "quoted"\nline', loss=float("nan"))
    log.write("unwell", level=logging.WARNING, disk="full")
    log.close()
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["intake.jsonl", *(f"intake.jsonl.{age}" for age in (1, 2, 3, 4))]
    assert max(file.stat().st_size for file in files) <= 2_000
    lines = [values for _, values in logged(tmp_path)]
    assert [line["round"] for line in lines[:-1]] == list(range(200 - len(lines) + 1, 200))
    assert len(lines) > 40
    assert lines[0]["loss"] is None
    assert lines[0]["message"] == 'a "quoted"\nline'
    assert (lines[-1]["event"], lines[-1]["level"], lines[-1]["disk"]) == ("unwell", "warning", "full")
    assert {"time", "process", "pid", "level", "event"} <= lines[0].keys()


def test_the_logs_of_all_processes_are_followed_as_one(tmp_path: Path) -> None:
    table = ProcessLog(tmp_path, "table")
    intake = ProcessLog(tmp_path, "intake", most_bytes=600, kept=4)
    followed = FollowedLogs(tmp_path)
    for number in range(6):
        (table, intake)[number % 2].write("event", number=number)
        time.sleep(0.002)  # whose time is told by the millisecond
    assert [values["number"] for values in followed.new()] == list(range(6))
    assert followed.new() == []
    with (tmp_path / "logs" / "table.jsonl").open("a") as file:
        file.write('{"time": "2100", "number": 8')
    for number in (6, 7):
        intake.write("event", number=number)  # into a file of its own: the one before was full
        time.sleep(0.002)
    assert [values["number"] for values in followed.new()] == [6, 7]
    with (tmp_path / "logs" / "table.jsonl").open("a") as file:
        file.write("}\ntorn\n")
    assert [values["number"] for values in followed.new()] == [8]
    assert (tmp_path / "logs" / "intake.jsonl.1").is_file()
    table.close()
    intake.close()
    (tmp_path / "logs" / "table.jsonl").write_text('{"time": "2101", "number": 9}\n')  # another file of the same number
    assert [values["number"] for values in followed.new()] == [9]


def test_the_command_tells_the_log_and_ends_with_the_run(served: Served, capsys: Any) -> None:
    log = ProcessLog(served.folder, "intake")
    log.write("refused", level=logging.WARNING, round=3, reason="norm", message="it is too long")
    log.close()
    assert call(["status", str(served.folder), "--log", "--watch"]) == 0  # no process of it lives
    said = capsys.readouterr().out
    assert said.endswith("intake WARNING refused round=3 reason=norm it is too long\n")
    assert call(["status", str(served.folder), "--log", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "norm"
    assert call(["status", "--server", "127.0.0.1:1", "--log"]) == 2


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        ProcessLog(tmp_path / "file", "intake")
    log = ProcessLog(tmp_path, "intake")
    log.write("one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))  # as a quota that is used up
        log.write("two")
        log.write("three")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    log.write("four")
    log.close()
    assert capsys.readouterr().err.count("cannot be written (File too large)") == 1
    assert {"one", "four"} <= {values["event"] for _, values in logged(tmp_path)}
