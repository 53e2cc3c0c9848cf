"""Processes: which of the processes of a torchrun this one is, and what they do in step.

All run the same program on the same recipe. The leading one, of rank 0, has the run folder, the log and the terminal;
the others do their part of what it orders, and end as it ends.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from fedtower.core.errors import FedtowerError
from fedtower.recsys.launch import rank_and_count

T = TypeVar("T")
IntArray = NDArray[np.int64]

# The leading one may evaluate or read data for as long as it takes. One that dies is not waited for: its connections
# close.
_PATIENCE = timedelta(days=30)
_FAREWELL_SECONDS = 5.0
_GLANCE_SECONDS, _GRACE_SECONDS = 0.2, 1.0
_INTERRUPTED = 130


class ProcessFailed(FedtowerError):
    """Another process of the run ended, and so must this one."""


@dataclass(frozen=True)
class Processes:
    """The process of rank ``rank`` among ``count``; alone by default, and then nothing here sends anything."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one with the run folder, the log and the terminal."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def tell(self, value: T) -> T:
        """What the leading process gives, in every process."""
        if self.is_alone:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def order(self, name: str, *arguments: Any) -> None:
        """By the leading process: have the others, who :meth:`serve`, do this too."""
        self.tell((name, arguments))

    def serve(self, parts: Mapping[str, Callable[..., object]]) -> None:
        """By the others: do one's part of every order, until the order is ``end``."""
        while True:
            name, arguments = self.tell(("end", ()))
            if name == "end":
                return
            parts[name](*arguments)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; the same bits everywhere."""
        if self.is_alone or not tensors:
            return
        flat = torch.cat([value.detach().reshape(-1) for value in tensors])
        distributed.all_reduce(flat)
        for value, total in zip(tensors, torch.split(flat, [value.numel() for value in tensors]), strict=True):
            value.detach().copy_(total.view_as(value))

    def most(self, number: int) -> int:
        """The largest of everybody's numbers."""
        if self.is_alone:
            return number
        box = torch.tensor([number])
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)

    def scatter(self, values: Tensor | None, like: Tensor) -> Tensor:
        """This process's part of what the leading one cuts into equal ones; ``like`` is the shape of a part."""
        parts = None if values is None else list(torch.split(values, len(like)))
        distributed.scatter(like, parts, src=0)
        return like

    def gather(self, part: Tensor) -> Tensor | None:
        """Everybody's part, one after another, in the leading process; nothing in the others."""
        parts = [torch.empty_like(part) for _ in range(self.count)] if self.leads else None
        distributed.gather(part.contiguous(), parts, dst=0)
        return None if parts is None else torch.cat(parts)

    def share(self, count: int) -> tuple[IntArray, NDArray[np.bool_]]:
        """Which of ``count`` things are this process's, and which of those are real.

        Everybody has as many, at least one if there are any; to make it so the first is repeated, and not real.

        >>> positions, real = Processes(1, 2).share(5)
        >>> positions.tolist(), real.tolist()
        ([3, 4, 0], [True, True, False])
        """
        size = -(-count // self.count)
        positions = np.arange(self.rank * size, (self.rank + 1) * size, dtype=np.int64)
        real = positions < count
        return np.where(real, positions, 0), real


ALONE = Processes()


@contextmanager
def together() -> Iterator[Processes]:
    """The processes that ``torchrun`` started, joined over gloo; without it, this process alone.

    Whichever fails first says so. The others stop then, and raise :class:`ProcessFailed` with the same exit code and
    nothing left to say; so do those whose work is cut off when a process was killed.
    """
    if distributed.is_initialized():
        yield Processes(distributed.get_rank(), distributed.get_world_size())
        return
    if rank_and_count()[1] == 1:
        yield ALONE
        return
    store, rank, count = next(rendezvous("env://"))
    notice = _Notice(store, rank, count)
    try:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        yield Processes(rank, count)
        notice.stop_reading()
        distributed.barrier()  # one that leaves early makes others abort
    except BaseException as error:
        error = _undisturbed(error)
        notice.stop_reading()
        is_first = notice.post(error)
        _leave()  # others may wait for this one: those whose connections close now hear that it is gone
        raise notice.ending(error, is_first) from error.__cause__
    _leave()


def _undisturbed(error: BaseException) -> BaseException:
    """The error, or the interrupt that was on its way behind it; from now on no signal gets between a process and its
    end, not even that of a torchrun which has seen another's end.
    """
    try:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, lambda number, frame: None)
            signal.signal(signal.SIGTERM, lambda number, frame: None)
    except KeyboardInterrupt:
        return _undisturbed(_interrupt(error))
    return error


def _interrupt(error: BaseException) -> KeyboardInterrupt:
    """An interrupt with what was noted on the error that it led to: how to go on."""
    interrupt = KeyboardInterrupt()
    for note in getattr(error, "__notes__", ()):
        interrupt.add_note(note)
    return interrupt


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class _Notice:
    """What the processes tell each other about the first that failed, beside the collectives, which it broke."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._enough = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def stop_reading(self) -> None:
        """From here on this process looks after its own end."""
        self._enough.set()
        self._reader.join()

    def _read(self) -> None:
        """End this process when another has failed and it does not come to its own end: it waits in a collective for
        one that will never come, and that no exception can reach.
        """
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            while not self._enough.wait(_GLANCE_SECONDS):
                if self._store.check(["first"]):
                    _, code = json.loads(self._store.get("first"))
                    if self._rank == 0 and code == _INTERRUPTED:
                        return  # it was interrupted too, and has to say how to go on: the others do not wait for it
                    if not self._enough.wait(_GRACE_SECONDS):
                        self._part(code)
                        os._exit(code)

    def post(self, error: BaseException) -> bool:
        """Whether this process is the first that failed; if so the others can read how."""
        code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            if self._store.add("failures", 1) == 1:
                self._store.set("first", json.dumps([self._rank, code]))
                return True
            return False
        return True

    def ending(self, error: BaseException, is_first: bool) -> BaseException:
        """What this process is to end with, once the others have come to their own end too, or had a moment for it."""
        with suppress(RuntimeError):
            first, code = json.loads(self._store.get("first"))
            self._part(code)
            if code == _INTERRUPTED:  # all were, and the leading one has to say how to go on
                return self._with_another(0, code) if self._rank else _interrupt(error)
            if not is_first:
                return self._with_another(first, code)
        if type(error) is RuntimeError and "gloo" in str(error):
            return ProcessFailed(
                f"another of the {self._count} processes of this run ended without a word: it was killed, by hand or "
                f"for want of memory, or its machine is gone. `fedtower resume` of the run's folder goes on from the "
                f"last checkpoint, on as many processes as you like"
            )
        return error

    def _with_another(self, first: int, code: int) -> ProcessFailed:
        failed = ProcessFailed(f"process {first} of {self._count} failed (exit code {code}), and this one with it")
        failed.exit_code, failed.is_told = code, True
        return failed

    def _part(self, code: int) -> None:
        """Wait for the others a moment: the first, which may keep the store, is the last to leave it."""
        if self._rank:
            if code != _INTERRUPTED:
                self._until(lambda: bool(self._store.check(["leader is leaving"])))
            self._store.add("gone", 1)
        else:
            self._store.set("leader is leaving", "")
            self._until(lambda: bool(self._store.add("gone", 0) == self._count - 1))

    @staticmethod
    def _until(is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + _FAREWELL_SECONDS
        while not is_so() and time.monotonic() < until:
            time.sleep(0.02)
