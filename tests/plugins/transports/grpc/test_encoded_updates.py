"""What each transform makes of an update goes over the wire, in as many bytes as a simulation counts for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.registry import discover
from fedtower.core.settings import Part
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, decode_submission, encode_submission

REGISTRY = discover()
TRANSFORMS = [offer for offer in REGISTRY.offers("transform") if offer.distribution == "fedtower"]
HEADERS = 80
"""Bytes of names, codecs, shapes and tags a parameter or table, which a simulation does not count."""


def made(name: str) -> Any:
    offer = next(offer for offer in TRANSFORMS if offer.name == name)
    return REGISTRY.make("transform", Part(name, dict(offer.capabilities.get("example", {}))))


@pytest.mark.parametrize("name", [offer.name for offer in TRANSFORMS])
def test_an_update_is_decoded_as_it_was_in_the_simulation(name: str) -> None:
    transform, updates = made(name), examples.updates(1)
    states = {kept: np.zeros((1, *shape), dtype=np.float32) for kept, shape in transform.state(examples.plan()).items()}
    sent, _ = transform.on_client(updates, states, Draws(1))
    data = encode_submission(Submission(Belongs("f", b"m", 1, b"lease"), sent, num_examples=3))
    assert updates.clients is not None
    back = decode_submission(data, int(updates.clients[0]), most_bytes=1 << 20).updates
    assert_same_bits(back, sent)
    assert_same_bits(transform.decode(back), transform.decode(sent))
    parts = len(sent.dense) + len(sent.encoded) + len(sent.rows)
    assert abs(len(data) - sent.nbytes) < HEADERS * (parts + 2)
