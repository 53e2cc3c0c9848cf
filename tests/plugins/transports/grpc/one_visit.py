"""One device's visit, in a process of its own: ``python -m tests.plugins.transports.grpc.one_visit ORDER.json``.

It prints the date that it believes in, and what came of the visit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedtower.core.errors import FedtowerError
from fedtower.plugins.transports.grpc.caller import BackOff, Caller, Leased
from fedtower.plugins.transports.grpc.tls import DeviceTls
from fedtower.protos.v1 import federation_pb2 as pb


def main(order: dict[str, Any]) -> str:
    """Take the task, fetch rows, and hand in the update that the order names, under the lease that was given."""
    tls = DeviceTls(Path(order["authority"]))
    metadata = (("authorization", f"Bearer {order['token']}"),)
    with grpc.secure_channel(f"localhost:{order['port']}", tls.credentials()) as channel:
        caller = Caller(channel, metadata, back_off=BackOff(0.05, 0.2, 1.5))
        leased = caller.check_in("a federation", pb.Capabilities(), b"", 9)
        assert isinstance(leased, Leased)
        rows = caller.rows(leased.lease, "item", np.array([1, 3]))
        assert rows.shape == (2, 4)
        assert caller.heartbeat(leased.lease, 0.5) > 0
        update = pb.Update.FromString(bytes.fromhex(order["update"]))
        update.lease = leased.lease
        path = Path(order["folder"]) / "update"
        path.write_bytes(update.SerializeToString(deterministic=True))
        return "again" if caller.submit(leased.lease, path) else "acknowledged"


if __name__ == "__main__":
    said: str
    try:
        said = main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    except FedtowerError as error:
        said = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"{time.time():.0f} {said}\n")
