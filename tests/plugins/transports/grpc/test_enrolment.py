"""A code becomes a token once, whatever is lost on the way."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest

from fedtower.core.errors import TrustError
from fedtower.plugins.transports.grpc.codec import PROTOCOL
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.enrolment import EnrolService, begin_enrolment, finish_enrolment
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.protos.v1 import federation_pb2 as pb


@pytest.fixture
def service(tmp_path: Path) -> EnrolService:
    return EnrolService("shops", Credentials(tmp_path / "credentials.sqlite"))


def ask(service: EnrolService, request: Any) -> pb.EnrolReply:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return pb.EnrolReply.FromString(asyncio.run(service.enrol(data, None)))


def test_a_device_enrols_once_and_knows_itself_from_then_on(service: EnrolService, tmp_path: Path) -> None:
    (code,) = service.credentials.make_codes(1, first_client=7)
    enrolled = finish_enrolment(tmp_path / "me", ask(service, begin_enrolment(tmp_path / "me", code, "a phone")))
    assert (enrolled.federation, enrolled.client) == ("shops", 7)
    assert service.credentials.by_token(enrolled.token).name == "a phone"
    assert enrolled.metadata == (("authorization", f"Bearer {enrolled.token}"),)
    assert begin_enrolment(tmp_path / "me", "another code", "") == enrolled
    assert stat.S_IMODE((tmp_path / "me").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("me")} == {"me"}


def test_a_device_that_was_killed_before_it_heard_asks_again_and_is_the_same(
    service: EnrolService, tmp_path: Path
) -> None:
    (code,) = service.credentials.make_codes(1)
    ask(service, begin_enrolment(tmp_path / "me", code, ""))  # the reply is lost
    (tmp_path / "me.new").write_bytes(b'{"federation": "sho')  # and so is what was half written
    (tmp_path / "other.attempt").write_bytes(b"half")
    assert len(begin_enrolment(tmp_path / "other", code, "").attempt) == 16  # type: ignore[union-attr]
    enrolled = finish_enrolment(tmp_path / "me", ask(service, begin_enrolment(tmp_path / "me", code, "")))
    assert service.credentials.by_token(enrolled.token).client == 0
    assert len(service.credentials.devices()) == 1


def test_a_hundred_that_enrol_at_once_are_a_hundred_clients(service: EnrolService, tmp_path: Path) -> None:
    (code,) = service.credentials.make_codes(1, uses=100)
    requests = [begin_enrolment(tmp_path / f"device-{turn}", code, "") for turn in range(100)]

    async def at_once() -> list[bytes]:
        return await asyncio.gather(*(service.enrol(each.SerializeToString(), None) for each in requests))  # type: ignore[union-attr]

    replies = [pb.EnrolReply.FromString(data) for data in asyncio.run(at_once())]
    assert sorted(reply.enrolment.client for reply in replies) == list(range(100))
    assert len({reply.enrolment.token for reply in replies}) == 100


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.EnrolRequest(protocol=PROTOCOL, code="no.code", attempt=b"a" * 16), Reason.ENROLMENT_CODE),
        (pb.EnrolRequest(protocol=PROTOCOL, code="no.code"), Reason.CORRUPT),
        (pb.EnrolRequest(protocol=9, code="no.code", attempt=b"a" * 16), Reason.OTHER_PROTOCOL),
        (pb.EnrolRequest(protocol=PROTOCOL, code="x" * 5_000), Reason.TOO_LARGE),
        (b"\xff\xff", Reason.CORRUPT),
        (b"", Reason.OTHER_PROTOCOL),
    ],
)
def test_what_is_wrong_is_a_refusal_in_the_reply(
    request_: Any, reason: Reason, service: EnrolService, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as caught:
        finish_enrolment(tmp_path / "me", ask(service, request_))
    assert caught.value.reason is reason
    assert not (tmp_path / "me").exists()


def test_a_file_that_is_damaged_or_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "me"
    path.write_text("{}")
    with pytest.raises(TrustError, match="chmod 600"):
        begin_enrolment(path, "", "")
    path.chmod(0o600)
    with pytest.raises(TrustError, match="remove it, and enrol with another code"):
        begin_enrolment(path, "", "")
