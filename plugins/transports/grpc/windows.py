"""Window: what an intake must know of a round that is open: its plan, who may take part, and for how long.

The journal says how far a window is; its file, written before it opens and never changed, says the rest. So a table
process that was killed goes on with the clients that it had chosen, and an intake needs nobody to ask.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import CheckpointError
from fedtower.core.journal import Instant, Task
from fedtower.core.rows import IntArray
from fedtower.protos.v1 import federation_pb2 as pb


@dataclass(frozen=True, eq=False)
class Window:
    """One round of one task.

    ``clients`` (C,) may take part, sorted; ``target`` uploads are enough. ``opened`` is when it was opened: from there
    the deadline counts, whoever is killed meanwhile. ``concurrency`` is how many clients may work at once in all
    windows of training that are open, where rounds are asynchronous: then leases are given out in the newest only.
    """

    round: int
    task: Task
    plan: pb.SignedArtefact
    clients: IntArray
    target: int
    lease_seconds: float
    heartbeat_seconds: float
    deadline_seconds: float
    opened: Instant
    concurrency: int | None = None

    def write(self, folder: Path) -> None:
        """Write the window's file, whole or not at all."""
        values = {
            "plan": self.plan.SerializeToString().hex(),
            "clients": self.clients.tolist(),
            "target": self.target,
            "lease_seconds": self.lease_seconds,
            "heartbeat_seconds": self.heartbeat_seconds,
            "deadline_seconds": self.deadline_seconds,
            "opened": {"boot": self.opened.boot, "seconds": self.opened.seconds},
            "concurrency": self.concurrency,
        }
        path = path_of(folder, self.round, self.task)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(values), encoding="utf-8")
            unfinished.replace(path)

    @property
    def digest(self) -> bytes:
        """The digest of the plan."""
        return self.plan.artefact.digest

    def includes(self, client: int) -> bool:
        """Whether a client may take part."""
        place = int(np.searchsorted(self.clients, client))
        return place < len(self.clients) and int(self.clients[place]) == client


def path_of(folder: Path, round: int, task: Task) -> Path:
    """Where a window's file is."""
    return folder / f"{round:06d}-{task}.json"


def read_window(folder: Path, round: int, task: Task) -> Window | None:
    """The window of a round, or nothing if it has not been written.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = path_of(folder, round, task)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return Window(
            round=round,
            task=task,
            plan=pb.SignedArtefact.FromString(bytes.fromhex(values["plan"])),
            clients=np.array(values["clients"], dtype=np.int64),
            target=int(values["target"]),
            lease_seconds=float(values["lease_seconds"]),
            heartbeat_seconds=float(values["heartbeat_seconds"]),
            deadline_seconds=float(values["deadline_seconds"]),
            opened=Instant(str(values["opened"]["boot"]), float(values["opened"]["seconds"])),
            concurrency=None if values.get("concurrency") is None else int(values["concurrency"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, TypeError, DecodeError) as error:
        raise CheckpointError(f"the window {path} cannot be read: {type(error).__name__}: {error}") from error


def forget_windows(folder: Path, through: int) -> None:
    """Remove the files of all rounds up to ``through``; what the last one of them has told, the next has to know."""
    for path in [*folder.glob("*.json"), *folder.glob("*.arrived"), *folder.glob("*.told")]:
        round = int(path.name.partition("-")[0])
        if round < through or (round == through and path.suffix != ".told"):
            path.unlink(missing_ok=True)
