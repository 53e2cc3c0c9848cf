"""Who is enrolled, stays enrolled; who is not, or no more, is refused; and nothing in the file is a secret."""

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedtower.core.errors import StorageError, TrustError
from fedtower.plugins.transports.grpc.credentials import Credentials, Device
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

ATTEMPT = b"a" * 16


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    return Credentials(tmp_path / "credentials.sqlite")


def enrolled(credentials: Credentials, name: str = "shop") -> tuple[Device, str]:
    (code,) = credentials.make_codes(1)
    return credentials.enrol(code, name, ATTEMPT)


def refused(what: object, *arguments: object) -> Reason:
    with pytest.raises(Refused) as caught:
        what(*arguments)  # type: ignore[operator]
    return caught.value.reason


def test_a_code_is_exchanged_for_a_token_that_names_the_device(credentials: Credentials) -> None:
    device, token = enrolled(credentials, "a phone")
    assert credentials.by_token(token) == device
    assert (device.client, device.name, device.state) == (0, "a phone", "active")


def test_clients_are_numbered_one_after_the_other(credentials: Credentials) -> None:
    assert [enrolled(credentials)[0].client for _ in range(4)] == [0, 1, 2, 3]


def test_a_code_may_say_which_client_a_device_becomes(credentials: Credentials) -> None:
    codes = credentials.make_codes(3, first_client=5)
    devices = [credentials.enrol(code, "", ATTEMPT)[0] for code in reversed(codes)]
    assert [device.client for device in devices] == [7, 6, 5]
    assert enrolled(credentials)[0].client == 8
    with pytest.raises(TrustError, match="client 6 is taken"):
        credentials.make_codes(1, first_client=6)


def test_a_client_that_a_code_was_made_for_is_kept_for_it(credentials: Credentials) -> None:
    (code,) = credentials.make_codes(1, first_client=0)
    assert enrolled(credentials)[0].client == 1
    with pytest.raises(TrustError, match="client 0 is taken"):
        credentials.register("shop-1", client=0)
    assert credentials.enrol(code, "", ATTEMPT)[0].client == 0


@pytest.mark.parametrize(("count", "uses", "first"), [(0, 1, None), (1, 0, None), (1, 2, 0), (1, 1, -1)])
def test_codes_that_make_no_sense_are_not_made(
    credentials: Credentials, count: int, uses: int, first: int | None
) -> None:
    with pytest.raises(TrustError, match="cannot be made"):
        credentials.make_codes(count, uses=uses, first_client=first)


def test_a_code_is_good_as_often_as_it_says(credentials: Credentials) -> None:
    (code,) = credentials.make_codes(1, uses=3)
    for turn in range(3):
        assert credentials.codes_left() == 3 - turn
        credentials.enrol(code, "", bytes([turn]) * 16)
    assert refused(credentials.enrol, code, "", b"d" * 16) is Reason.ENROLMENT_CODE
    assert len(credentials.devices()) == 3


def test_a_code_that_is_wrong_withdrawn_or_none_is_refused(credentials: Credentials) -> None:
    code, other = credentials.make_codes(2)
    credentials.withdraw(other)
    mixed = f"{code.partition('.')[0]}.{other.partition('.')[2]}"
    for bad in (
        other,
        mixed,
        code[:-1],
        f"{code}x",
        code.partition(".")[0],
        "",
        ".",
        "\udcff",
        "é.é",
        "\0.\0",
        "x" * 10_000,
    ):
        assert refused(credentials.enrol, bad, "", ATTEMPT) is Reason.ENROLMENT_CODE, bad
    assert credentials.devices() == []
    with pytest.raises(TrustError, match="no enrolment code"):
        credentials.withdraw(other)


@pytest.mark.parametrize("attempt", [b"", b"short", b"a" * 17])
def test_an_attempt_has_16_bytes(credentials: Credentials, attempt: bytes) -> None:
    (code,) = credentials.make_codes(1)
    assert refused(credentials.enrol, code, "", attempt) is Reason.CORRUPT


def test_a_reply_that_was_lost_is_asked_for_again(credentials: Credentials) -> None:
    (code,) = credentials.make_codes(1)
    lost_device, lost = credentials.enrol(code, "", ATTEMPT)
    device, token = credentials.enrol(code, "", ATTEMPT)
    assert device == lost_device
    assert credentials.by_token(token) == device
    assert refused(credentials.by_token, lost) is Reason.UNKNOWN_DEVICE
    # Once a token was used its device has it, and whoever asks again is somebody else.
    assert refused(credentials.enrol, code, "", ATTEMPT) is Reason.ENROLMENT_CODE
    assert refused(credentials.enrol, code, "", b"b" * 16) is Reason.ENROLMENT_CODE
    assert credentials.by_token(token) == device


def test_a_token_that_is_nearly_right_is_refused(credentials: Credentials) -> None:
    _, token = enrolled(credentials)
    _, other = enrolled(credentials)
    mixed = f"{token.partition('.')[0]}.{other.partition('.')[2]}"
    for bad in (mixed, token[:-1], f"{token}x", token.upper(), token.partition(".")[0], "", ".", "\udcff", "\0"):
        assert refused(credentials.by_token, bad) is Reason.UNKNOWN_DEVICE, bad


def test_a_device_that_is_known_by_certificate_has_no_token(credentials: Credentials) -> None:
    device = credentials.register("shop-1")
    assert credentials.by_certificate("shop-1") == device
    assert refused(credentials.by_token, f"{device.id}.") is Reason.UNKNOWN_DEVICE
    assert refused(credentials.by_certificate, "shop-2") is Reason.UNKNOWN_DEVICE
    with pytest.raises(TrustError, match="registered already"):
        credentials.register("shop-1")


def test_a_revoked_device_is_refused_and_its_client_may_come_back(credentials: Credentials) -> None:
    device, token = enrolled(credentials)
    by_certificate = credentials.register("shop-1")
    credentials.by_token(token)
    assert credentials.revoke(device.id).state == "revoked"
    credentials.revoke(by_certificate.id)
    assert refused(credentials.by_token, token) is Reason.REVOKED
    assert refused(credentials.by_certificate, "shop-1") is Reason.REVOKED
    with pytest.raises(TrustError, match="no device"):
        credentials.revoke("nobody")
    (code,) = credentials.make_codes(1, first_client=device.client)
    again, _ = credentials.enrol(code, "", ATTEMPT)
    assert (again.client, again.id != device.id) == (device.client, True)


def test_whoever_reads_the_file_learns_no_token_and_no_code(credentials: Credentials, tmp_path: Path) -> None:
    code, used = credentials.make_codes(2)
    _, token = credentials.enrol(used, "", ATTEMPT)
    credentials.by_token(token)
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (code, used, token):
        public, _, hidden = secret.partition(".")
        assert public.encode() in everything
        assert hidden.encode() not in everything
        assert len(hidden) >= 43  # 256 bits in base64
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_another_process_revokes_while_this_one_looks(tmp_path: Path) -> None:
    here = Credentials(tmp_path / "credentials.sqlite")
    device, token = enrolled(here)
    here.by_token(token)
    program = (
        "import sys; from pathlib import Path; from fedtower.plugins.transports.grpc.credentials import Credentials;"
        "Credentials(Path(sys.argv[1])).revoke(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "credentials.sqlite"), device.id], check=True)
    assert refused(here.by_token, token) is Reason.REVOKED


def test_a_code_for_one_is_not_used_by_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "credentials.sqlite"
    (code,) = Credentials(path).make_codes(1, uses=5)
    outcomes: list[str] = []

    def enrol(turn: int) -> None:
        try:
            Credentials(path).enrol(code, "", turn.to_bytes(16))
            outcomes.append("enrolled")
        except Refused as error:
            outcomes.append(error.reason.name)

    threads = [threading.Thread(target=enrol, args=(turn,)) for turn in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ENROLMENT_CODE"] * 7 + ["enrolled"] * 5
    assert sorted(device.client for device in Credentials(path).devices()) == [0, 1, 2, 3, 4]


def test_who_is_known_is_let_in_while_somebody_enrols(credentials: Credentials) -> None:
    device, token = enrolled(credentials)
    credentials.by_token(token)
    with credentials._change():  # as an enrolment holds it, for as long as the disk takes
        assert credentials.by_token(token) == device
        assert refused(credentials.by_token, "nobody.x") is Reason.UNKNOWN_DEVICE


def test_nobody_waits_to_note_that_a_token_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls wait meanwhile: so neither for another process that writes nor for a thread that enrols."""
    monkeypatch.setattr("fedtower.plugins.transports.grpc.credentials._BUSY_SECONDS", 60.0)
    credentials = Credentials(tmp_path / "credentials.sqlite")
    device, token = enrolled(credentials)
    lock = sqlite3.connect(tmp_path / "credentials.sqlite", isolation_level=None)

    def answered() -> bool:
        """Whether the device is let in before those who hold the file let go of it."""
        found: list[Device] = []
        thread = threading.Thread(target=lambda: found.append(credentials.by_token(token)), daemon=True)
        thread.start()
        thread.join(20.0)
        return found == [device]

    lock.execute("BEGIN IMMEDIATE")
    assert answered()
    lock.execute("ROLLBACK")
    with credentials._lock:
        assert answered()
    used = "SELECT used FROM devices"
    assert lock.execute(used).fetchall() == [(0,)]
    assert answered()
    assert lock.execute(used).fetchall() == [(1,)]
    lock.close()
    credentials.close()


def test_what_is_no_file_of_credentials_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 1_000)
    with pytest.raises(TrustError, match="no file of credentials"):
        Credentials(tmp_path / "text")
    with pytest.raises(StorageError, match="cannot be opened"):
        Credentials(tmp_path / "nowhere" / "credentials.sqlite")


def test_a_file_that_is_locked_is_waited_for_and_then_said(
    credentials: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtower.plugins.transports.grpc.credentials._BUSY_SECONDS", 0.05)
    impatient = Credentials(tmp_path / "credentials.sqlite")
    _, token = enrolled(credentials)
    credentials.by_token(token)
    lock = sqlite3.connect(tmp_path / "credentials.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="database is locked"):
        impatient.make_codes(1)
    assert impatient.by_token(token).client == 0  # who only reads does not wait
    lock.execute("ROLLBACK")
    lock.close()
    impatient.make_codes(1)


def test_who_called_before_is_known_without_a_look_until_somebody_writes(tmp_path: Path) -> None:
    here, elsewhere = Credentials(tmp_path / "devices"), Credentials(tmp_path / "devices")
    devices = [here.enrol(code, "", bytes(16)) for code in here.make_codes(3)]
    tokens = [token for _, token in devices]
    for token in tokens * 2:  # the first call of each is itself a write
        here.by_token(token)
    looked: list[str] = []
    here._reader.set_trace_callback(looked.append)
    for token in tokens * 5:
        here.by_token(token)
    assert looked == []
    elsewhere.revoke(devices[1][0].id)
    assert here.by_token(tokens[0]) == devices[0][0]
    assert len(looked) == 1
    with pytest.raises(Refused) as refused:
        here.by_token(tokens[1])
    assert refused.value.reason is Reason.REVOKED
    elsewhere.close()
    assert here.by_token(tokens[2]) == devices[2][0]
    here.close()
