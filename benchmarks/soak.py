"""A server that runs for long: what grows over thousands of short rounds, and what such a round costs.

    python benchmarks/soak.py [--rounds N] [--devices N] [--samples N] [--json FILE] [--folder DIR] [-o KEY=VALUE ...]

A real federation on loopback, TLS, journal and checkpoints included: `fedtower serve` with a tiny model on generated
data, and `fedtower swarm` beside it. Every now and then memory, file handles and CPU time of each process are read, and
the bytes and files of every folder. *Growth* is the slope of a straight line through the samples of the last four
fifths, in MB a thousand rounds; what a process needs once, it has by then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "dssm-synthetic"
TINY = {
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 25,
    "model.dim": 4,
    "model.hidden": 8,
    "local.batch_size": 8,
    "local.negatives": 5,
    "local.history_length": 10,
    "evaluation.negatives": 20,
    "evaluation.every": 0,
    "checkpoint.every": 50,
}
WARM = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """What was seen after some rounds: MB, file handles and CPU seconds of processes; MB and files of folders."""

    round: int
    seconds: float
    mb: Mapping[str, float]
    handles: Mapping[str, int]
    cpu: Mapping[str, float]
    disk_mb: Mapping[str, float]
    files: Mapping[str, int]


def main() -> None:
    """Run, and print what grew."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is to be used")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE", help="of the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedtower-soak-", dir=arguments.folder) as name:
        samples = soak(Path(name), arguments.rounds, arguments.devices, arguments.samples, arguments.options)
    found = judged(samples)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
        "devices": arguments.devices,
    }
    print(f"\n{arguments.rounds:,} rounds of {arguments.devices} devices; {about}")
    print_found(found)
    if arguments.json:
        content = {"about": about, "found": found, "samples": [asdict(sample) for sample in samples]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def soak(place: Path, rounds: int, devices: int, count: int, options: Sequence[str]) -> list[Sample]:
    """The samples of a whole run."""
    asked = {**TINY, "rounds": rounds, "cohort.size": devices}
    settings = [f"{key}={json.dumps(value)}" for key, value in asked.items()]
    overrides = [word for setting in settings for word in ("-o", setting)]
    served = [word for setting in options for word in ("-o", setting)]
    shards, keys = place / "shards", place / "keys"
    fedtower("data", "shard", RECIPE, str(shards), "-n", str(devices), *overrides)
    fedtower("certs", str(keys), "--host", "127.0.0.1")
    fedtower("keygen", str(keys))
    codes = fedtower("enrol", "codes", str(keys / "credentials.sqlite"), "-n", str(devices), "--first-client", "0")
    (place / "codes").write_bytes(codes)
    asked_of = ("--port", "0", "--keys", str(keys), "--runs", str(place / "runs"))
    with started(place, "serve", RECIPE, *asked_of, *overrides, *served):
        folder = run_folder(place / "runs")
        port = json.loads((folder / "intake.json").read_text())["port"]
        called = ("--server", f"127.0.0.1:{port}", "--data", str(shards), "--codes", str(place / "codes"))
        with started(place, "swarm", *called, "--keys", str(keys)) as swarm:
            return list(watched(folder, shards, swarm.pid, rounds, max(rounds // count, 1)))


def watched(folder: Path, shards: Path, swarm: int, rounds: int, every: int) -> Iterator[Sample]:
    """A sample every so many rounds."""
    started, due = time.monotonic(), 1
    for done in rounds_of(folder):
        if done < due and done < rounds:
            continue
        due = done + every
        running = json.loads((folder / "processes.json").read_text())
        alive = {**{name: pid for name, pid in running.items() if isinstance(pid, int)}, "swarm": swarm}
        try:
            held = {name: process(pid) for name, pid in alive.items()}
        except FileNotFoundError:  # it has ended: the last round is over, or it is started again
            if done >= rounds:
                return
            continue
        places = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
        disk = {name: size(path) for name, path in {**places, "devices": shards}.items()}
        sample = Sample(
            done,
            time.monotonic() - started,
            mb={name: each[0] for name, each in held.items()},
            handles={name: each[1] for name, each in held.items()},
            cpu={name: each[2] for name, each in held.items()},
            disk_mb={name: each[0] for name, each in disk.items()},
            files={name: each[1] for name, each in disk.items()},
        )
        if sys.stderr.isatty():
            sys.stderr.write(f"\rround {done:,}: {sample.seconds:.0f} s, {sum(sample.disk_mb.values()):.1f} MB on disk")
        yield sample
        if done >= rounds:
            return


def rounds_of(folder: Path) -> Iterator[int]:
    """How many rounds are done, again and again; a run in which nothing happens for two minutes has failed."""
    done, at, until = 0, 0, time.monotonic() + 120.0
    while time.monotonic() < until:
        log = folder / "log.jsonl"
        if log.is_file() and log.stat().st_size > at:
            with log.open("rb") as file:
                file.seek(at)
                lines = file.read().rpartition(b"\n")[0]
            at += len(lines) + 1
            done += lines.count(b'"event": "round"')
            until = time.monotonic() + 120.0
        yield done
        time.sleep(0.05)
    raise SystemExit(f"no round for two minutes after {done}; see {folder.parents[1]}/serve.log")


def judged(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the samples say."""
    warm = [sample for sample in samples if sample.round >= WARM * samples[-1].round]
    first, last = warm[0], warm[-1]
    rounds, seconds = last.round - first.round, last.seconds - first.seconds
    processes = {
        name: {
            "mb": last.mb[name],
            "growth": slope(warm, [sample.mb[name] for sample in warm]),
            "handles": [min(sample.handles[name] for sample in warm), max(sample.handles[name] for sample in warm)],
            "cpu_ms_a_round": 1000.0 * (last.cpu[name] - first.cpu[name]) / rounds,
        }
        for name in last.mb
        if all(name in sample.mb for sample in warm)
    }
    folders = {
        name: {
            "mb": last.disk_mb[name],
            "most_mb": max(sample.disk_mb.get(name, 0.0) for sample in samples),
            "growth": slope(warm, [sample.disk_mb.get(name, 0.0) for sample in warm]),
            "most_files": max(sample.files.get(name, 0) for sample in samples),
        }
        for name in sorted(last.disk_mb)
    }
    return {"ms_a_round": 1000.0 * seconds / rounds, "processes": processes, "folders": folders}


def slope(samples: Sequence[Sample], values: Sequence[float]) -> float:
    """Of a straight line through ``values``, a thousand rounds."""
    rounds = np.array([sample.round for sample in samples]) / 1000.0
    return float(np.polyfit(rounds, np.array(values), 1)[0]) if len(samples) > 1 else 0.0


def print_found(found: Mapping[str, Any]) -> None:
    """Two tables."""
    print(f"{found['ms_a_round']:.1f} ms a round\n")
    print(f"{'process':12}{'MB':>9}{'MB / 1,000 rounds':>19}{'handles':>12}{'CPU ms a round':>16}")
    for name, each in found["processes"].items():
        handles = "-".join(map(str, dict.fromkeys(each["handles"])))
        print(f"{name:12}{each['mb']:9.1f}{each['growth']:19.2f}{handles:>12}{each['cpu_ms_a_round']:16.1f}")
    print(f"\n{'on disk':20}{'MB':>9}{'most MB':>9}{'MB / 1,000 rounds':>19}{'most files':>12}")
    for name, each in found["folders"].items():
        print(f"{name:20}{each['mb']:9.2f}{each['most_mb']:9.2f}{each['growth']:19.3f}{each['most_files']:12}")


def process(pid: int) -> tuple[float, int, float]:
    """MB of memory, file handles and CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (
        pages * _PAGE / 1e6,
        sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        (int(fields[11]) + int(fields[12])) / _TICKS,
    )


def size(path: Path) -> tuple[float, int]:
    """MB and files, as a disk counts them; what goes while it is looked at is not there."""
    mb, files = 0.0, 0
    found = [path, *(Path(folder, name) for folder, within, own in os.walk(path) for name in (*within, *own))]
    for each in found:
        try:
            mb += each.stat().st_blocks * 512 / 1e6
            files += each.is_file()
        except FileNotFoundError:
            continue
    return mb, files


def run_folder(runs: Path) -> Path:
    """The run's folder, once its intake is there."""
    until = time.monotonic() + 120.0
    while time.monotonic() < until:
        found = [path.parent for path in runs.glob("*/intake.json")]
        if found:
            return found[0]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start; see {runs.parent}/serve.log")


def fedtower(*arguments: str) -> bytes:
    """What a command prints."""
    return subprocess.run([sys.executable, "-m", "fedtower", *arguments], stdout=subprocess.PIPE, check=True).stdout


@contextmanager
def started(place: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs meanwhile, and is ended if it does not end by itself; what it says is in a file."""
    with (place / f"{arguments[0]}.log").open("wb") as log:
        running = subprocess.Popen([sys.executable, "-m", "fedtower", *arguments], stdout=log, stderr=log)
        try:
            yield running
            running.wait(60.0)
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait(60.0)


if __name__ == "__main__":
    main()
