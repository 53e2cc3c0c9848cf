"""Processes: which of the processes of a torchrun this one is, and what they do in step.

All run the same program on the same recipe. The leading one, of rank 0, has the run folder, the log and the terminal;
the others do their part of what it orders, and end as it ends.
"""

from __future__ import annotations

import json
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
_FAREWELL_SECONDS = 3.0


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
        distributed.barrier()  # one that leaves early makes others abort
    except BaseException as error:
        is_first = notice.post(error)
        _leave()  # the others wait for this one: now they hear that it is gone
        raise notice.ending(error, is_first) from error.__cause__
    _leave()


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class _Notice:
    """What the processes tell each other about the first that failed, beside the collectives, which it broke."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count

    def post(self, error: BaseException) -> bool:
        """Whether this process is the first that failed; if so the others can read how."""
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            if self._store.add("failures", 1) == 1:
                self._store.set("first", json.dumps([self._rank, code]))
                return True
            return False
        return True

    def ending(self, error: BaseException, is_first: bool) -> BaseException:
        """What this process is to end with, once the others have had a moment to come to their own end."""
        with suppress(RuntimeError):
            self._wait_for_others()
            if not is_first and not (isinstance(error, KeyboardInterrupt) and self._rank == 0):
                first, code = json.loads(self._store.get("first"))
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

    def _wait_for_others(self) -> None:
        """Else torchrun would end those that are left, before they have their exit code."""
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._store.add("failures", 0) < self._count and time.monotonic() < until:
            time.sleep(0.02)
