"""What it costs to acknowledge durably: uploads a second into a journal, beside bare appends to a file in the same run.

    python benchmarks/journal.py [--json FILE] [--repeat N] [--restarts N] [--folder DIR]

So many clients each send an upload, wait until it is acknowledged, and send the next. *bare, one by one* is a file that
each upload is appended to and flushed (fdatasync) before the next one; *bare, grouped* appends and flushes whatever is
waiting at once, through the same queue as the journal, and is what cannot be undercut: it keeps no index, gives no
leases, and would take anything twice. The programs run in turns and medians are printed, so that a neighbour's load
falls on all alike. A restart is from the start of a process, after SIGKILL in the middle of a load, to its first new
acknowledgement, Python's own start included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtower.core.errors import MissingDependency
from fedtower.core.group_commit import GroupCommit, Limits
from fedtower.core.journal import Journal, JournalFactory, Upload
from fedtower.plugins.journals.sqlite.journal import SQLite

# (payload bytes, uploads in a run, clients that wait at the same time)
LOADS = ((10_000, 6_000, 50), (10_000, 12_000, 500), (1_000_000, 200, 50))
Submit = Callable[[Upload], Future[Any]]


def main() -> None:
    """Print the tables, and write them as JSON on request."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is measured")
    arguments = parser.parse_args()
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "date": time.strftime("%Y-%m-%d"),
        "repeat": arguments.repeat,
    }
    print(f"medians of {arguments.repeat} interleaved runs; {about}")
    with tempfile.TemporaryDirectory(prefix="fedtower-benchmark-", dir=arguments.folder) as name:
        folder = Path(name)
        loads = [measure_load(folder, *load, arguments.repeat) for load in LOADS]
        restarts = measure_restarts(folder / "restarts", arguments.restarts)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, "loads": loads, "restarts": restarts}, indent=1) + "\n")


def measure_load(folder: Path, nbytes: int, uploads: int, clients: int, repeat: int) -> dict[str, Any]:
    """One load through all programs."""
    programs: dict[str, Callable[[Path, Sequence[Upload]], Any]] = {
        "bare, one by one": bare,
        "bare, grouped": bare_grouped,
        "sqlite": sqlite,
    }
    server = a_server(folder)
    if server is not None:
        programs["postgresql"] = postgresql(server.dsn)
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
    payload = os.urandom(nbytes)
    for _ in range(repeat):
        for program, opened in programs.items():
            # One by one, one flush an upload is enough to know.
            count = uploads // 20 if program == "bare, one by one" else uploads
            place = folder / "run"
            place.mkdir()
            with opened(place, [Upload.of(bytes(16), payload)] * count) as (submit, sent):
                runs[program].append(load(submit, sent, clients))
            shutil.rmtree(place)
    if server is not None:
        server.remove()
    table = {
        program: {key: statistics.median(run[key] for run in held) for key in held[0]} for program, held in runs.items()
    }
    grouped = table["bare, grouped"]["acknowledged_per_second"]
    print(f"\n{nbytes:,} bytes, {clients} clients\n{'':18}{'acks/s':>10}{'MB/s':>8}{'CPU us':>8}{'of grouped':>12}")
    for program, each in table.items():
        rate = each["acknowledged_per_second"]
        print(
            f"{program:18}{rate:10,.0f}{rate * nbytes / 1e6:8.1f}{each['cpu_microseconds']:8.0f}{rate / grouped:12.2f}"
        )
    return {"nbytes": nbytes, "uploads": uploads, "clients": clients, "table": table}


def load(submit: Submit, uploads: Sequence[Upload], clients: int) -> dict[str, float]:
    """So many clients at once, each waiting for its acknowledgement before it sends the next."""
    waiting: deque[Future[Any]] = deque()
    started, cpu = time.perf_counter(), time.process_time()
    for upload in uploads:
        if len(waiting) == clients:
            waiting.popleft().result()
        waiting.append(submit(upload))
    for future in waiting:
        future.result()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"acknowledged_per_second": len(uploads) / seconds, "cpu_microseconds": 1e6 * cpu / len(uploads)}


@contextmanager
def bare(folder: Path, uploads: Sequence[Upload]) -> Iterator[tuple[Submit, Sequence[Upload]]]:
    """Append and flush, upload by upload."""
    file = os.open(folder / "appended", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def submit(upload: Upload) -> Future[Any]:
        os.writev(file, upload.chunks)
        os.fdatasync(file)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    yield submit, uploads
    os.close(file)


@contextmanager
def bare_grouped(folder: Path, uploads: Sequence[Upload]) -> Iterator[tuple[Submit, Sequence[Upload]]]:
    """Append and flush whatever waits."""
    file = os.open(folder / "appended", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def append(several: Sequence[Upload]) -> Sequence[None]:
        os.writev(file, [chunk for upload in several for chunk in upload.chunks])
        os.fdatasync(file)
        return [None] * len(several)

    commits: GroupCommit[Upload, None, None] = GroupCommit("bare", append, lambda done: done, Limits())
    yield lambda upload: commits.submit(upload, upload.nbytes), uploads
    commits.close()
    os.close(file)


@contextmanager
def journaled(factory: JournalFactory, folder: Path, uploads: Sequence[Upload]) -> Iterator[Any]:
    """A journal, and the uploads under leases that were given before the clock started."""
    journal = factory.open(folder, f"benchmark {time.monotonic_ns()}")
    journal.open_round(journal.claim(), 1, "train", "plan")
    leases = [journal.lease(1, "train", client, 3600.0) for client in range(len(uploads))]
    first = uploads[0]
    yield journal.accept, [Upload(id_of(lease), first.digest, first.chunks) for lease in leases]
    for state in ("closed", "committed"):
        journal.advance(1, 1, "train", state)
    journal.retire(1, 1)
    journal.close()


def sqlite(folder: Path, uploads: Sequence[Upload]) -> Any:
    """The default journal."""
    return journaled(SQLite(), folder, uploads)


def postgresql(dsn: str) -> Callable[[Path, Sequence[Upload]], Any]:
    """The journal in a database."""
    from fedtower.plugins.journals.postgresql.journal import PostgreSQL

    return lambda folder, uploads: journaled(PostgreSQL(dsn), folder, uploads)


def a_server(folder: Path) -> Any:
    """A PostgreSQL server on the same disk that flushes as it should, or nothing where there is none."""
    try:
        from fedtower.plugins.journals.postgresql.server import Server, find_programs

        find_programs()
    except (ModuleNotFoundError, MissingDependency) as missing:
        print(f"without PostgreSQL: {missing}")
        return None
    server = Server(Path(tempfile.mkdtemp(prefix="fedtower-pg-", dir=folder.parent)))
    server.make()
    server.start("fsync=on", "max_wal_size=4GB")
    return server


def id_of(lease: Future[Any]) -> bytes:
    """The lease that must be given."""
    given = lease.result()
    assert given is not None
    return bytes(given.id)


def measure_restarts(folder: Path, restarts: int) -> dict[str, float]:
    """How long it takes until uploads are accepted again, after a kill at full load each time."""
    journal = SQLite().open(folder, "restarts")
    journal.open_round(journal.claim(), 1, "train", "plan")
    took = []
    for life in range(restarts):
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "--intake", str(folder), str(life * 100_000)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        took.append(time.perf_counter() - started)
        time.sleep(0.05 + 0.01 * (life % 7))
        process.kill()
        process.communicate()
    accepted = journal.record(1, "train").accepted
    journal.close()
    took.sort()
    figures = {
        "restarts": float(restarts),
        "uploads_by_then": float(accepted),
        "median_seconds": statistics.median(took),
        "p99_seconds": took[math.ceil(0.99 * len(took)) - 1],
        "worst_seconds": took[-1],
    }
    print(
        f"\naccepting again after SIGKILL, {restarts} times, {accepted:,} uploads by then: median "
        f"{figures['median_seconds']:.2f} s, p99 {figures['p99_seconds']:.2f} s, worst {figures['worst_seconds']:.2f} s"
    )
    return figures


def intake(folder: Path, first: int) -> None:
    """Accept uploads until killed, and say when the first one was acknowledged."""
    journal: Journal = SQLite().open(folder, "restarts")
    payload = os.urandom(10_000)
    for start in range(first, first + 100_000, 50):
        leases = [journal.lease(1, "train", client, 3600.0) for client in range(start, start + 50)]
        outcomes = [journal.accept(Upload.of(id_of(lease), payload)) for lease in leases]
        assert all(outcome.result().acknowledged for outcome in outcomes)
        if start == first:
            os.write(1, b"accepted\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--intake"]:
        intake(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
