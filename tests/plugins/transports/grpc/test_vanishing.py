"""Devices that vanish at random stages of their visits: no round hangs, and what was acknowledged counts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtower.core.cli import call
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, Unreachable
from fedtower.plugins.transports.grpc.swarm import Tally, summary
from fedtower.plugins.transports.grpc.vanishing import STAGES, Fate, Vanished, Vanishing

TINY = {
    "data.items": 220,
    "data.mean_events": 25,
    "model.dim": 4,
    "model.hidden": 8,
    "local.batch_size": 8,
    "local.negatives": 5,
    "local.history_length": 10,
    "evaluation.negatives": 20,
}


@dataclass(frozen=True)
class Trial:
    """How many devices, in how many processes, and what a round asks of them."""

    devices: int
    swarms: int
    rounds: int
    cohort: int
    target: int
    quorum: float
    deadline_seconds: float
    away_seconds: float
    patience_seconds: float  # of who comes back when all is over
    seconds: float

    @property
    def shared(self) -> dict[str, Any]:
        return {**TINY, "data.users": self.devices, "rounds": self.rounds, "cohort.size": self.cohort}

    @property
    def served(self) -> dict[str, Any]:
        return {
            "evaluation.every": max(self.rounds // 2, 1),
            "transport.target": self.target,
            "transport.quorum": self.quorum,
            "transport.deadline_seconds": self.deadline_seconds,
            "transport.evaluation_seconds": max(self.deadline_seconds, 0.06 * self.devices),  # on two cores
            "transport.lease_seconds": self.deadline_seconds / 2,
            "transport.heartbeat_seconds": self.deadline_seconds / 8,
            "transport.presence_seconds": self.deadline_seconds * 2,
        }


def options(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("-o", f"{key}={json.dumps(value)}")]


@contextmanager
def started(path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "fedtower", *arguments]
    with path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30.0)


@dataclass(frozen=True)
class Seen:
    """What the server's log and the swarms say."""

    rounds: list[dict[str, Any]]
    abandoned: dict[int, str]
    evaluations: list[dict[str, Any]]
    tasks: Counter[tuple[int, str, int]]
    done: Counter[tuple[int, str]]
    counts: Counter[str]
    vanished: Counter[str]
    refused: Counter[str]

    def told(self, trial: Trial) -> str:
        """How it went, in lines."""
        asked = sum(count for (_, task, _), count in self.tasks.items() if task == "train")
        again = sum(count - 1 for (_, task, _), count in self.tasks.items() if task == "train")
        counted = sum(each["clients"] for each in self.rounds)
        seconds = sorted(each["seconds"] for each in self.rounds)
        full = sum(each["clients"] >= trial.target for each in self.rounds)
        rest = len(self.rounds) - full - len(self.abandoned)
        return (
            f"{len(self.rounds)} rounds of {trial.cohort} of {trial.devices} devices: {full} had their "
            f"{trial.target} updates, {len(self.abandoned)} were abandoned, {rest} ended with a "
            f"quorum; {seconds[len(seconds) // 2]:.2f} s by the median, {seconds[-1]:.2f} s at most, the "
            f"deadline is {trial.deadline_seconds:g} s\n"
            f"visits to train: {asked:,}, of which {again:,} to devices that were asked again; {counted:,} updates "
            f"counted, so {100 * (1 - counted / max(asked, 1)):.0f} % of the visits were for nothing\n"
            f"vanished: {dict(self.vanished)}; refused: {dict(self.refused)}"
        )


def run(trial: Trial, place: Path) -> Seen:
    """The trial, to its end."""
    keys, shards = place / "keys", place / "shards"
    for command in (
        ("data", "shard", "dssm-synthetic", str(shards), "-n", str(trial.devices), *options(trial.shared)),
        ("certs", str(keys), "--host", "127.0.0.1"),
        ("keygen", str(keys)),
    ):
        assert call(command) == 0
    with (place / "codes").open("w") as codes, redirect_stdout(codes):
        asked = ("enrol", "codes", str(keys / "credentials.sqlite"), "-n", str(trial.devices), "--first-client", "0")
        assert call(asked) == 0
    serve = ("serve", "dssm-synthetic", "--port", "0", "--keys", str(keys), "--runs", str(place / "runs"))
    with started(place / "serve.log", *serve, *options({**trial.shared, **trial.served})) as server:
        port = json.loads(found(place / "runs", "*/intake.json", server).read_text())["port"]
        called = ("swarm", "--server", f"127.0.0.1:{port}", "--data", str(shards), "--codes", str(place / "codes"))
        fate = (
            "--vanish",
            "0.3",
            "--away",
            str(trial.away_seconds),
            "--seed",
            "6",
            "--patience",
            str(trial.patience_seconds),
            "--json",
            "--keys",
            str(keys),
        )
        share = trial.devices // trial.swarms
        swarms = [place / f"swarm-{number}.log" for number in range(trial.swarms)]
        with swarm(swarms, share, *called, *fate) as running:
            assert server.wait(trial.seconds) == 0, (place / "serve.log").read_text()[-3000:]
            for process, log in zip(running, swarms, strict=True):
                assert process.wait(120.0) in (0, Unreachable.exit_code), log.read_text()[-3000:]
    return seen(found(place / "runs", "*/log.jsonl", server), swarms)


@contextmanager
def swarm(logs: list[Path], share: int, *arguments: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A swarm a log, each of so many devices."""
    if not logs:
        yield []
        return
    place = str(share * (len(logs) - 1))
    with (
        started(logs[-1], *arguments, "-n", str(share), "--first", place) as last,
        swarm(logs[:-1], share, *arguments) as others,
    ):
        yield [*others, last]


def found(folder: Path, pattern: str, server: subprocess.Popen[bytes]) -> Path:
    until = time.monotonic() + 120.0
    while not (paths := list(folder.glob(pattern))):
        assert time.monotonic() < until
        assert server.poll() is None, "the server has ended"
        time.sleep(0.05)
    return paths[0]


def seen(log: Path, swarms: list[Path]) -> Seen:
    events = [json.loads(line) for line in log.read_text().splitlines()]
    warned = [event["message"] for event in events if event["event"] == "warning"]
    told = [event for path in swarms for event in told_by(path)]
    last = [[event for event in told_by(path) if event["event"] == "progress"][-1] for path in swarms]
    return Seen(
        rounds=[event for event in events if event["event"] == "round"],
        abandoned={int(words.split()[1]): words.partition(": ")[2] for words in warned if " was abandoned: " in words},
        evaluations=[event for event in events if event["event"] == "evaluation"],
        tasks=Counter((each["round"], each["task"], each["client"]) for each in told if each["event"] == "task"),
        done=Counter((each["round"], each["task"]) for each in told if each["event"] == "done"),
        counts=sum((Counter({k: v for k, v in each.items() if isinstance(v, int)}) for each in last), Counter()),
        vanished=sum((Counter(each["vanished"]) for each in last), Counter()),
        refused=sum((Counter(each["refused"]) for each in last), Counter()),
    )


def told_by(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def check(trial: Trial, seen: Seen) -> None:
    assert [each["round"] for each in seen.rounds] == list(range(1, trial.rounds + 1))
    # Who is away when the last round ends finds nobody there any more, and gives up.
    assert seen.counts["over"] + seen.counts["failed"] == trial.devices, seen.counts
    assert seen.counts["over"] > trial.devices / 2
    assert set(seen.vanished) == set(STAGES)
    for each in seen.rounds:
        round, counted = each["round"], each["clients"]
        if round in seen.abandoned:
            assert counted == 0
            assert "and the quorum is" in seen.abandoned[round]
        else:
            # What a device was told is taken counts, and so may what it never heard of.
            assert counted >= max(seen.done[round, "train"], trial.quorum * trial.target), round
    # How much was for nothing is a matter of chance: who vanishes before a first heartbeat was heard of once.
    worked, wasted = (sum(each.get(f"{name}_seconds", 0.0) for each in seen.rounds) for name in ("device", "wasted"))
    assert worked > 0
    assert 0 <= wasted <= worked
    # Devices that vanish keep no evaluation waiting, and the others are heard.
    assert {each["role"] for each in seen.evaluations} == {"validation", "test"}
    assert all(0 < each["users"] < trial.devices for each in seen.evaluations)


SMALL = Trial(
    devices=60,
    swarms=1,
    rounds=4,
    cohort=20,
    target=15,
    quorum=0.8,
    deadline_seconds=4.0,
    away_seconds=3.0,
    patience_seconds=6.0,
    seconds=180.0,
)


def test_sixty_devices_vanish_and_no_round_hangs(tmp_path: Path) -> None:
    result = run(SMALL, tmp_path)
    sys.stdout.write(f"{result.told(SMALL)}\n")
    check(SMALL, result)


@pytest.mark.soak
def test_a_thousand_devices_vanish_and_every_round_ends_by_its_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(
        devices=1000,
        swarms=2,
        rounds=100,
        cohort=100,
        target=70,
        quorum=0.95,
        deadline_seconds=12.0,
        away_seconds=20.0,
        patience_seconds=20.0,
        seconds=3000.0,
    )
    result = run(trial, tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{result.told(trial)}\n")
    check(trial, result)
    assert max(each["seconds"] for each in result.rounds) <= trial.deadline_seconds + 1.0


def test_a_fate_is_drawn_for_every_visit_and_is_the_same_again() -> None:
    def stages(share: float) -> list[str]:
        fate, met = Fate(Vanishing(share, 5.0, Draws(4)), client=3), []
        for _ in range(400):
            fate.begin()
            met.append(next((stage for stage in STAGES if fate.meets(stage)), ""))
            assert 2.5 <= fate.away_seconds() <= 7.5
        return met

    assert stages(0.0) == [""] * 400
    assert stages(0.3) == stages(0.3)
    counts = Counter(stages(0.3))
    assert 0.2 < 1 - counts[""] / 400 < 0.4
    assert set(counts) == {"", *STAGES}
    assert "" not in stages(1.0)


def test_a_device_vanishes_once_and_hangs_up_when_it_comes_back() -> None:
    fate = Fate(Vanishing(1.0, 5.0, Draws(4)), client=3)
    fate.begin()
    stage = next(stage for stage in STAGES if fate.meets(stage))
    hung_up: list[bool] = []
    with pytest.raises(Vanished, match=stage) as vanished:
        fate.at(stage, [lambda: hung_up.append(True)])
    assert hung_up == []
    vanished.value.come_back()
    assert hung_up == [True]
    fate.at(stage)  # not in the same visit again


def test_a_share_that_is_none_is_refused() -> None:
    for share, away in ((1.5, 1.0), (-0.1, 1.0), (0.5, 0.0)):
        with pytest.raises(RecipeError, match="between 0 and 1"):
            Vanishing(share, away, Draws(1))


def test_a_swarm_without_shards_says_what_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, said in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "holds 0 shards")):
        assert call(["swarm", "--server", "127.0.0.1:1", "--data", str(folder)]) == 3
        printed = " ".join(capsys.readouterr().err.split())
        assert said in printed
        assert "`fedtower data shard" in printed


def test_a_swarm_says_how_its_devices_fare_and_each_kind_of_failure_once() -> None:
    tally = Tally(5)
    for client in (1, 2, 3):
        tally.told(client, "task", {"task": "train", "round": 1})
    tally.told(1, "done", {"task": "train"})
    tally.told(2, "refused", {"reason": "LATE"})
    tally.told(4, "refused", {"reason": "RATE"})  # it had no task yet
    tally.failed += [RecipeError("the first of two"), RecipeError("the second"), TimeoutError("another")]  # type: ignore[list-item]
    assert tally.line() == "5 devices: 1 waiting, 1 working, 3 failed; done: 1 train; refused: 1 LATE, 1 RATE"
    assert summary(tally.failed, 5).splitlines() == [
        "2 of 5 devices (RecipeError): the first of two",
        "1 of 5 devices (TimeoutError): another",
    ]
