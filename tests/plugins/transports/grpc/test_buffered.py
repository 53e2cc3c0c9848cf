"""Asynchronous rounds over the journal: what a step was made of is durable before it, and nothing counts twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.core.journal import Instant, Journal, Lease, Outcome, Upload
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.registry import discover
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.transport import Abandoned, Asked
from fedtower.core.updates import Updates
from fedtower.plugins.journals.sqlite.journal import SQLite
from fedtower.plugins.signers.ed25519.signer import Ed25519Signer, make_key
from fedtower.plugins.transports.grpc.artefacts import Artefact
from fedtower.plugins.transports.grpc.buffered import Buffered
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.intake import Caller, Intake
from fedtower.plugins.transports.grpc.meters import Meters
from fedtower.plugins.transports.grpc.plans import PublishedPlan
from fedtower.plugins.transports.grpc.standing import waiting_of
from fedtower.plugins.transports.grpc.steps import Step, read_step
from fedtower.plugins.transports.grpc.table import TableSide, Terms
from fedtower.plugins.transports.grpc.transport import Grpc
from fedtower.protos.v1 import federation_pb2 as pb

CLIENTS, LOCAL = 12, LocalSettings(steps=1)
Name = tuple[int, int]  # of an update: the version that it was trained from, and its client


class HandClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> Instant:
        return Instant("a boot", self.seconds)


@dataclass
class World:
    """The table process of a federation, which can be killed, and its clients."""

    folder: Path
    signer: Ed25519Signer
    settings: AsynchronousSettings
    clock: HandClock = field(default_factory=HandClock)
    round: int = 0
    saved: int = 0
    said: list[str] = field(default_factory=list)
    sent: list[Name] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.journal: Journal = SQLite().open(self.folder / "journal", "a federation", self.clock)
        template = PublishedPlan(
            federation="a federation",
            round=0,
            seed=1,
            bundle=Artefact.of("manifest.json", b"{}"),
            files=(),
            parameters=(),
            local=LOCAL,
        )
        terms = Terms(lease_seconds=60.0, heartbeat_seconds=5.0, deadline_seconds=0.0, quorum=1.0)
        self.buffered = Buffered(
            TableSide(
                folder=self.folder,
                journal=self.journal,
                epoch=self.journal.claim(),
                signer=self.signer,
                template=template,
                terms=terms,
                said=self.said.append,
                clock=self.clock,
            )
        )

    def kill(self) -> None:
        """Nothing is left of the process but what is on the disk; it goes on from its checkpoint."""
        self.journal.close()
        self.begin()
        self.round = self.saved

    def open(self) -> Arriving:
        """The next version; its parameters are what a step after this number of others would leave."""
        plan = Plan(self.round + 1, {"w": np.full(3, float(self.round), np.float32)}, LOCAL)
        arriving = Arriving(self.settings, plan.round)
        asked = Asked(self.settings, lambda: self.settings.buffer - arriving.counted, _nobody, Draws(1), None, {})
        arriving.of = self.buffered.version(plan, Cohort(plan.round, np.arange(CLIENTS), CLIENTS), asked).arrivals()
        return arriving

    def step(self) -> list[Name]:
        """The updates of the next step, which is made."""
        names = self.open().rest()
        self.made()
        return names

    def made(self) -> None:
        self.round += 1
        self.buffered.committed()

    def save(self) -> None:
        self.saved = self.round
        self.buffered.saved(self.round)

    def lease(self, client: int, version: int | None = None, most: int = 99) -> Lease | None:
        version = self.round + 1 if version is None else version
        return self.journal.lease(version, "train", client, 60.0, most).result()

    def send(self, client: int, version: int | None = None) -> Outcome:
        """An upload of a client that is given a lease for it."""
        lease = self.lease(client, version)
        assert lease is not None
        return self.submit(lease)

    def submit(self, lease: Lease) -> Outcome:
        updates = Updates(np.array([1.0]), {"w": np.full((1, 3), lease.client, np.float32)})
        belongs = Belongs("a federation", bytes(32), lease.round, lease.id)
        payload = encode_submission(Submission(belongs, updates, 1))
        outcome = self.journal.accept(Upload.of(lease.id, payload)).result()
        if outcome is Outcome.ACCEPTED:
            self.sent.append((lease.round, lease.client))
        return outcome


def _nobody(version: int, clients: Any) -> Updates:
    raise AssertionError("devices train elsewhere")


@dataclass
class Arriving:
    """The server's half: it counts what is not too stale."""

    settings: AsynchronousSettings
    version: int
    counted: int = 0
    of: Iterator[Updates] = field(default_factory=lambda: iter(()))

    def next(self) -> Name:
        updates = next(self.of)
        assert updates.clients is not None
        assert updates.rounds is not None
        assert updates.dense["w"][0, 0] == updates.clients[0]
        self.counted += int(updates.rounds[0]) >= self.version - self.settings.max_staleness
        return int(updates.rounds[0]), int(updates.clients[0])

    def rest(self) -> list[Name]:
        names: list[Name] = []
        while True:
            try:
                names.append(self.next())
            except StopIteration:
                return names


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    signer = make_key(tmp_path / "signing.pem", tmp_path / "signing.pub")
    made = World(tmp_path, signer, AsynchronousSettings(buffer=2, concurrency=4, max_staleness=2))
    with closing(made.journal):
        yield made


def test_a_step_takes_what_came_first_and_the_next_the_rest(world: World) -> None:
    first = world.open()
    for client in (5, 1, 3):
        world.send(client)
    assert first.rest() == [(1, 5), (1, 1)]
    world.made()
    second = world.open()
    world.send(4)
    assert second.rest() == [(1, 3), (2, 4)]


def test_what_a_step_takes_is_on_the_disk_before_it_is_made_and_not_before_it_is_known(world: World) -> None:
    arriving = world.open()
    world.send(5), world.send(1)
    assert [arriving.next(), arriving.next()] == [(1, 5), (1, 1)]
    assert read_step(world.buffered.steps, 1) is None
    assert arriving.rest() == []
    assert read_step(world.buffered.steps, 1) == Step(1, ((1, 1), (1, 2)))


def test_a_step_is_made_of_the_same_updates_again(world: World) -> None:
    arriving = world.open()
    for client in (5, 1, 3):
        world.send(client)
    assert arriving.rest() == [(1, 5), (1, 1)]
    world.kill()
    again = world.open()
    world.send(7)
    assert again.rest() == [(1, 5), (1, 1)]
    world.made()
    assert world.step() == [(1, 3), (1, 7)]


def test_killed_before_that_nothing_is_lost_and_nothing_counts_twice(world: World) -> None:
    arriving = world.open()
    for client in (5, 1, 3, 2):
        world.send(client)
    arriving.next(), arriving.next()
    world.kill()
    assert world.step() + world.step() == [(1, 5), (1, 1), (1, 3), (1, 2)]


def test_a_client_counts_once_in_a_step(world: World) -> None:
    world.open()
    world.send(5), world.send(1), world.send(3)
    assert world.step() == [(1, 5), (1, 1)]
    second = world.open()
    world.send(3), world.send(7)
    assert second.rest() == [(1, 3), (2, 7)]
    world.made()
    third = world.open()
    world.send(1)
    assert third.rest() == [(2, 3), (3, 1)]


def test_a_window_waits_until_it_is_too_stale_and_what_was_acknowledged_then_is_told(world: World) -> None:
    world.open()
    late, later = world.lease(9), world.lease(10)
    assert late is not None
    assert later is not None
    for client in range(8):
        world.send(client)
    for _ in range(2):
        assert len(world.step()) == 2
    third = world.open()
    assert world.submit(late) is Outcome.ACCEPTED, "two versions behind"
    assert third.rest() == [(1, 4), (1, 5)]
    world.made()
    fourth = world.open()
    assert world.submit(later) is Outcome.LATE, "three versions behind"
    world.send(0), world.send(1)
    assert fourth.rest() == [(1, 6), (1, 7), (1, 9), (4, 0), (4, 1)]
    assert fourth.counted == 2
    world.made()
    assert world.journal.record(1, "train").state == "committed"
    assert world.journal.record(2, "train").state == "open"


def test_when_nothing_comes_a_version_is_abandoned_and_what_came_waits(world: World) -> None:
    first = world.open()
    world.send(5)
    with pytest.raises(Abandoned, match="1 of 2 updates are there"):
        first.rest()
    world.kill()
    with pytest.raises(Abandoned, match="1 of 2 updates are there"):
        world.open().rest()
    world.made()
    second = world.open()
    world.send(1)
    assert second.rest() == [(1, 5), (2, 1)]


def test_a_checkpoint_lets_go_of_what_nobody_needs_again(world: World) -> None:
    world.open()
    for version in range(1, 7):
        for client in (2 * version % CLIENTS, (2 * version + 1) % CLIENTS):
            world.send(client)
        assert len(world.step()) == 2
        world.open() if version < 6 else None
        if version == 4:
            world.save()
    retired = [record.round for record in world.journal.rounds() if record.retired]
    assert retired == [1]  # of the others, one was open yet, or just closed
    assert read_step(world.buffered.steps, 1) is None
    assert read_step(world.buffered.steps, 2) is not None
    wanted = {version: read_step(world.buffered.steps, version) for version in (5, 6)}
    world.kill()
    for version in (5, 6):
        assert world.step() == [(version, 2 * version % CLIENTS), (version, (2 * version + 1) % CLIENTS)]
        assert read_step(world.buffered.steps, version) == wanted[version]


def test_what_somebody_may_still_fetch_is_kept(world: World) -> None:
    world.open()
    digests = []
    for _ in range(5):
        (window,) = (each for each in world.journal.rounds() if each.round == world.round + 1)
        digests.append(bytes.fromhex(window.plan))
        world.send(1), world.send(2)
        world.step()
        world.save()
        world.open()
    there = [world.buffered.side.artefacts.path(digest).is_file() for digest in digests]
    assert there == [False, False, True, True, True]


@pytest.mark.parametrize("seed", range(4))
def test_whenever_it_is_killed_all_that_was_acknowledged_counts_once(world: World, seed: int) -> None:
    draws = np.random.default_rng(seed)
    made: dict[int, list[Name]] = {}
    leases: list[Lease] = []
    highest = 0
    while highest < 14:
        arriving, names = world.open(), list[Name]()
        for client in draws.permutation(CLIENTS)[: draws.integers(1, 7)].tolist():
            lease = world.lease(int(client), max(highest, world.round) + 1, most=6) if highest == world.round else None
            leases += [lease] if lease is not None else []
        for position in sorted(draws.permutation(len(leases))[: draws.integers(0, 4)].tolist(), reverse=True):
            world.submit(leases.pop(position))
        if draws.random() < 0.15:
            world.kill()
            continue
        with suppress(Abandoned):
            names = arriving.rest()
        assert made.setdefault(world.round + 1, names) == names, "the step was made of other updates"
        if draws.random() < 0.15:
            world.kill()
            continue
        world.made()
        highest = max(highest, world.round)
        if draws.random() < 0.2:
            world.save()
    taken = [name for names in made.values() for name in names]
    assert len(taken) == len(set(taken)), "an update counts twice"
    newest_closed = world.round - world.settings.max_staleness - 1
    assert {name for name in world.sent if name[0] <= newest_closed} <= set(taken), "an update was lost"
    world.buffered.trained()
    unused = len(world.sent) - len(taken)
    assert world.said == (
        [f"{unused} updates were accepted after the last step and are not used: training is over"] * bool(unused)
    )
    assert all(record.state in ("committed", "abandoned") for record in world.journal.rounds())


def test_a_damaged_step_is_not_made_up(world: World) -> None:
    world.open()
    world.send(1), world.send(2)
    world.step()
    (world.buffered.steps / "000001.json").write_text('{"taken": [[1]], "abandoned": ""}')
    world.kill()
    with pytest.raises(CheckpointError, match=r"000001\.json cannot be read"):
        world.open().rest()


def test_leases_are_of_the_newest_version_and_as_many_as_may_work_at_once(world: World) -> None:
    intake = Intake(world.folder, "a federation", world.journal, rows=_no_rows, meters=Meters(), registry=discover())

    async def asked(client: int) -> tuple[int, bytes] | None:
        request = pb.CheckInRequest(protocol=1, num_examples=9)
        reply = await intake.check_in(Caller(f"device-{client}", client), request.SerializeToString())
        lease = reply.lease
        return (lease.round, lease.lease) if reply.WhichOneof("outcome") == "lease" else None

    async def ask() -> None:
        world.open()
        first = {client: await asked(client) for client in range(5)}
        assert [None if each is None else each[0] for each in first.values()] == [1, 1, 1, 1, None]
        for client in (0, 1):
            lease = world.lease(client)
            assert lease is not None
            world.submit(lease)
        world.step()
        world.open()
        await asyncio.sleep(0.06)  # so old may be what an intake knows of the windows
        assert await asked(2) == first[2], "who is at work goes on with that"
        again = [await asked(client) for client in (4, 0, 1)]
        assert [None if each is None else each[0] for each in again] == [2, 2, None], "two of four are at work"

    asyncio.run(ask())


async def _no_rows(request: bytes) -> AsyncIterator[bytes]:
    for chunk in (request,):
        assert not chunk, "this model has no rows"
        yield chunk


def test_the_status_shows_the_newest_version_and_what_waits_for_its_step(world: World) -> None:
    world.open()
    for client in (5, 1, 3):
        world.send(client)
    world.step()
    world.open()
    world.send(7)
    (waiting,) = waiting_of(world.buffered.side.windows, world.journal.rounds(), world.clock)
    assert (waiting.round, waiting.target, waiting.accepted, waiting.clients) == (2, 2, 2, CLIENTS)


@pytest.mark.parametrize("settings", [{"target": 3}, {"quorum": 0.5}])
def test_settings_of_rounds_that_wait_are_refused(settings: dict[str, Any]) -> None:
    opening: Any = SimpleNamespace(asynchronous=AsynchronousSettings(buffer=2, concurrency=4))
    with pytest.raises(RecipeError, match=r"transport\.target and transport\.quorum are for rounds that wait"):
        Grpc(**settings).open(opening)
