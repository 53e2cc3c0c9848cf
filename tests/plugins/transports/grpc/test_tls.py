"""The files of TLS: made once, renewed, refused when they do not fit; and where a call may go without."""

import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from fedtower.core.errors import RecipeError, StorageError, TrustError
from fedtower.plugins.transports.grpc.certificates import (
    issue_client,
    issue_server,
    make_authority,
    read_authority,
)
from fedtower.plugins.transports.grpc.commands import certs, enrol
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.tls import DeviceTls, ServerTls, refuse_plaintext


def run(command: object, *words: str) -> str:
    done = CliRunner().invoke(command, words)  # type: ignore[arg-type]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    run(certs, str(tmp_path / "keys"), "--host", "localhost", "--host", "127.0.0.1", "--client", "shop-1")
    return tmp_path / "keys"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def test_keys_are_their_owners_alone_and_certificates_are_for_all(keys: Path) -> None:
    modes = {str(path.relative_to(keys)): stat.S_IMODE(path.stat().st_mode) for path in keys.rglob("*.*")}
    assert set(modes) == {
        *("authority.key", "authority.pem", "server.key", "server.pem"),
        *("clients/shop-1.key", "clients/shop-1.pem"),
    }
    assert all((mode == 0o600) == name.endswith(".key") for name, mode in modes.items())


@pytest.fixture
def listening(keys: Path) -> Iterator[int]:
    """A port where Python's own TLS shows the server's certificate, and asks for a device's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    context.load_verify_locations(keys / "authority.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as port:

        def answer() -> None:
            while True:
                try:
                    line, _ = port.accept()
                except OSError:
                    return
                with line:
                    try:
                        with context.wrap_socket(line, server_side=True) as secure:
                            secure.sendall(str(secure.getpeercert()).encode())
                    except OSError:
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield port.getsockname()[1]
        port.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(("host", "believed"), [("localhost", True), ("127.0.0.1", True), ("elsewhere.example", False)])
def test_another_implementation_believes_the_certificates(
    host: str, believed: bool, keys: Path, listening: int
) -> None:
    context = ssl.create_default_context(cafile=keys / "authority.pem")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(keys / "clients" / "shop-1.pem", keys / "clients" / "shop-1.key")
    with socket.create_connection(("127.0.0.1", listening), timeout=10) as line:
        try:
            with context.wrap_socket(line, server_hostname=host) as secure:
                assert "shop-1" in secure.recv(10_000).decode()
                assert believed
        except ssl.SSLCertVerificationError:
            assert not believed


def test_nothing_is_overwritten(keys: Path) -> None:
    before = everything(keys)
    for words in (["--host", "other"], ["--client", "shop-1"], ["--host", "other", "--client", "shop-2"]):
        with pytest.raises(StorageError, match="is there already; --renew"):
            run(certs, str(keys), *words)
    with pytest.raises(StorageError, match="is there already"):
        make_authority(keys)
    assert everything(keys) == before


def test_renewing_keeps_the_hosts_and_the_authority_and_changes_the_keys(keys: Path) -> None:
    before = everything(keys)
    assert "for localhost, 127.0.0.1; 30 days" in run(certs, str(keys), "--renew", "--days", "30")
    after = everything(keys)
    assert {name for name in after if after[name] != before[name]} == {"server.pem", "server.key"}
    assert "for elsewhere.example" in run(certs, str(keys), "--renew", "--host", "elsewhere.example")
    run(certs, str(keys), "--renew", "--client", "shop-1")
    assert {name for name, data in everything(keys).items() if data != before[name]} == {
        *("server.pem", "server.key", "clients/shop-1.pem", "clients/shop-1.key"),
    }


def test_a_command_that_says_too_little_or_nonsense_is_refused(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(RecipeError, match="needs a --host"):
        run(certs, str(tmp_path / "new"))
    with pytest.raises(StorageError, match="nothing to renew"):
        run(certs, str(tmp_path / "new"), "--renew")
    assert not (tmp_path / "new").exists()
    for bad in ("../shop", "", "x" * 65, "a\nb", "."):
        with pytest.raises(TrustError, match="a certificate cannot be for"):
            issue_client(read_authority(keys), keys, bad, 1)
    with pytest.raises(TrustError, match="neither a host's name"):
        issue_server(read_authority(keys), keys, ["über"], 1, renew=True)


def test_the_authority_of_another_key_is_refused(keys: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_authority(other)
    (keys / "authority.key").unlink()
    (other / "authority.key").rename(keys / "authority.key")
    with pytest.raises(TrustError, match="is not the key of"):
        read_authority(keys)


def spoil(keys: Path, how: str) -> None:
    if how == "missing":
        (keys / "server.pem").unlink()
    elif how == "open":
        (keys / "server.key").chmod(0o644)
    elif how == "text":
        (keys / "server.pem").write_text("no certificate")
    elif how == "other":
        (keys / "clients" / "shop-1.key").rename(keys / "server.key")
    else:
        issue_server(read_authority(keys), keys, ["localhost"], -1, renew=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "cannot be read"),
        ("open", "chmod 600"),
        ("text", "no certificate and its key"),
        ("other", "is not the key of"),
        ("expired", "expired on"),
    ],
)
def test_a_server_does_not_start_with_files_that_do_not_fit(how: str, said: str, keys: Path) -> None:
    spoil(keys, how)
    with pytest.raises(TrustError, match=said):
        ServerTls(keys / "server.pem", keys / "server.key").credentials()


def test_a_device_does_not_start_with_files_that_do_not_fit(keys: Path) -> None:
    client = keys / "clients" / "shop-1.pem"
    DeviceTls(keys / "authority.pem", client, client.with_suffix(".key")).credentials()
    with pytest.raises(TrustError, match="cannot be read"):
        DeviceTls(keys / "nowhere.pem").credentials()
    with pytest.raises(TrustError, match="holds no certificate"):
        DeviceTls(keys / "server.key").credentials()
    with pytest.raises(TrustError, match="go together"):
        DeviceTls(keys / "authority.pem", certificate=client).credentials()
    with pytest.raises(TrustError, match="is not the key of"):
        DeviceTls(keys / "authority.pem", client, keys / "server.key").credentials()


LOOPBACK = ["127.0.0.1:50051", "127.8.0.1:1", "[::1]:50051", "localhost:50051", "unix:/run/fedtower"]
ELSEWHERE = ["0.0.0.0:50051", "192.0.2.7:50051", "[::]:1", "federation.example:1", "localhost.example:1", "nowhere", ""]


@pytest.mark.parametrize("address", LOOPBACK)
def test_plaintext_goes_over_loopback_when_it_is_asked_for(address: str) -> None:
    refuse_plaintext(address, insecure=True)
    with pytest.raises(TrustError, match=r"plaintext needs --insecure and a loopback address, and --insecure was not"):
        refuse_plaintext(address, insecure=False)


@pytest.mark.parametrize("address", ELSEWHERE)
@pytest.mark.parametrize("insecure", [False, True])
def test_plaintext_goes_nowhere_else(address: str, insecure: bool) -> None:
    with pytest.raises(TrustError, match=r"plaintext needs --insecure and a loopback address"):
        refuse_plaintext(address, insecure=insecure)


def test_localhost_that_is_somewhere_else_is_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    somewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: somewhere)
    with pytest.raises(TrustError):
        refuse_plaintext("localhost:1", insecure=True)


def test_an_operator_enrols_lists_and_revokes(tmp_path: Path) -> None:
    path = str(tmp_path / "credentials.sqlite")
    with pytest.raises(StorageError, match="there are no credentials"):
        run(enrol, "list", path)
    first, second = run(enrol, "codes", path, "-n", "2", "--first-client", "4").splitlines()
    device, token = Credentials(Path(path)).enrol(second, "a phone", b"a" * 16)
    assert device.client == 5
    assert "is client 6" in run(enrol, "certificate", path, "shop-1")
    run(enrol, "withdraw", path, first)
    assert "good for 0 more" in run(enrol, "list", path)
    assert f"device {device.id} (client 5) is revoked" in run(enrol, "revoke", path, device.id)
    listed = run(enrol, "list", path, "--json")
    assert '"state": "revoked"' in listed
    assert token.partition(".")[2] not in listed


@pytest.mark.parametrize(("days", "warned"), [(1, True), (13, True), (15, False), (365, False)])
def test_two_weeks_before_a_certificate_expires_it_is_said(
    days: int, warned: bool, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    issue_server(read_authority(keys), keys, ["localhost"], days, renew=True)
    ServerTls(keys / "server.pem", keys / "server.key").credentials()
    assert ("devices will not believe this server any more: renew it" in caplog.text) == warned


def test_a_warning_is_given_once_a_day(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    issue_server(read_authority(keys), keys, ["localhost"], 1, renew=True)
    tls = ServerTls(keys / "server.pem", keys / "server.key")
    said = tls._warn(None)
    assert said is not None
    assert tls._warn(said) is said
    assert tls._warn(said - timedelta(days=1)) != said
    assert len(caplog.records) == 2


def test_a_certificate_is_good_for_devices_whose_clocks_are_a_day_off(keys: Path) -> None:
    for path in (keys / "authority.pem", keys / "server.pem", keys / "clients" / "shop-1.pem"):
        made = x509.load_pem_x509_certificate(path.read_bytes())
        now = datetime.now(UTC)
        assert made.not_valid_before_utc < now - timedelta(days=1) < now + timedelta(days=1) < made.not_valid_after_utc
