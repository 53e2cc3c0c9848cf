"""When uploads came: a process that was killed knows it of those that it saw, and the window keeps its deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.deadline import ARRIVED
from fedtower.core.draws import Draws
from fedtower.core.journal import Instant, Lease, Outcome, Upload
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.transport import Abandoned
from fedtower.core.updates import Updates
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.signers.ed25519.signer import Ed25519Signer, make_key
from fedtower.plugins.transports.grpc.arrivals import ArrivalTimes
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.plans import PublishedPlan
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.windows import forget_windows, read_window

PLAN = Plan(1, {"w": np.zeros(2, np.float32)}, LocalSettings(steps=1))
EVERYBODY = Cohort(1, np.arange(4), 4)


class HandClock:
    seconds = 1000.0

    def __call__(self) -> Instant:
        return Instant("a boot", self.seconds)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def table(folder: Path, clock: HandClock) -> TableSide:
    """A table process over this folder: the first one, or the next after a kill."""
    journal = SQLite().open(folder / "journal", "a federation", clock)
    keys = folder / "signing.pem", folder / "signing.pub"
    signer = make_key(*keys) if not keys[0].is_file() else Ed25519Signer(keys[0])
    template = PublishedPlan(
        federation="a federation",
        round=0,
        seed=1,
        bundle=Artefact.of("manifest.json", b"{}"),
        files=(),
        parameters=(),
        local=PLAN.local,
        rows=(),
        norm_bound=100.0,
        run="run1",
    )
    terms = Terms(lease_seconds=60.0, heartbeat_seconds=5.0, deadline_seconds=300.0, quorum=0.5)
    return TableSide(folder, journal, journal.claim(), signer, template, terms, lambda message: None, clock=clock)


def leased(side: TableSide, client: int) -> Lease:
    lease = side.journal.lease(1, "train", client, 60.0).result()
    assert lease is not None
    return lease


def upload(side: TableSide, client: int) -> Outcome:
    return hand_in(side, leased(side, client))


def hand_in(side: TableSide, lease: Lease) -> Outcome:
    updates = Updates(np.array([1.0]), dense={"w": np.ones((1, 2), np.float32)})
    submission = Submission(Belongs("a federation", bytes(32), 1, lease.id), updates, 1)
    return side.journal.accept(Upload.of(lease.id, encode_submission(submission))).result()


def came(block: Updates) -> float:
    return float(block.metrics[ARRIVED][0])


def arriving(blocks: Iterator[Updates], side: TableSide, client: int, pool: ThreadPoolExecutor) -> float:
    """When the next update came, which this client sends while the table waits for it."""
    reading = pool.submit(next, blocks)
    for _ in range(1_000):
        if any(record.state == "open" for record in side.journal.rounds()):
            break
        time.sleep(0.01)
    upload(side, client)
    return came(reading.result(20.0))


def test_a_kill_does_not_change_when_an_update_came(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    clock = HandClock()
    first = table(tmp_path, clock)
    blocks = first.exchange(PLAN, EVERYBODY, None, Draws(1), 77.0)  # type: ignore[arg-type]
    assert arriving(blocks, first, 0, pool) == 0.0
    clock.seconds += 3.0
    assert arriving(blocks, first, 1, pool) == 3.0
    upload(first, 2)  # and nobody was there to see it
    first.journal.close()

    clock.seconds += 40.0
    second = table(tmp_path, clock)
    again = second.exchange(PLAN, EVERYBODY, None, Draws(1), 5.0)  # type: ignore[arg-type]
    times = [came(next(again)) for _ in range(3)]
    assert times[:2] == [0.0, 3.0]
    assert math.isnan(times[2])
    assert arriving(again, second, 3, pool) == 43.0
    window = read_window(tmp_path / "windows", 1, "train")
    assert window is not None
    assert window.deadline_seconds == 77.0, "and not the one that the second process was told"
    assert list(again) == []
    second.journal.close()


@pytest.mark.parametrize(("of_the_side", "of_the_cohort", "updates"), [(None, 2, 2), (3, 2, 3), (None, None, 4)])
def test_a_window_ends_with_its_target(
    tmp_path: Path, pool: ThreadPoolExecutor, of_the_side: int | None, of_the_cohort: int | None, updates: int
) -> None:
    side = replace(table(tmp_path, HandClock()), target=of_the_side)
    cohort = replace(EVERYBODY, target=of_the_cohort)
    blocks = side.exchange(PLAN, cohort, None, Draws(1), None)  # type: ignore[arg-type]
    slow: list[Lease] = []
    for client in range(updates):
        arriving(blocks, side, client, pool)
        window = read_window(tmp_path / "windows", 1, "train")
        assert window is not None
        assert window.target == updates
        if client == 0 and updates < 4:
            slow.append(leased(side, 3))
    assert list(blocks) == []
    assert side.journal.record(1, "train").state == "closed"
    assert side.journal.lease(1, "train", 3, 60.0).result() is None
    assert [hand_in(side, lease) for lease in slow] == [Outcome.LATE] * len(slow)
    side.journal.close()


def test_too_few_by_the_deadline_that_a_round_was_given_abandon_it(tmp_path: Path) -> None:
    clock = HandClock()
    side = table(tmp_path, clock)
    side.opened(PLAN, "train", EVERYBODY.clients, 4, replace(side.terms, deadline_seconds=12.5))
    clock.seconds += 12.5
    with pytest.raises(Abandoned, match=r"after 12\.5 s there were 0 of 4 updates"):
        list(side.exchange(PLAN, EVERYBODY, None, Draws(1), None))  # type: ignore[arg-type]
    side.journal.close()


def test_a_torn_time_is_forgotten_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "000001-train.arrived"
    times = ArrivalTimes(path, unseen=0)
    assert [times.seen(position, 2.5 * position) for position in (1, 2)] == [2.5, 5.0]
    path.write_bytes(path.read_bytes()[:-3])
    again = ArrivalTimes(path, unseen=2)
    assert again.seen(1, 9.0) == 2.5
    assert math.isnan(again.seen(2, 9.0))
    assert again.seen(3, 9.0) == 9.0
    assert len(path.read_bytes()) == 24


def test_times_are_let_go_of_with_their_window(tmp_path: Path) -> None:
    for round in (1, 2):
        ArrivalTimes(tmp_path / f"{round:06d}-train.arrived", 0).seen(1, 1.0)
    forget_windows(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["000002-train.arrived"]
