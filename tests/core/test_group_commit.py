"""Group commit: batches are what gathered meanwhile, answers go to who asked, and failures stay in their batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from fedtower.core.group_commit import GroupCommit, Limits
from fedtower.core.journal import Busy

LIMITS = Limits(delay_seconds=0.0, orders=4, nbytes=100, waiting_nbytes=150)


@dataclass
class Disk:
    """A disk that is let write when it is told to, and what was written at once."""

    may_write: threading.Event = field(default_factory=threading.Event)
    writing: threading.Event = field(default_factory=threading.Event)
    written: list[list[int]] = field(default_factory=list)

    def write(self, orders: Sequence[int]) -> list[str]:
        self.writing.set()
        assert self.may_write.wait(60)
        self.written.append(list(orders))
        if 13 in orders:
            raise OSError("unlucky")
        return [f"did {order}" for order in orders]


def prepare(orders: Sequence[int]) -> Sequence[int]:
    if 99 in orders:
        raise ValueError("cannot be prepared")
    return orders


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def commits(disk: Disk) -> Iterator[GroupCommit[int, int, str]]:
    commits = GroupCommit("test", prepare, disk.write, LIMITS)
    yield commits
    disk.may_write.set()
    commits.close()


def held_up(disk: Disk, commits: GroupCommit[int, int, str]) -> list[Future[str]]:
    """Three batches of one: one is being written, one is ready, and one could not be handed over."""
    futures = [commits.submit(order) for order in (1,)]
    assert disk.writing.wait(60)
    while len(futures) < 3:
        futures.append(commits.submit(len(futures) + 1))
        while commits._waiting:
            pass
    return futures


def test_everybody_gets_the_answer_to_his_own_order(disk: Disk, commits: GroupCommit[int, int, str]) -> None:
    disk.may_write.set()
    futures = [commits.submit(order) for order in range(1, 12)]
    assert [future.result(60) for future in futures] == [f"did {order}" for order in range(1, 12)]


def test_what_comes_during_a_commit_is_committed_together(disk: Disk, commits: GroupCommit[int, int, str]) -> None:
    first = held_up(disk, commits)
    more = [commits.submit(order) for order in range(10, 13)]
    disk.may_write.set()
    for future in [*first, *more]:
        future.result(60)
    assert disk.written == [[1], [2], [3], [10, 11, 12]]


def test_a_batch_has_a_limit_of_orders_and_of_bytes(disk: Disk, commits: GroupCommit[int, int, str]) -> None:
    held_up(disk, commits)
    many = [commits.submit(order) for order in range(20, 26)]
    large = [commits.submit(order, nbytes=50) for order in range(30, 33)]
    disk.may_write.set()
    for future in [*many, *large]:
        future.result(60)
    assert disk.written[3:] == [[20, 21, 22, 23], [24, 25, 30, 31], [32]]


def test_too_much_that_waits_is_refused_and_told_when_to_come_back(
    disk: Disk, commits: GroupCommit[int, int, str]
) -> None:
    held_up(disk, commits)
    commits.submit(40, nbytes=100)
    with pytest.raises(Busy, match="come back in a second") as raised:
        commits.submit(41, nbytes=60)
    assert raised.value.seconds == 1.0
    last = commits.submit(42, nbytes=50)
    disk.may_write.set()
    last.result(60)
    assert commits.submit(43, nbytes=1_000).result(60) == "did 43", "one that is larger than all limits goes alone"


@pytest.mark.parametrize(("order", "error"), [(13, OSError), (99, ValueError)])
def test_a_failure_is_the_answer_to_its_batch_and_to_no_other(
    disk: Disk, commits: GroupCommit[int, int, str], order: int, error: type[Exception]
) -> None:
    before = held_up(disk, commits)
    failing = [commits.submit(50), commits.submit(order, nbytes=150)]
    disk.may_write.set()
    with pytest.raises(error):
        failing[1].result(60)
    assert [future.result(60) for future in [*before, failing[0]]] == ["did 1", "did 2", "did 3", "did 50"]
    assert commits.submit(51, nbytes=150).result(60) == "did 51", "what failed does not count as waiting"


def test_an_order_that_was_called_off_is_not_committed(disk: Disk, commits: GroupCommit[int, int, str]) -> None:
    held_up(disk, commits)
    kept, called_off = commits.submit(60), commits.submit(61, nbytes=150)
    assert called_off.cancel()
    disk.may_write.set()
    assert kept.result(60) == "did 60"
    commits.submit(62).result(60)  # what was called off is let go of by the batches up to this one
    assert commits.submit(63, nbytes=150).result(60) == "did 63"
    assert 61 not in [order for batch in disk.written for order in batch]


def test_closing_commits_what_waits_and_takes_no_more(disk: Disk, commits: GroupCommit[int, int, str]) -> None:
    futures = [*held_up(disk, commits), *(commits.submit(order) for order in range(70, 80))]
    disk.may_write.set()
    commits.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        commits.submit(80)
