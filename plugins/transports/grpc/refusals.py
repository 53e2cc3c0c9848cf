"""Refused: why something that came over the wire does not count, typed, in a sentence, and as a message."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from google.protobuf.message import DecodeError

from fedtower.core import checking
from fedtower.core.errors import UpdateError
from fedtower.protos.v1 import federation_pb2 as pb

REFUSAL_KEY = "fedtower-refusal-bin"
"""The trailing metadata in which a refusal travels that has no reply to stand in."""

# Metadata are headers, of which gRPC takes 8 KiB; what a device sent may stand in the sentence.
_MOST_SENTENCE = 1_000


class Reason(IntEnum):
    """The reasons of ``federation.proto``, where each is explained, without their prefix."""

    UNSPECIFIED = pb.REFUSAL_REASON_UNSPECIFIED
    UNKNOWN_DEVICE = pb.REFUSAL_REASON_UNKNOWN_DEVICE
    REVOKED = pb.REFUSAL_REASON_REVOKED
    RATE = pb.REFUSAL_REASON_RATE
    ENROLMENT_CODE = pb.REFUSAL_REASON_ENROLMENT_CODE
    OTHER_PROTOCOL = pb.REFUSAL_REASON_OTHER_PROTOCOL
    OTHER_FEDERATION = pb.REFUSAL_REASON_OTHER_FEDERATION
    OTHER_MODEL = pb.REFUSAL_REASON_OTHER_MODEL
    OTHER_ROUND = pb.REFUSAL_REASON_OTHER_ROUND
    UNKNOWN_LEASE = pb.REFUSAL_REASON_UNKNOWN_LEASE
    UNKNOWN_ARTEFACT = pb.REFUSAL_REASON_UNKNOWN_ARTEFACT
    EARLY = pb.REFUSAL_REASON_EARLY
    LATE = pb.REFUSAL_REASON_LATE
    ROUND_CLOSED = pb.REFUSAL_REASON_ROUND_CLOSED
    CONFLICTING = pb.REFUSAL_REASON_CONFLICTING
    CORRUPT = pb.REFUSAL_REASON_CORRUPT
    TRUNCATED = pb.REFUSAL_REASON_TRUNCATED
    TOO_LARGE = pb.REFUSAL_REASON_TOO_LARGE
    WRONG_NAMES = pb.REFUSAL_REASON_WRONG_NAMES
    WRONG_SHAPE = pb.REFUSAL_REASON_WRONG_SHAPE
    WRONG_DTYPE = pb.REFUSAL_REASON_WRONG_DTYPE
    WRONG_CODEC = pb.REFUSAL_REASON_WRONG_CODEC
    NOT_FINITE = pb.REFUSAL_REASON_NOT_FINITE
    ROW_NOT_LEASED = pb.REFUSAL_REASON_ROW_NOT_LEASED
    NORM = pb.REFUSAL_REASON_NORM
    WEIGHT = pb.REFUSAL_REASON_WEIGHT
    NUM_EXAMPLES = pb.REFUSAL_REASON_NUM_EXAMPLES
    PLUGIN = pb.REFUSAL_REASON_PLUGIN


class Refused(UpdateError):
    """A message, an update or a caller is refused; ``reason`` is what a program reads.

    ``retry_after_seconds`` is 0 where trying again will not help.
    """

    def __init__(self, reason: Reason, message: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds

    def to_message(self) -> pb.Refusal:
        """This refusal as it is sent."""
        return pb.Refusal(
            reason=pb.RefusalReason.ValueType(self.reason),
            message=_short(str(self)),
            retry_after_seconds=self.retry_after_seconds,
        )

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]] | None) -> Refused | None:
        """The refusal in the trailing metadata of a call that failed, if there is one.

        >>> sent = Refused(Reason.REVOKED, "taken out").to_message().SerializeToString()
        >>> Refused.from_metadata([("other", "x"), (REFUSAL_KEY, sent)])
        Refused('taken out')
        """
        for key, value in metadata or ():
            if key == REFUSAL_KEY and isinstance(value, bytes):
                try:
                    return cls.from_message(pb.Refusal.FromString(value))
                except DecodeError:
                    return None  # the status says enough
        return None

    @classmethod
    def from_message(cls, message: pb.Refusal) -> Refused:
        """A refusal as it came; a reason that this version does not know is ``UNSPECIFIED``."""
        known = int(message.reason) in list(Reason)
        reason = Reason(message.reason) if known else Reason.UNSPECIFIED
        return cls(reason, message.message, retry_after_seconds=message.retry_after_seconds)


def refusal_of_check(reason: checking.Reason, client: int) -> Refused:
    """What a device is told whose update the checks of core refuse."""
    named = _OTHERWISE.get(reason) or Reason[reason.name]
    return Refused(named, f"client {client}: {checking.WORDS[reason]}")


# Where the wire says it in other words, as a device sees it, or in one word for two.
_OTHERWISE = {
    checking.Reason.NOT_ASKED: Reason.UNKNOWN_LEASE,
    checking.Reason.REPEATED: Reason.CONFLICTING,
    checking.Reason.STALE: Reason.LATE,
    checking.Reason.SURPLUS: Reason.LATE,
    checking.Reason.UNDECODABLE: Reason.WRONG_CODEC,
    checking.Reason.ROW_REPEATED: Reason.ROW_NOT_LEASED,
}


def _short(sentence: str) -> str:
    return sentence if len(sentence) <= _MOST_SENTENCE else f"{sentence[:_MOST_SENTENCE]}..."
