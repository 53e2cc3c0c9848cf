"""A device whose server it may not believe is told why, in words that say what to do; it tries on for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedtower.core.errors import TrustError, Unreachable
from fedtower.plugins.transports.grpc import certificates
from fedtower.plugins.transports.grpc.caller import BackOff, Caller
from fedtower.plugins.transports.grpc.certificates import Authority, make_authority

HOSTS = ["localhost"]


@contextmanager
def listening(authority: Authority, hosts: list[str], days: int) -> Iterator[int]:
    """A port where nothing is answered, with a certificate."""
    pair = authority.issue(hosts[0], hosts, ExtendedKeyUsageOID.SERVER_AUTH, days)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def call(port: int, believed: Path) -> None:
    """A device's call, which is tried for half a second."""
    credentials = grpc.ssl_channel_credentials((believed / "authority.pem").read_bytes())
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        Caller(channel, back_off=BackOff(0.05, 0.1, 0.5)).heartbeat(b"a lease", 0.0)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates that begin to be valid in a day: what a device sees whose clock is three days behind."""
    monkeypatch.setattr(certificates, "_EARLIER", timedelta(days=-1))


def told(authority: Authority, believed: Path, days: int = 30, hosts: list[str] = HOSTS) -> str:
    with listening(authority, hosts, days) as port, pytest.raises(TrustError) as caught:
        call(port, believed)
    return str(caught.value)


def test_an_expired_certificate_is_told_with_what_the_clock_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = told(make_authority(tmp_path), tmp_path, days=-1)
    assert "has expired by the clock of this device, which says" in said
    assert f"{datetime.now(UTC):%Y-%m-%d}" in said
    assert "fedtower certs DIR --renew" in said
    # It is said at once, and not at every try.
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [said]


def test_a_certificate_of_the_future_is_told_to_be_a_matter_of_the_clock(tmp_path: Path, tomorrow: None) -> None:
    assert "is not valid yet by the clock of this device" in told(make_authority(tmp_path), tmp_path)


def test_another_authority_and_another_name_are_told_apart(tmp_path: Path) -> None:
    authority, other = make_authority(tmp_path), tmp_path / "other"
    other.mkdir()
    make_authority(other)
    assert "of another authority than the one that this device was given" in told(authority, other)
    assert "not for the name by which it was called" in told(authority, tmp_path, hosts=["elsewhere.example"])


def test_a_server_that_is_believed_or_away_is_no_matter_of_trust(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    with listening(authority, HOSTS, 30) as port, pytest.raises(Unreachable, match="UNIMPLEMENTED"):
        call(port, tmp_path)
    with pytest.raises(Unreachable, match="is it running"):
        call(port, tmp_path)
