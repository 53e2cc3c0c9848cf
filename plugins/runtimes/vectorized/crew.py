"""A cohort split over worker processes: each prepares the data of its share of a block, and trains it.

Workers are forked when the first block comes, so they hold the run's data without a copy of it. Arrays go to and fro
through memory that both sides share; who is trained where changes no bit.
"""

from __future__ import annotations

import mmap
import multiprocessing
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtower.core.client import ClientData
from fedtower.core.errors import FedtowerError
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Runtime, Work
from fedtower.core.updates import Updates, stack

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
States = Mapping[str, FloatArray]

# Addresses, not memory: pages that no block ever needs are never allocated. What does not fit goes through the pipe.
_SHARED_BYTES = 1 << 30


class WorkerDied(FedtowerError):
    """A worker process of a simulation ended without an answer."""


class WorkerFailed(FedtowerError):
    """A worker process ran into an error that cannot be sent as it is."""


@dataclass(frozen=True)
class Prepared(Work):
    """Work whose batches lie with the workers: here are only the clients, their steps, and the rows they need."""


class Crew:
    """A runtime in ``workers`` processes."""

    def __init__(self, runtime: Runtime, workers: int) -> None:
        self._runtime = runtime
        self._count = workers
        self._data: ClientData | None = None
        self._workers: list[Worker] = []

    def prepares(self, data: ClientData) -> ClientData:
        """The same data, its batches made by the workers."""
        self._data = data
        return self

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """One visit of each client, without the batches."""
        shares = np.array_split(clients, self._count)
        parts: list[Work] = self._ask([("prepare", plan, share) for share in shares])
        row_ids = {}
        for source in parts[0].row_ids:
            held = [part.row_ids[source] for part in parts]
            lengths = np.concatenate([np.diff(each.offsets) for each in held])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            row_ids[source] = RowIds(offsets, np.concatenate([each.ids for each in held]))
        steps = np.concatenate([part.steps for part in parts])
        examples = np.concatenate([part.examples for part in parts])
        return Prepared(clients, steps, examples, {}, {}, row_ids)

    def train(self, plan: Plan, work: Work) -> tuple[Updates, States]:
        """The updates of the clients of ``work``, and what their device parameters have become."""
        edges = np.cumsum([0, *(len(share) for share in np.array_split(work.clients, self._count))])
        shares = [_share(work, first, last) for first, last in pairwise(edges.tolist())]
        told = "resume" if isinstance(work, Prepared) else "train"
        done: list[tuple[Updates, States]] = self._ask([(told, plan, share) for share in shares])
        updates = stack(updates for updates, _ in done if len(updates))
        return updates, {name: np.concatenate([own[name] for _, own in done]) for name in work.states}

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _ask(self, messages: Sequence[tuple[str, Plan, Any]]) -> list[Any]:
        """Every worker's answer to its message, in the workers' order; all work at the same time."""
        if not self._workers:
            self._workers = [Worker.start(self._runtime, self._data, number) for number in range(self._count)]
        for worker, message in zip(self._workers, messages, strict=True):
            worker.send(message)
        answers = [worker.receive() for worker in self._workers]  # all of them: a later message needs a free worker
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


@dataclass(frozen=True)
class Post:
    """One end of a line to another process: the arrays of a message through shared memory, the rest through a pipe."""

    pipe: Connection
    outgoing: mmap.mmap
    incoming: mmap.mmap

    @staticmethod
    def pair() -> tuple[Post, Post]:
        """Both ends."""
        here, there = multiprocessing.Pipe()
        down, up = mmap.mmap(-1, _SHARED_BYTES), mmap.mmap(-1, _SHARED_BYTES)
        return Post(here, down, up), Post(there, up, down)

    def send(self, message: Any) -> None:
        """Send; what was sent before must have been used up."""
        places: list[tuple[int, int]] = []
        used = 0

        def keep(buffer: pickle.PickleBuffer) -> bool:
            nonlocal used
            raw = buffer.raw()
            if used + raw.nbytes > len(self.outgoing):
                return True  # no room: within the message
            self.outgoing[used : used + raw.nbytes] = raw
            places.append((used, used + raw.nbytes))
            used += -(-raw.nbytes // 64) * 64
            return False

        body = pickle.dumps(message, protocol=5, buffer_callback=keep)
        self.pipe.send((places, body))

    def receive(self) -> Any:
        """The next message; its arrays are views that last until the next one. Raises EOFError at the end."""
        places, body = self.pipe.recv()
        shared = memoryview(self.incoming)
        return pickle.loads(body, buffers=[shared[first:last] for first, last in places])


@dataclass(frozen=True)
class Worker:
    """A process that trains, as its parent sees it."""

    process: ForkProcess
    post: Post
    number: int

    @staticmethod
    def start(runtime: Runtime, data: ClientData | None, number: int) -> Worker:
        """Fork it. As torch's own data loaders do: a forked process may use torch as long as it uses one thread."""
        here, there = Post.pair()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(runtime, data, here, there), daemon=True, name=f"fedtower-worker-{number}"
        )
        process.start()
        there.pipe.close()
        return Worker(process, here, number)

    def send(self, message: Any) -> None:
        """Let it work."""
        try:
            self.post.send(message)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        """Its answer, or the exception it ran into."""
        try:
            return self.post.receive()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def close(self) -> None:
        """End it."""
        self.post.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _died(self) -> WorkerDied:
        self.process.join(timeout=1)
        return WorkerDied(
            f"worker {self.number} of the vectorized runtime ended with exit code {self.process.exitcode} in the "
            f"middle of its work (-9 is often the system's want of memory: lower transport.block or runtime.workers); "
            f"`fedtower resume` goes on from the last checkpoint"
        )


def _serve(runtime: Runtime, data: ClientData | None, parents: Post, post: Post) -> None:
    """Answer until the parent hangs up."""
    parents.pipe.close()  # or this process would never see that its parent is gone
    torch.set_num_threads(1)
    held: Work | None = None
    while True:
        try:
            told, plan, given = post.receive()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            if told == "prepare":
                assert data is not None
                held = data.work(plan, np.array(given))
                answer: Any = replace(held, inputs={}, slots={})
            elif told == "resume":
                assert held is not None
                answer = _packed(runtime.train(plan, replace(held, rows=given.rows, states=given.states)))
            else:
                answer = _packed(runtime.train(plan, given))
        except KeyboardInterrupt:
            return
        except Exception as error:  # it is the parent's to report
            error.add_note(f"in worker process {multiprocessing.current_process().name}")
            answer = error
        try:
            post.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError):  # an exception that does not travel
            post.send(WorkerFailed(f"a worker of the vectorized runtime failed: {answer!r}"))


def _packed(done: tuple[Updates, States]) -> tuple[Updates, dict[str, FloatArray]]:
    return done[0], dict(done[1])


def _share(work: Work, first: int, last: int) -> Work:
    """The work of the clients ``first`` to ``last``."""
    here = slice(first, last)
    row_ids, rows = {}, {}
    for source, needed in work.row_ids.items():
        start, stop = needed.offsets[first], needed.offsets[last]
        row_ids[source] = RowIds(needed.offsets[first : last + 1] - start, needed.ids[start:stop])
        if source in work.rows:
            rows[source] = work.rows[source][start:stop]
    return Work(
        clients=work.clients[here],
        steps=work.steps[here],
        examples=work.examples[here],
        inputs={name: np.ascontiguousarray(value[here]) for name, value in work.inputs.items()},
        slots={name: np.ascontiguousarray(value[here]) for name, value in work.slots.items()},
        row_ids=row_ids,
        rows=rows,
        states={name: value[here] for name, value in work.states.items()},
    )
