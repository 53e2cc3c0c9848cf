"""Download: the seam that says how the shared parameters go down, and how a round publishes them.

The server keeps its parameters whole; what goes down changes what clients begin with, and nothing else: MCM,
Philippenko and Dieuleveut, 2021, https://arxiv.org/abs/2102.12528. Clients' deltas are from what they were sent.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import grouped
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Bytes
from fedtower.core.plan import Plan
from fedtower.core.publication import Publication

FloatArray = NDArray[np.float32]
Parameters = Mapping[str, FloatArray]
State = Mapping[str, NDArray[Any]]

MOST_MESSAGES = 64
"""Differences that a plan names at most: each is some 50 bytes of it, for every device."""

HELD = "download.held"
"""Under this name each client keeps the round whose publication it had last, where publications are differences."""

_LENGTH = struct.Struct("<I")


class Download(Protocol):
    """Makes a message of each shared parameter, and back.

    ``differences``: a message leads from what devices held after the publication before. The first publication of a run
    is then of the parameters as they are.
    """

    differences: ClassVar[bool]

    def encode(self, wanted: Parameters, held: Parameters, round: int, draws: Draws) -> Mapping[str, Bytes]:
        """A message (n,) uint8 for each of ``wanted``, as near to it as its bytes allow. ``held`` is what devices hold
        of the publication before, if messages are differences.
        """
        ...

    def decode(self, message: Bytes, shape: tuple[int, ...], held: FloatArray | None) -> FloatArray:
        """The parameter, of ``shape``, that devices hold then; the server decodes its own messages, too.

        Raises:
            UpdateError: bytes that :meth:`encode` does not make for that shape. Room is made for nothing before.
        """
        ...


def publish(
    download: Download, round: int, parameters: Parameters, state: State, draws: Draws
) -> tuple[Parameters, Publication]:
    """What devices hold of ``parameters`` after round ``round``'s publication, and the messages that lead there.
    ``state`` is what :func:`kept` kept of the publication before.
    """
    held = grouped(state, "published")
    if download.differences and not held:
        return parameters, Publication(round, (), differences=True)
    coded = download.encode(parameters, held, round, draws)
    after = {name: download.decode(coded[name], value.shape, held.get(name)) for name, value in parameters.items()}
    messages = _worth([*_messages(state), joined(coded)], sum(value.nbytes for value in parameters.values()))
    return after, Publication(round, tuple(map(len, messages)), download.differences, messages)


def kept(plan: Plan) -> State:
    """What the server keeps of a plan's publication for the next: what devices hold, and the messages that led there;
    nothing, where messages need nothing before them.
    """
    publication = plan.publication
    if publication is None or not publication.differences:
        return {}
    return {
        **{f"published/{name}": value for name, value in plan.parameters.items()},
        "messages": np.frombuffer(b"".join(publication.messages), dtype=np.uint8),
        "sizes": np.array(publication.sizes, dtype=np.int64),
    }


def joined(coded: Mapping[str, Bytes]) -> bytes:
    """The messages of one publication, in the order of their names, each after its length in 32 bits: what is sent."""
    return b"".join(_LENGTH.pack(len(data)) + data.tobytes() for _, data in sorted(coded.items()))


def parted(data: bytes, names: Sequence[str]) -> dict[str, Bytes]:
    """The message of each of ``names``, of what :func:`joined` made.

    Raises:
        UpdateError: there are not as many messages as names, or not as many bytes as they say.
    """
    found: dict[str, Bytes] = {}
    at = 0
    for name in sorted(names):
        start = at + _LENGTH.size
        at = start + (_LENGTH.unpack_from(data, at)[0] if start <= len(data) else 0)
        if start > len(data) or at > len(data):
            raise UpdateError(f"a publication of {len(data):,} bytes ends before its message of {name!r} does")
        found[name] = np.frombuffer(data, dtype=np.uint8)[start:at]
    if at != len(data):
        raise UpdateError(f"a publication of {len(names)} messages has {len(data) - at:,} bytes after the last of them")
    return found


def _messages(state: State) -> list[bytes]:
    if "sizes" not in state:
        return []
    ends = np.cumsum(state["sizes"])
    return [part.tobytes() for part in np.split(state["messages"], ends[:-1])] if len(ends) else []


def _worth(messages: Sequence[bytes], whole: int) -> tuple[bytes, ...]:
    """The newest messages, as many as are fewer bytes together than the parameters as they are."""
    lengths = np.cumsum([len(message) for message in reversed(messages)])
    count = min(int(np.count_nonzero(lengths < whole)), MOST_MESSAGES)
    return tuple(messages[len(messages) - count :])
