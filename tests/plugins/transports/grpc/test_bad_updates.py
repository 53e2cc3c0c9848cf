"""Twelve kinds of bad update, many of each, at a real intake: refused with a reason, and no bit of the sum moves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.transports.grpc.codec import encode_submission
from fedtower.plugins.transports.grpc.refusals import Reason
from fedtower.protos.v1 import federation_pb2 as pb
from tests.plugins.transports.grpc.standing import Answer, Peer, Standing, standing

HONEST, LATE, HOSTILE = 6, 6, 7  # clients 0 to 5 are honest; 6 comes a round late; 7 takes part and sends nothing good
KINDS = 12
UNHEARD = "refused at the moment in which more was sent, which gRPC's client takes for an error of its own"
Draw = np.random.Generator


@dataclass(frozen=True)
class Attack:
    """One client's line, its lease, what it would send if it were honest, and how to send something bad."""

    peer: Peer
    lease: pb.Lease
    at: Standing

    def spoilt(self, **changes: Any) -> bytes:
        return encode_submission(self.at.submission(self.lease, **changes))

    async def send(self, payload: bytes, **how: Any) -> Answer:
        return await self.peer.submit(self.lease.lease, payload, **how)


def updates(**changes: Any) -> Callable[[Updates], Updates]:
    return lambda made: replace(made, **changes)


async def conflicting(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(attack.spoilt(num_examples=lambda _: int(draw.integers(6, 10))))


async def duplicate(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(attack.spoilt())


async def early(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(
        attack.spoilt(belongs=lambda b: replace(b, round=b.round + int(draw.integers(1, 1 << 40))))
    )


async def other_round(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(attack.spoilt(belongs=lambda b: replace(b, round=int(draw.integers(b.round)))))


async def other_model(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(attack.spoilt(belongs=lambda b: replace(b, model=draw.bytes(32))))


async def corrupt(attack: Attack, draw: Draw) -> Answer:
    """One bit is not what its digest says; or the digest is right, and the bytes are no update."""
    if draw.random() < 0.5:
        return await attack.send(b"\xff" * 11 + draw.bytes(int(draw.integers(1, 5_000))))
    payload = attack.spoilt()
    turned = bytearray(payload)
    turned[draw.integers(len(payload))] ^= 1 << int(draw.integers(8))
    return await attack.send(payload, send=bytes(turned))


async def truncated(attack: Attack, draw: Draw) -> Answer:
    payload = attack.spoilt()
    return await attack.send(payload, send=payload[: draw.integers(len(payload))])


async def huge(attack: Attack, draw: Draw) -> Answer:
    """More is announced than may be sent, or more is sent than was announced."""
    if draw.random() < 0.5:
        return await attack.send(b"", size=int(draw.integers((64 << 20) + 1, 1 << 62)))
    payload = attack.spoilt()
    return await attack.send(payload, send=payload + draw.bytes(int(draw.integers(1, 100_000))))


async def not_finite(attack: Attack, draw: Draw) -> Answer:
    honest = attack.at.submission(attack.lease).updates
    value = np.float32([np.nan, np.inf, -np.inf][draw.integers(3)])
    dense = {name: each.copy() for name, each in honest.dense.items()}
    rows = Rows(np.array([0, 2]), np.array([1, 3]), honest.rows["item"].row_deltas.copy())
    spoilt = [*dense.values(), rows.row_deltas][draw.integers(3)]
    spoilt.flat[draw.integers(spoilt.size)] = value
    return await attack.send(attack.spoilt(updates=updates(dense=dense, rows={"item": rows})))


async def wrong_form(attack: Attack, draw: Draw) -> Answer:
    """Another shape, another dtype, or another name."""
    dense = dict(attack.at.submission(attack.lease).updates.dense)
    name, which = ["w", "b"][draw.integers(2)], draw.integers(3)
    if which == 0:
        dense[name] = dense[name][:, : draw.integers(dense[name].shape[1])]
    elif which == 1:
        dense[name] = dense[name].astype(["f8", "f2", "i4", "?"][draw.integers(4)])
    else:
        dense[f"{name}{draw.integers(1_000)}"] = dense.pop(name)
    return await attack.send(attack.spoilt(updates=updates(dense=dense)))


async def unknown_device(attack: Attack, draw: Draw) -> Answer:
    """Without a token, or with one of another secret, or of nobody."""
    known = attack.peer.metadata[0][1].removeprefix("Bearer ")
    token = [None, f"{known.partition('.')[0]}.{draw.bytes(32).hex()}", draw.bytes(24).hex()][draw.integers(3)]
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    return await replace(attack, peer=replace(attack.peer, metadata=metadata)).send(attack.spoilt())


async def late(attack: Attack, draw: Draw) -> Answer:
    return await attack.send(attack.spoilt(num_examples=lambda _: int(draw.integers(1, 10))))


FORMS = (Reason.WRONG_SHAPE, Reason.WRONG_DTYPE, Reason.WRONG_NAMES)
Attacker = Callable[[Attack, Draw], Awaitable[Answer]]
BY_HOSTILE: dict[Attacker, tuple[Reason, ...]] = {
    early: (Reason.EARLY,),
    other_round: (Reason.OTHER_ROUND,),
    other_model: (Reason.OTHER_MODEL,),
    corrupt: (Reason.CORRUPT,),
    truncated: (Reason.TRUNCATED,),
    huge: (Reason.TOO_LARGE,),
    not_finite: (Reason.NOT_FINITE,),
    wrong_form: FORMS,
    unknown_device: (Reason.UNKNOWN_DEVICE,),
}


async def repeated(attack: Attack, kind: Attacker, count: int) -> Counter[str]:
    """How the answers were, of so many of one kind."""
    draw, said = np.random.default_rng(count), Counter[str]()
    for _ in range(count):
        answer = await kind(attack, draw)
        if answer.reason is not None:
            assert len(str(answer.refusal)) > 20  # the device is told in a sentence
            said[answer.reason.name] += 1
        elif answer.status is grpc.StatusCode.CANCELLED:
            said[UNHEARD] += 1
        else:
            assert answer.reply.acknowledged.duplicate, (kind.__name__, answer)
            said["duplicate"] += 1
    return said


async def attacked(at: Standing, count: int, slow: pb.Lease) -> dict[str, Counter[str]]:
    """A round in which honest devices take part, and so many bad updates of each kind come in between."""
    said: dict[str, Counter[str]] = {}

    async def hostile() -> None:
        async with at.peer(HOSTILE) as peer:
            lease = await peer.lease(2)
            await peer.rows(lease)
            for kind in BY_HOSTILE:
                said[kind.__name__] = await repeated(Attack(peer, lease, at), kind, count)

    async def fickle() -> None:
        """An honest device's update, and what comes after it under the same lease."""
        async with at.peer(0) as peer:
            lease = await peer.lease(2)
            await peer.rows(lease)
            attack = Attack(peer, lease, at)
            assert (await attack.send(attack.spoilt())).reply.acknowledged == pb.Acknowledged()
            said["duplicate"] = await repeated(attack, duplicate, count)
            said["conflicting"] = await repeated(attack, conflicting, count)

    async def slowly() -> None:
        async with at.peer(LATE) as peer:
            said["late"] = await repeated(Attack(peer, slow, at), late, count)

    await asyncio.gather(hostile(), fickle(), slowly())
    for client in range(1, HONEST):
        assert (await at.visit(client, 2)).reply.acknowledged == pb.Acknowledged()
    return said


async def alone(at: Standing, round: int) -> None:
    """A round of the honest devices."""
    for client in range(HONEST):
        assert (await at.visit(client, round)).reply.acknowledged == pb.Acknowledged()


async def first(at: Standing) -> pb.Lease:
    """A round of the honest devices, in which another one got a lease and did nothing more."""
    async with at.peer(LATE) as peer:
        lease = await peer.lease(1)
        await peer.rows(lease)
        at.submission(lease)  # it has its plan
    await alone(at, 1)
    return lease


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.soak)])
def test_bad_updates_of_every_kind_are_refused_and_change_no_bit_of_the_aggregate(count: int, tmp_path: Path) -> None:
    with standing(tmp_path, 8) as at:
        with at.round(1, range(LATE + 1), HONEST) as before:
            slow = asyncio.run(first(at))
        with at.round(2, [*range(HONEST), HOSTILE], HONEST) as amid:
            said = asyncio.run(attacked(at, count, slow))
        with at.round(3, range(HONEST), HONEST) as honest:
            asyncio.run(alone(at, 3))
        log, counted, uploads = at.log(), at.refusals(), at.counted("fedtower_uploads_total")

    expected = {kind.__name__: reasons for kind, reasons in BY_HOSTILE.items()}
    expected |= {"conflicting": (Reason.CONFLICTING,), "late": (Reason.LATE,)}
    assert len(said) == KINDS == len(expected) + 1
    for name, reasons in expected.items():
        assert set(said[name]) - {UNHEARD} == {reason.name for reason in reasons}, name
        assert said[name].total() == count
    assert said["duplicate"] == {"duplicate": count}
    # Each refusal was counted, and logged with its reason and who it was; of all that were heard it was the same one.
    refused = Counter[str]()
    for each in said.values():
        refused.update({name: number for name, number in each.items() if name != "duplicate"})
    unheard = refused.pop(UNHEARD, 0)
    logged = Counter(line["reason"].upper() for line in log if line["event"] == "refused")
    assert counted == {name.lower(): number for name, number in logged.items()}
    assert refused <= logged
    assert logged.total() == refused.total() + unheard
    assert unheard < count / 20
    assert uploads['duplicate="false",task="train"'] == 3 * HONEST
    assert uploads['duplicate="true",task="train"'] == count
    assert [(len(each.came), each.reasons) for each in (before, amid, honest)] == [(HONEST, [])] * 3
    want = honest.total()
    for got in (before.total(), amid.total()):
        assert_same_bits(dict(got.dense), dict(want.dense))
        assert_same_bits((got.weights, got.rows["item"]), (want.weights, want.rows["item"]))
    assert np.abs(want.dense["w"]).max() > 0
    # Nothing of what was refused stays.
    assert not [path for path in (tmp_path / "staging").rglob("*") if path.is_file()]
