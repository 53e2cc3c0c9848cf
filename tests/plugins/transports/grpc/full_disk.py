"""A federation on a small file system of its own: filled while devices call, emptied, and gone on with.

``python -m tests.plugins.transports.grpc.full_disk FOLDER`` prints how many clients were told to come back while the
disk was full, how many were acknowledged until then, and how many count in the end.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.journals.full_disk import fill
from tests.plugins.transports.grpc.standing import Answer, Peer, Standing, each, parts, standing
from tests.recsys.forks import own_disk

SIZE, CLIENTS = 8_000_000, 15


async def story(at: Standing) -> tuple[int, int, int]:
    """Devices call a server whose disk is full, and come back when it is not."""
    filler = at.folder / "filler"
    async with at.round_beside(1, range(CLIENTS), CLIENTS) as found:
        for client in range(5):
            assert (await at.visit(client, 1)).outcome == "acknowledged"
        leases = {client: await _leased(at, client) for client in range(5, 10)}
        try:
            fill(filler)
            told, kept = await _while_full(at, leases)
        finally:
            filler.unlink()
        for client in kept:
            async with at.peer(client) as peer:
                answer = await peer.submit(leases[client].lease, encode_submission(at.submission(leases[client])))
            assert answer.reply.acknowledged.duplicate, answer  # the promise was kept
        for client in {*range(5, CLIENTS)} - kept:
            assert (await at.visit(client, 1)).reply.acknowledged == pb.Acknowledged()
    async with at.round_beside(2, range(CLIENTS), CLIENTS) as again:
        for client in range(CLIENTS):
            assert (await at.visit(client, 2)).reply.acknowledged == pb.Acknowledged()
    assert_same_bits(dict(found.total().dense), dict(again.total().dense))
    clients = [int(each.clients[0]) for each in found.came if each.clients is not None]
    assert np.unique(clients).tolist() == sorted(clients)
    return told["come_back"] + told["UNAVAILABLE"], 5 + len(kept), len(clients)


async def _while_full(at: Standing, leases: Mapping[int, pb.Lease]) -> tuple[Counter[str], set[int]]:
    """How the calls are answered meanwhile, and the clients whose updates were acknowledged all the same."""
    told, kept = Counter[str](), set[int]()
    for client, lease in leases.items():
        async with at.peer(client) as peer:
            for answer in await _everything(at, peer, lease):
                told[answer.outcome] += 1
                assert answer.outcome in ("acknowledged", "come_back", "alive", "held", "part", "UNAVAILABLE"), answer
            if answer.outcome == "acknowledged":
                kept.add(client)
    for client in range(10, CLIENTS):
        async with at.peer(client) as peer:
            answer = await peer.check_in()
            assert answer.outcome in ("lease", "come_back"), answer
            told[answer.outcome] += 1
            await asyncio.sleep(0.3)  # so that all that is written now and then is tried
    return told, kept


async def _leased(at: Standing, client: int) -> pb.Lease:
    async with at.peer(client) as peer:
        return await peer.lease(1)


async def _everything(at: Standing, peer: Peer, lease: pb.Lease) -> list[Answer]:
    """What a device calls in one visit, and an upload that breaks off; the update comes last."""
    payload = encode_submission(at.submission(lease))
    broken = await peer.call("Submit", each(parts(lease.lease, payload)[:1]))
    assert broken.outcome in ("refusal", "come_back")
    heartbeat = pb.HeartbeatRequest(lease=lease.lease).SerializeToString()
    resume = pb.ResumeRequest(lease=lease.lease, digest=bytes(32)).SerializeToString()
    return [
        await peer.call("Heartbeat", heartbeat),
        await peer.call("Resume", resume),
        await peer.rows(lease),
        await peer.submit(lease.lease, payload),
    ]


def main(folder: Path) -> None:
    """Fill it, and go on."""
    own_disk(str(folder), "tmpfs", SIZE)
    with standing(folder, CLIENTS) as at:
        figures = asyncio.run(story(at))
    sys.stdout.write(" ".join(map(str, figures)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
