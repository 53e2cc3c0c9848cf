"""A cohort split over workers: each prepares the data of its share of a block, and trains it.

Where the workers are (processes of this machine, a cluster) is another file's matter; who is trained where changes no
bit.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
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
Message = tuple[str, Plan, Any]  # what to do (prepare, resume, train), the plan, and the clients or their work

_log = logging.getLogger("fedtower.vectorized")


class WorkerDied(FedtowerError):
    """A worker of a simulation ended without an answer."""


class WorkerFailed(FedtowerError):
    """A worker ran into an error that cannot be sent as it is."""


class Worker(Protocol):
    """One that trains, as the crew sees it: every message has one answer."""

    def send(self, message: Message) -> None:
        """Let it work. One that is gone is told of by :meth:`receive`."""
        ...

    def receive(self) -> Any:
        """Its answer, or the exception it ran into. Raises WorkerDied when there will be none."""
        ...

    def close(self) -> None:
        """End it."""
        ...


Hire = Callable[[ClientData | None, int], Worker]


@dataclass(frozen=True)
class Prepared(Work):
    """Work whose batches lie with the workers: here are only the clients, their steps, and the rows they need."""


class Crew:
    """A runtime in so many workers. ``hire(data, number)`` starts one."""

    def __init__(self, hire: Hire, workers: int) -> None:
        self._hire = hire
        self._count = workers
        self._data: ClientData | None = None
        self._workers: list[Worker] = []
        self._prepared: list[Message] = []  # what each worker has prepared last: one in its place has to do it again
        weakref.finalize(self, _end, self._workers)

    def prepares(self, data: ClientData) -> ClientData:
        """The same data, its batches made by the workers."""
        self._data = data
        return self

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """One visit of each client, without the batches."""
        self._prepared = [("prepare", plan, share) for share in self._shares(clients)]
        parts: list[Work] = self._ask(self._prepared)
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
        edges = np.cumsum([0, *(len(share) for share in self._shares(work.clients))])
        shares = [_share(work, first, last) for first, last in pairwise(edges.tolist())]
        told = "resume" if isinstance(work, Prepared) else "train"
        done: list[tuple[Updates, States]] = self._ask([(told, plan, share) for share in shares])
        return stack(updates for updates, _ in done), {
            name: np.concatenate([own[name] for _, own in done]) for name in work.states
        }

    def close(self) -> None:
        """End the workers. Those of a crew that is no longer referred to end by themselves."""
        _end(self._workers)

    def _shares(self, clients: IntArray) -> list[IntArray]:
        """Who goes to which worker: nobody gets an empty share as long as there are clients."""
        return np.array_split(clients, max(1, min(self._count, len(clients))))

    def _ask(self, messages: Sequence[Message]) -> list[Any]:
        """The answers of as many workers as there are messages, in their order; all work at the same time."""
        for number in range(len(self._workers), len(messages)):
            self._workers.append(self._hire(self._data, number))
        for worker, message in zip(self._workers, messages, strict=False):
            worker.send(message)
        try:
            # All of them, whatever they are: a later message needs a worker that has nothing left to say.
            answers = [self._answer(number, message) for number, message in enumerate(messages)]
        except FedtowerError:
            self.close()
            raise
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _answer(self, number: int, message: Message) -> Any:
        """The answer of a worker, or of the one that takes its place when it has died."""
        try:
            return self._workers[number].receive()
        except WorkerDied as death:
            _log.warning("%s; another one does its share again", death)
        self._workers[number].close()
        worker = self._workers[number] = self._hire(self._data, number)
        for again in [self._prepared[number], message] if message[0] == "resume" else [message]:
            worker.send(again)
            answer = worker.receive()  # a second death is the block's or the machine's fault, and is told of
        return answer


class Bench:
    """What a worker does, wherever it is: it keeps the batches that it has prepared until it trains on them."""

    def __init__(self, runtime: Runtime, data: ClientData | None, name: str) -> None:
        self._runtime, self._data, self._name = runtime, data, name
        self._held: Work | None = None

    def answer(self, told: str, plan: Plan, given: Any) -> Any:
        """The answer to a message; of one that fails, the exception, which is the crew's to raise."""
        try:
            if told == "prepare":
                assert self._data is not None
                self._held = self._data.work(plan, np.array(given))
                return replace(self._held, inputs={}, slots={})
            if told == "resume":
                assert self._held is not None
                given = replace(self._held, rows=given.rows, states=given.states)
            updates, states = self._runtime.train(plan, given)
            return updates, dict(states)
        except Exception as error:
            error.add_note(f"in {self._name}")
            return error


def unsendable(answer: Any) -> WorkerFailed:
    """What is sent in the place of an answer, an exception, that cannot be pickled."""
    return WorkerFailed(f"a worker of the vectorized runtime failed: {answer!r}")


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()
    workers.clear()


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
