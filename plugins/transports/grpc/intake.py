"""Intake: what the public port answers to devices: leases, artefacts, rows, and uploads that are checked and kept.

An intake holds nothing that matters. It may be killed at any moment, and others may run beside it: what is true is in
the journal and in the files of the windows. Who calls has been found out before a method here is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedtower.core.errors import FedtowerError
from fedtower.core.journal import Journal, Lease, Task
from fedtower.core.registry import Registry
from fedtower.plugins.transports.grpc.answers import Answers
from fedtower.plugins.transports.grpc.artefact_store import ArtefactStore
from fedtower.plugins.transports.grpc.bell import Bell
from fedtower.plugins.transports.grpc.bounds import parse
from fedtower.plugins.transports.grpc.checks import Expected
from fedtower.plugins.transports.grpc.codec import refuse_other_protocol
from fedtower.plugins.transports.grpc.journal_reads import JournalReads
from fedtower.plugins.transports.grpc.leased import LeasedRows, remove_ended
from fedtower.plugins.transports.grpc.meters import Meters
from fedtower.plugins.transports.grpc.open_windows import OpenWindows
from fedtower.plugins.transports.grpc.presence import Presence
from fedtower.plugins.transports.grpc.receiving_upload import ReceivingUpload
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.rows import ids_of
from fedtower.plugins.transports.grpc.staging import Staging
from fedtower.plugins.transports.grpc.waiting import Waiting
from fedtower.plugins.transports.grpc.windows import Window
from fedtower.protos.v1 import federation_pb2 as pb

Result = TypeVar("Result")

CHUNK_BYTES = 256 << 10
_SMALL = 64 << 10  # to check so few bytes takes less than to hand them to another thread and back
_PIECE = 2047
MOST_TOGETHER = 256
_LOOK_SECONDS = 0.05  # how old what is known of the windows may be
_WATCH_SECONDS = 0.25  # how often they are looked at when no bell rings
_TASKS: Mapping[str, pb.Task.ValueType] = {"train": pb.TASK_TRAIN, "evaluate": pb.TASK_EVALUATE}
_about: ContextVar[tuple[int, Task] | None] = ContextVar("about", default=None)
_NAMES: Mapping[int, Task] = {pb.TASK_TRAIN: "train", pb.TASK_EVALUATE: "evaluate"}


@dataclass(frozen=True)
class Caller:
    """Who calls: the device, as its credentials say, and the client that it is."""

    device: str
    client: int

    @property
    def whose(self) -> str:
        """The caller, as an error names it."""
        return f"client {self.client} (device {self.device})"


def about() -> Mapping[str, Any]:
    """The round and task of the call that is being answered, as far as they are known: for the log."""
    held = _about.get()
    return {} if held is None else {"round": held[0], "task": held[1]}


class RowsLine(Protocol):
    """Asks the table process for rows: a serialised FetchRowsRequest, and serialised RowsChunks."""

    def __call__(self, request: bytes) -> AsyncIterator[bytes]:
        """The chunks. Raises RowsAway while there is no table process."""
        ...


class RowsAway(Exception):
    """The table process does not answer; it is being started again."""


@dataclass(frozen=True)
class Limits:
    """What one intake takes at most."""

    upload_bytes: int = 256 << 20
    memory_bytes: int = 24 << 20
    come_back_seconds: float = 2.0
    presence_seconds: float = 30.0
    header_seconds: float = 20.0
    """Until the first part of an upload is here."""
    slow_seconds: float = 5.0
    """What an upload may take while others wait for its place."""
    silence_seconds: float = 120.0
    journal_seconds: float = 3.0
    """What the journal may take to be read; who needs it is asked to come back then, and nobody else waits."""
    most_waiting: int = 2_000
    """Check-ins that are held: one takes 30 kB, and memory does not grow with the number of devices."""

    @property
    def wait_seconds(self) -> float:
        """How long a check-in is held at most: whoever waits on the line is there."""
        return self.presence_seconds / 2


@dataclass
class Intake:
    """Answers to calls. Messages come and go as bytes."""

    folder: Path
    federation: str
    journal: Journal
    rows: RowsLine
    meters: Meters
    registry: Registry
    limits: Limits = field(default_factory=Limits)
    log: Callable[[str, Mapping[str, Any]], None] = lambda word, values: None
    draining: bool = field(default=False, init=False)
    stumbled: float = field(default=float("-inf"), init=False)  # when storing failed last, by time.monotonic()

    def __post_init__(self) -> None:
        self.artefacts = ArtefactStore(self.folder / "artefacts")
        self.presence = Presence(self.folder / "present")
        self.staging = Staging(self.folder / "staging", self.limits.upload_bytes)
        self.leased = LeasedRows(self.folder / "leased")
        self._open = OpenWindows(self.folder, self.federation, self.registry, self.artefacts)
        self._reads = JournalReads(self.limits.journal_seconds)
        self._looked = float("-inf")  # when, by the loop's clock
        self._looking: asyncio.Task[None] | None = None
        self.waiting = Waiting(self.limits.most_waiting)
        self._answers = Answers()
        self.receiving = ReceivingUpload(self)
        self._news = 0  # counts what may make those who wait ask again

    async def check_in(self, caller: Caller, data: bytes) -> pb.CheckInReply:
        """A lease, or when to come back."""
        request = parse(pb.CheckInRequest, data, whose=caller.whose)
        refuse_other_protocol(request.protocol, caller.whose)
        if request.federation and request.federation != self.federation:
            raise Refused(
                Reason.OTHER_FEDERATION,
                f"{caller.whose} belongs to the federation {request.federation!r}, and this is {self.federation!r}; "
                f"enrol again",
            )
        self.presence.saw(caller.client)
        loop = asyncio.get_running_loop()
        patient = request.wait_seconds > 0  # which NaN is not
        until = loop.time() + (min(request.wait_seconds, self.limits.wait_seconds) if patient else 0.0)
        while True:
            news = self._news
            reply = await self._offered(caller, request)
            if reply is not None:
                return reply
            if news == self._news and not await self.waiting.called(caller.client, until - loop.time()):
                break
        if patient and loop.time() >= until:
            pause = 0.0
        elif patient and self.waiting.is_full:
            pause = max(self.limits.come_back_seconds, self.limits.wait_seconds / 2)
        else:
            pause = self.limits.come_back_seconds
        return pb.CheckInReply(come_back=pb.ComeBack(seconds=pause, reason="there is nothing to do now"))

    async def _offered(self, caller: Caller, request: pb.CheckInRequest) -> pb.CheckInReply | None:
        """A lease, or that it is over; nothing if there is nothing to do."""
        finished = self.finished()
        if finished:
            self.presence.left(caller.client)
            return pb.CheckInReply(finished=pb.Finished(reason=finished))
        if self.draining:
            pause = pb.ComeBack(seconds=self._pause(), reason="this server is about to stop")
            return pb.CheckInReply(come_back=pause)
        wanted = {_NAMES[task] for task in request.tasks if task in _NAMES} or {"train", "evaluate"}
        for window, most in _offers((await self._windows()).windows(), caller.client):
            if window.task in wanted:
                asked = (window.round, window.task, caller.client, window.lease_seconds, most)
                lease = await self.durable(self.journal.lease(*asked))
                held = None if lease is None else self._open.get(lease.round, lease.task)
                if lease is not None and held is not None:
                    window = held.window  # an older one, if the client works from that
                    self._open.note(lease)
                    self.meters.leased(window.task)
                    if request.num_examples:
                        self.leased.note_examples((window.round, window.task), lease.id, request.num_examples)
                    return pb.CheckInReply(lease=_lease_message(lease, window, self._seconds_left(lease, window)))
        return None

    async def watch(self, bell: Bell) -> None:
        """Look at the windows whenever the bell rings, and now and then, and call those for whom there is something;
        without an end.
        """
        rung, loop, is_well = asyncio.Event(), asyncio.get_running_loop(), True

        def heard() -> None:
            bell.hush()
            rung.set()

        loop.add_reader(bell.fileno(), heard)
        try:
            while True:
                try:
                    await self.look()
                    if self.finished():
                        self._release()
                    is_well = True
                except (FedtowerError, OSError) as error:  # the disk or another process; the next look may do better
                    if is_well:  # else it was said
                        self.said("not now", call="watch", message=str(error))
                    is_well = False
                with suppress(TimeoutError):
                    async with asyncio.timeout(_WATCH_SECONDS):
                        await rung.wait()
                rung.clear()
        finally:
            loop.remove_reader(bell.fileno())

    def _release(self) -> None:
        """Let those who wait ask again."""
        self._news += 1
        self.waiting.call_all()

    async def fetch(self, caller: Caller, data: bytes) -> AsyncIterator[pb.Chunk]:
        """An artefact in chunks, and small ones that are asked for with it."""
        request = parse(pb.FetchRequest, data, whose=caller.whose)
        window = await self.lease_of(caller, request.lease)
        first, others = request.digest, [each for each in dict.fromkeys(request.then) if each != request.digest]
        if len(first) != 32 or not self.artefacts.path(first).is_file():
            with self.in_vain(request.lease):
                raise await self._without(caller, window, first)
        if len(others) > MOST_TOGETHER:
            raise Refused(
                Reason.TOO_LARGE, f"{caller.whose} asked for {len(others)} artefacts at once; {MOST_TOGETHER} may be"
            )
        for chunk in self.artefacts.chunks(first, request.offset, others, CHUNK_BYTES):
            self.meters.sent(len(chunk))
            yield pb.Chunk(data=chunk)

    async def _without(self, caller: Caller, window: tuple[int, Task], digest: bytes) -> Refused:
        """Why an artefact is not here: what a round was sent goes when it is over."""
        await self.look()
        if self._open.get(*window) is None:
            return Refused(
                Reason.ROUND_CLOSED,
                f"round {window[0]} ({window[1]}) waits for nothing more, and what it was sent is gone; {caller.whose} "
                f"may check in again",
            )
        return Refused(
            Reason.UNKNOWN_ARTEFACT, f"{caller.whose} asked for an artefact {digest.hex()[:16]!r} that is not here"
        )

    async def fetch_rows(self, caller: Caller, data: bytes) -> AsyncIterator[bytes]:
        """Rows, as serialised RowsChunks: passed on from the table process unread."""
        request = parse(pb.FetchRowsRequest, data, whose=caller.whose)
        round, task = await self.lease_of(caller, request.lease)
        with self.in_vain(request.lease):
            source = (await self._expected(round, task, caller)).rows.get(request.source)
        ids = ids_of(request, caller.whose)
        if source is None or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < source.num_rows):
            raise Refused(
                Reason.ROW_NOT_LEASED,
                f"{caller.whose} asked for rows of {request.source!r} that there are not; ids go from 0 to "
                f"{-1 if source is None else source.num_rows - 1}",
            )
        self.leased.note((round, task), request.lease, request.source, ids)
        try:
            async for chunk in self.rows(data):
                self.meters.sent(len(chunk))
                yield chunk
        except RowsAway:
            pause = pb.ComeBack(seconds=self.limits.come_back_seconds, reason="rows are coming back")
            yield pb.RowsChunk(come_back=pause).SerializeToString()

    async def heartbeat(self, caller: Caller, data: bytes) -> pb.HeartbeatReply:
        """More time for a lease."""
        request = parse(pb.HeartbeatRequest, data, whose=caller.whose)
        round, task = await self.lease_of(caller, request.lease)
        with self.in_vain(request.lease):
            window = (await self._expected(round, task, caller)).window
            lease = await self.durable(self.journal.renew(request.lease, window.lease_seconds))
            if lease is None:
                raise Refused(Reason.LATE, f"the lease of {caller.whose} in round {round} has run out")
        return pb.HeartbeatReply(alive=pb.Alive(seconds_left=self._seconds_left(lease, window)))

    async def resume(self, caller: Caller, data: bytes) -> pb.ResumeReply:
        """How much of an upload is here."""
        request = parse(pb.ResumeRequest, data, whose=caller.whose)
        if len(request.digest) != 32:
            raise Refused(Reason.CORRUPT, f"{caller.whose} named a digest of {len(request.digest)} bytes; it has 32")
        window = await self.lease_of(caller, request.lease)
        return pb.ResumeReply(held=pb.Held(offset=self.staging.held(window, request.lease, request.digest)))

    async def submit(self, caller: Caller, parts: AsyncIterator[bytes]) -> pb.SubmitReply:
        """An upload: received, checked, made durable, and only then acknowledged."""
        return await self.receiving.submit(caller, parts)

    async def drain(self, seconds: float) -> bool:
        """Give out no more tasks, and wait for the uploads that are on their way; whether all came in ``seconds``."""
        self.draining, until = True, asyncio.get_running_loop().time() + seconds
        self._release()
        while self.receiving.uploads and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        return not self.receiving.uploads

    async def tell_all(self, seconds: float) -> bool:
        """Wait until all who are there have called and were told that it is over; whether they were in ``seconds``."""
        until = asyncio.get_running_loop().time() + seconds
        while self.presence.awaits(self.limits.presence_seconds):
            if asyncio.get_running_loop().time() >= until:
                return False
            await asyncio.sleep(0.02)
        return True

    @property
    def has_windows(self) -> bool:
        """Whether a window is open that devices work for."""
        return bool(self._open.windows())

    def said(self, word: str, **values: Any) -> None:
        """Write to the log."""
        self.log(word, values)

    def finished(self) -> str:
        """Why there will be no more rounds, if so."""
        path = self.folder / "finished"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @contextmanager
    def in_vain(self, lease: bytes, *, came: bool = False) -> Iterator[None]:
        """Who is refused within has worked for nothing, unless he may try again; the journal notes when, some time.

        ``came`` says that an update has come.
        """
        try:
            yield
        except Refused as refusal:
            if refusal.reason not in (Reason.CORRUPT, Reason.UNKNOWN_ARTEFACT):
                with suppress(FedtowerError):  # it is a figure of a report, and the refusal must be told
                    self.journal.end(lease, late=came and refusal.reason is Reason.LATE)
            raise

    async def waits_for(self, round: int, task: Task) -> Expected | None:
        """What a window is held to; nothing, where the journal says that it is not open."""
        held = (await self._windows()).get(round, task)
        if held is None:  # opened this moment, or this process has just begun
            await self.look()
            held = self._open.get(round, task)
        return None if held is None else held.expected

    async def lease_of(self, caller: Caller, lease: bytes) -> tuple[int, Task]:
        """The round and task of a lease. Raises Refused for one that is not the caller's."""
        held = self._open.lease(lease)
        if held is None:  # another process gave it, or this one before a kill
            record = await self._reads.ask(lambda: self.journal.find(lease))
            held = None if record is None else self._open.note(record.lease)
        if held is None or held[2] != caller.client:
            raise Refused(
                Reason.UNKNOWN_LEASE, f"{caller.whose} has no lease {lease.hex()[:16]!r} here; check in to be given one"
            )
        _about.set(held[:2])
        self.presence.saw(caller.client)
        return held[0], held[1]

    async def _expected(self, round: int, task: Task, caller: Caller) -> Expected:
        held = (await self._windows()).get(round, task)
        if held is None:
            raise Refused(
                Reason.ROUND_CLOSED, f"round {round} ({task}) waits for nothing more; {caller.whose} may check in again"
            )
        return held.expected

    async def _windows(self) -> OpenWindows:
        """The windows that are open, as they stood at most 50 ms ago."""
        await self._look_since(asyncio.get_running_loop().time() - _LOOK_SECONDS)
        return self._open

    async def look(self) -> None:
        """Read how the windows stand now, and call the clients of those that have opened."""
        await self._look_since(asyncio.get_running_loop().time())

    async def _look_since(self, moment: float) -> None:
        """A look that began no earlier than that, by the loop's clock: one for all who wait for one.

        Raises:
            Busy: the journal does not answer.
        """
        while self._looked < moment:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(self._look_once())
            await asyncio.shield(self._looking)  # others wait for it too, when this caller has gone

    async def _look_once(self) -> None:
        begun = asyncio.get_running_loop().time()
        self._note_presence()
        gone = self._open.take(await self._reads.ask(self.journal.rounds))
        self._looked = begun
        for each in gone:
            self.leased.forget(each)
        for folder in (self.leased.folder, self.staging.folder) if gone else ():
            remove_ended(folder, self._open.records)
        for window in self._open.opened():
            self._news += 1
            self.waiting.call(window.clients)
        self.meters.windows(self._open.newest())  # the others were told when they were the newest

    def _note_presence(self) -> None:
        for client in self.waiting.clients():
            self.presence.saw(client)
        try:
            # Twice: in some of that time nobody may have listened.
            self.presence.write(within_seconds=max(self.limits.presence_seconds, 2 * self.limits.silence_seconds))
        except OSError as error:  # a full disk: who is there is no promise, and calls are answered all the same
            self.said("presence_not_written", message=str(error))

    async def durable(self, promised: Future[Result]) -> Result:
        """What the journal says, once it is on the disk."""
        return await self._answers.of(promised)

    def _seconds_left(self, lease: Lease, window: Window) -> float:
        """How long a lease lives; a journal elsewhere has a clock of its own, and its leases are as long as any."""
        now = self.presence.clock()
        return lease.seconds_left(now) if lease.expires.boot == now.boot else window.lease_seconds

    def _pause(self) -> float:
        return self.limits.come_back_seconds


def _offers(windows: list[Window], client: int) -> Iterator[tuple[Window, int | None]]:
    """Where a client may be given a lease, and how many may have one there: of the windows of training in the newest.

    Who may be at work in an older one is given what it has, and nothing new.
    """
    training = [window for window in windows if window.task == "train"]
    for window in windows:
        if window in training[:-1]:
            continue
        if window.includes(client):
            yield window, window.concurrency
        elif window in training and any(older.includes(client) for older in training):
            yield window, 0


def _lease_message(lease: Lease, window: Window, seconds_left: float) -> pb.Lease:
    return pb.Lease(
        lease=lease.id,
        task=_TASKS[lease.task],
        round=lease.round,
        client=lease.client,
        plan=window.plan,
        heartbeat_seconds=window.heartbeat_seconds,
        seconds_left=seconds_left,
    )
