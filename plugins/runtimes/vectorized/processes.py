"""A crew's workers as processes of this machine.

They are forked when the first block comes, so they hold the run's data without a copy of it. Arrays go to and fro
through memory that both sides share.
"""

from __future__ import annotations

import mmap
import multiprocessing
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import torch

from fedtower.core.client import ClientData
from fedtower.core.runtime import Runtime
from fedtower.plugins.runtimes.vectorized.crew import Bench, Message, WorkerDied, unsendable

# Addresses, not memory: pages that no block ever needs are never allocated. What does not fit goes through the pipe.
_SHARED_BYTES = 1 << 30


def hired_by(runtime: Runtime) -> Callable[[ClientData | None, int], Process]:
    """Starts processes that train with this runtime."""
    return lambda data, number: Process.start(runtime, data, number)


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
class Process:
    """A process that trains, as its parent sees it."""

    process: ForkProcess
    post: Post
    number: int

    @staticmethod
    def start(runtime: Runtime, data: ClientData | None, number: int) -> Process:
        """Fork it. As torch's own data loaders do: a forked process may use torch as long as it uses one thread."""
        here, there = Post.pair()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(runtime, data, here, there), daemon=True, name=f"fedtower-worker-{number}"
        )
        process.start()
        there.pipe.close()
        return Process(process, here, number)

    def send(self, message: Message) -> None:
        """Let it work."""
        with suppress(OSError):  # it is gone, which receive() says
            self.post.send(message)

    def receive(self) -> Any:
        """Its answer, or the exception it ran into."""
        try:
            return self.post.receive()
        except (EOFError, OSError) as error:
            self.process.join(timeout=1)
            raise WorkerDied(
                f"worker {self.number} of the vectorized runtime ended with exit code {self.process.exitcode} in the "
                f"middle of its work (-9 is often the system's want of memory: lower transport.block or "
                f"runtime.workers); `fedtower resume` goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """End it."""
        self.post.pipe.close()
        # It would see that, but workers that were forked after it hold this end of its line, too. Killed, and not
        # asked to end: it has nothing to put away, and may have inherited a handler that makes noise.
        self.process.kill()
        self.process.join()


def _serve(runtime: Runtime, data: ClientData | None, parents: Post, post: Post) -> None:
    """Answer until the parent hangs up."""
    parents.pipe.close()  # or this process would never see that its parent is gone
    torch.set_num_threads(1)
    bench = Bench(runtime, data, f"worker process {multiprocessing.current_process().name}")
    while True:
        try:
            answer = bench.answer(*post.receive())
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            post.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError):  # an exception that does not travel
            post.send(unsendable(answer))
