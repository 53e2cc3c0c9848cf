"""An intake that is made to be killed: it asks for leases, sends uploads, and says what it was promised, as it happens.

The first line of stdin is ``{"target": "module:Class", "settings": {...}, "folder": ..., "federation": ...,
"round": ..., "again": [[client, lease], ...], "clients": [first, last]}``. It says ``ready``, then ``lease CLIENT
LEASE`` for a lease that is durable, and ``CLIENT LEASE OUTCOME`` for an upload that has been answered. Those of
``again`` are sent first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path

from fedtower.core.journal import Journal, Lease, Outcome, Upload

WAVE, AT_ONCE = 24, 500


def payload_of(client: int) -> bytes:
    """What this client sends: 100 bytes to 8 kB of its own."""
    return hashlib.shake_128(b"%d" % client).digest(100 + 7_919 * client % 8_000)


def say(*words: object) -> None:
    """A line, out of this process before the call returns: a kill cannot take it back."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main() -> None:
    """Do as the first line says."""
    order = json.loads(sys.stdin.readline())
    module, _, name = order["target"].partition(":")
    journal = getattr(import_module(module), name)(**order["settings"]).open(Path(order["folder"]), order["federation"])
    say("ready")
    send(journal, [(client, bytes.fromhex(lease)) for client, lease in order["again"]])
    first, last = order["clients"]
    for start in range(first, last, WAVE):
        asked: list[tuple[int, Future[Lease | None]]] = [
            (client, journal.lease(order["round"], "train", client, 600.0))
            for client in range(start, min(start + WAVE, last))
        ]
        given = [(client, lease.id) for client, future in asked if (lease := future.result()) is not None]
        for client, id in given:
            say("lease", client, id.hex())
        send(journal, given)
    journal.close()


def send(journal: Journal, leases: list[tuple[int, bytes]]) -> None:
    """Send these, every third one twice, and say how each was answered; as many are on their way as an intake lets."""
    for start in range(0, len(leases), AT_ONCE):
        futures: list[tuple[int, bytes, Future[Outcome]]] = []
        for client, lease in leases[start : start + AT_ONCE]:
            for _ in range(2 if client % 3 == 0 else 1):
                futures.append((client, lease, journal.accept(Upload.of(lease, payload_of(client)))))
        for client, lease, future in futures:
            say(client, lease.hex(), future.result())


if __name__ == "__main__":
    main()
