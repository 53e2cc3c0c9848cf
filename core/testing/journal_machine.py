"""Random sequences of calls, made to a journal and to the plainest one there is, which must answer alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fedtower.core.journal import (
    BEFORE,
    Fenced,
    Instant,
    JournalFactory,
    Lease,
    Outcome,
    RoundRecord,
    State,
    Task,
    Upload,
    WrongState,
)
from fedtower.core.testing.journal import HandClock, Place

ROUNDS, TASKS, CLIENTS = st.integers(1, 3), st.sampled_from(["train", "evaluate"]), st.integers(0, 2)
MOST = st.sampled_from([None, None, 1, 2])
PAYLOADS, SECONDS = st.binary(max_size=3), st.sampled_from([10.0, 60.0])


class Model:
    """A journal in three dictionaries, written from the words of the seam and nothing else."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.epoch = 0
        self.rounds: dict[tuple[int, Task], RoundRecord] = {}
        self.leases: dict[bytes, Lease] = {}
        self.current: dict[tuple[int, Task, int], bytes] = {}
        self.uploads: dict[bytes, bytes] = {}

    def lives(self, id: bytes) -> bool:
        """Whether an upload under this lease would count."""
        lease, now = self.leases[id], self.clock.now
        record = self.rounds[lease.round, lease.task]
        newest = self.current[lease.round, lease.task, lease.client] == id
        in_time = lease.expires.boot == now.boot and lease.expires.seconds > now.seconds
        return newest and in_time and record.state == "open" and id not in self.uploads

    def expected_lease(self, key: tuple[int, Task, int]) -> str:
        """``none``, ``same`` or ``new``."""
        record, held = self.rounds.get(key[:2]), self.current.get(key)
        if record is None or record.state != "open" or held in self.uploads:
            return "none"
        return "same" if held is not None and self.lives(held) else "new"

    def at_work(self, task: Task) -> dict[int, list[Lease]]:
        """The living leases of a task, by client."""
        found: dict[int, list[Lease]] = {}
        for id, lease in self.leases.items():
            if lease.task == task and self.lives(id):
                found.setdefault(lease.client, []).append(lease)
        return found

    def accept(self, id: bytes, payload: bytes) -> Outcome:
        """What becomes of it."""
        if id not in self.leases:
            return Outcome.UNKNOWN
        if id in self.uploads:
            return Outcome.DUPLICATE if self.uploads[id] == payload else Outcome.CONFLICT
        if not self.lives(id):
            return Outcome.LATE
        self.uploads[id] = payload
        key = (self.leases[id].round, self.leases[id].task)
        self.rounds[key] = replace(self.rounds[key], accepted=self.rounds[key].accepted + 1)
        return Outcome.ACCEPTED

    def accepted(self, key: tuple[int, Task]) -> list[tuple[int, bytes]]:
        """The clients and payloads of a window."""
        found = [(self.leases[id], payload) for id, payload in self.uploads.items()]
        return [(lease.client, payload) for lease, payload in found if (lease.round, lease.task) == key]


def run_machine(factory: JournalFactory, folder: Path) -> None:
    """Try the journals that ``factory`` opens; of one that needs a folder, each in a new one below ``folder``."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.place = Place(factory, folder)
            self.place.folder = folder / self.place.federation
            self.model = Model(self.place.clock)
            self.boots = 1
            self.open()
            self.claim()

        def open(self) -> None:
            self.opened = self.place.open()
            self.journal = self.opened.__enter__()

        def teardown(self) -> None:
            self.opened.__exit__(None, None, None)

        @rule()
        def reopen(self) -> None:
            self.teardown()
            self.open()

        @rule()
        def claim(self) -> None:
            self.model.epoch += 1
            assert self.journal.claim() == self.model.epoch

        @rule(round=ROUNDS, task=TASKS)
        def open_round(self, round: int, task: Task) -> None:
            found = self.model.rounds.get((round, task))
            if found is not None and found.state != "open":
                _raises(WrongState, self.journal.open_round, self.model.epoch, round, task, "plan")
                return
            record = found or RoundRecord(round, task, "open", self.model.epoch, "plan")
            assert self.journal.open_round(self.model.epoch, round, task, "plan") == record
            self.model.rounds[round, task] = record

        @rule(round=ROUNDS, task=TASKS, state=st.sampled_from(list(BEFORE)), late=st.booleans())
        def advance(self, round: int, task: Task, state: State, late: bool) -> None:
            found, epoch = self.model.rounds.get((round, task)), self.model.epoch
            if late:
                _raises(Fenced, self.journal.advance, epoch - 1, round, task, state, "")
            elif found is None or (found.state != state and found.state not in BEFORE[state]):
                _raises(WrongState, self.journal.advance, epoch, round, task, state, "")
            else:
                reached = self.journal.advance(epoch, round, task, state, "why")
                if found.state != state:
                    found = replace(found, state=state, epoch=epoch, reason="why")
                assert reached == found
                self.model.rounds[round, task] = found

        @rule(round=ROUNDS, task=TASKS, client=CLIENTS, seconds=SECONDS, most=MOST)
        def lease(self, round: int, task: Task, client: int, seconds: float, most: int | None) -> None:
            key, now = (round, task, client), self.place.clock.now
            expected, lease = self.model.expected_lease(key), self.journal.lease(*key, seconds, most).result()
            if expected == "none":
                assert lease is None
                return
            at_work = self.model.at_work(task)
            if expected == "new" and most is not None and (client in at_work or len(at_work) >= most):
                assert (lease in at_work[client]) if client in at_work else lease is None
                return
            assert lease is not None
            if expected == "same":
                assert lease == self.model.leases[self.model.current[key]]
            else:
                assert lease.id not in self.model.leases
                assert lease == Lease(lease.id, *key, Instant(now.boot, now.seconds + seconds), given=now)
            self.model.leases[lease.id] = lease
            self.model.current[key] = lease.id

        @precondition(lambda self: self.model.leases)
        @rule(data=st.data(), payload=PAYLOADS)
        def accept(self, data: Any, payload: bytes) -> None:
            id = data.draw(st.sampled_from(list(self.model.leases)))
            assert self.journal.accept(Upload.of(id, payload)).result() is self.model.accept(id, payload)

        @precondition(lambda self: self.model.leases)
        @rule(data=st.data(), seconds=SECONDS)
        def renew(self, data: Any, seconds: float) -> None:
            id = data.draw(st.sampled_from(list(self.model.leases)))
            renewed, now = self.journal.renew(id, seconds).result(), self.place.clock.now
            if not self.model.lives(id):
                assert renewed is None
                return
            assert renewed == replace(self.model.leases[id], expires=Instant(now.boot, now.seconds + seconds))
            self.model.leases[id] = renewed

        @rule(seconds=st.sampled_from([5.0, 30.0]))
        def time_goes_on(self, seconds: float) -> None:
            self.place.clock.go_on(seconds)

        @rule()
        def the_machine_starts_anew(self) -> None:
            self.boots += 1
            self.place.clock.start_anew(f"boot {self.boots}")

        @rule(through=ROUNDS)
        def retire(self, through: int) -> None:
            mine = [key for key in self.model.rounds if key[0] <= through]
            if any(self.model.rounds[key].state in ("open", "closed") for key in mine):
                _raises(WrongState, self.journal.retire, self.model.epoch, through)
                return
            self.journal.retire(self.model.epoch, through)
            for key in mine:
                self.model.rounds[key] = replace(self.model.rounds[key], retired=True)

        @invariant()
        def both_hold_the_same(self) -> None:
            assert self.journal.rounds() == [self.model.rounds[key] for key in sorted(self.model.rounds)]
            for key, record in self.model.rounds.items():
                if record.retired:
                    continue
                found = list(self.journal.accepted(*key))
                assert [(each.client, each.payload) for each in found] == self.model.accepted(key)
                assert [each.position for each in found] == list(range(1, record.accepted + 1))

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _raises(kind: type[Exception], call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except kind:
        return
    raise AssertionError(f"{call.__name__}{arguments} should have raised {kind.__name__}")
