"""TLS: how a server shows who it is, and a device checks it; and where a call may go without."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedtower.core.errors import RecipeError, TrustError
from fedtower.core.secret_files import read_secret

_log = logging.getLogger(__name__)
_SOON = timedelta(days=14)


@dataclass(frozen=True)
class ServerTls:
    """The files by which a server is known, looked at on every handshake: whoever renews them need not stop it.

    With ``clients``, every device must show a certificate of that authority (mutual TLS); without, it has a token.

    Two weeks before the certificate expires, and every day from then on, the log says so.

    Raises:
        TrustError: from :meth:`credentials`: a file is missing or damaged, the certificate has expired, or the key is
            not its own. Of files that come later, such are not taken, and logged.
    """

    certificate: Path = field(metadata={"help": "the server's certificate and those between it and its authority, PEM"})
    key: Path = field(metadata={"help": "its private key, PEM; only its owner may read it"})
    clients: Path | None = field(
        default=None, metadata={"help": "the authority of the devices' certificates; none: devices have tokens"}
    )

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of a port, which follow the files."""
        seen, current = self._state(), self._read()
        said = self._warn(None)

        def look() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen, said
            now, said = self._state(), self._warn(said)
            if now == seen:
                return None
            try:
                renewed = self._read()
            except TrustError as error:
                # Between two renames, or a mistake: those who call now are served by the certificate that was good.
                _log.warning("the certificate was not changed: %s", error)
                return None
            seen = now
            _log.info("the certificate was changed to that in %s", self.certificate)
            return renewed

        # The stubs do not know that None means "as before".
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", look)
        return grpc.dynamic_ssl_server_credentials(
            current, fetch, require_client_authentication=self.clients is not None
        )

    def _warn(self, said: datetime | None) -> datetime | None:
        """Say that the certificate expires soon, if it does, and was not said to today; when it was said last."""
        now = datetime.now(UTC)
        if said is not None and now - said < timedelta(days=1):
            return said
        try:
            until = x509.load_pem_x509_certificate(self.certificate.read_bytes()).not_valid_after_utc
        except (OSError, ValueError):
            return said  # which is said elsewhere
        if until - now < _SOON:
            _log.warning(
                "the certificate %s expires on %s, and devices will not believe this server any more: renew it",
                *(self.certificate, f"{until:%Y-%m-%d %H:%M} UTC"),
            )
        return now

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, filter(None, (self.certificate, self.key, self.clients))))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        chain, key = _read(self.certificate), read_secret(self.key)
        _refuse_unusable(chain, key, self.certificate, self.key)
        roots = None if self.clients is None else _read_certificates(self.clients)
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)


@dataclass(frozen=True)
class DeviceTls:
    """Whom a device believes, and, where the server asks for it, its own certificate and key."""

    authority: Path = field(metadata={"help": "the authority that signed the server's certificate, PEM"})
    certificate: Path | None = field(default=None, metadata={"help": "the device's own certificate, PEM"})
    key: Path | None = field(default=None, metadata={"help": "its private key, PEM"})

    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials of a channel. Raises TrustError when a file is missing or damaged."""
        roots = _read_certificates(self.authority)
        if (self.certificate is None) != (self.key is None):
            raise TrustError("a device's certificate and its key go together: give both, or none")
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        chain, key = _read(self.certificate), read_secret(self.key)
        _refuse_unusable(chain, key, self.certificate, self.key)
        return grpc.ssl_channel_credentials(roots, key, chain)


def listen(server: grpc.aio.Server, address: str, tls: ServerTls | None, *, insecure: bool) -> int:
    """The port at which ``server`` will be heard; ``HOST:0`` takes a free one.

    Raises:
        TrustError: plaintext where it may not be, or files of TLS that cannot be used.
        RecipeError: nobody can listen there: the port is taken, or the address is not of this machine.
    """
    refuse_contradiction(tls, address, insecure=insecure)
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise RecipeError(
            f"the server cannot listen at {address}: is the port taken, or the address of another machine? ({error})"
        ) from error


def connect(
    address: str, tls: DeviceTls | None, *, insecure: bool, options: Sequence[tuple[str, object]] = ()
) -> grpc.aio.Channel:
    """A channel to a server; it connects with the first call.

    Raises:
        TrustError: as :func:`listen` does.
    """
    refuse_contradiction(tls, address, insecure=insecure)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)


def refuse_contradiction(tls: object, address: str, *, insecure: bool) -> None:
    """Raise TrustError for plaintext where it may not be, and for certificates with ``--insecure``."""
    if tls is None:
        refuse_plaintext(address, insecure=insecure)
    elif insecure:
        raise TrustError("--insecure was given together with certificates: leave out the one that is not meant")


def refuse_plaintext(address: str, *, insecure: bool) -> None:
    """Return if a call to ``address`` (``HOST:PORT``, or ``unix:PATH``) may go without TLS; else raise TrustError."""
    if insecure and is_loopback(address):
        return
    missing = "and --insecure was not given" if not insecure else f"and {address} is none"
    raise TrustError(
        f"plaintext needs --insecure and a loopback address, {missing}: tokens and updates would be read by everybody "
        "on the way. `fedtower certs` makes certificates"
    )


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine hears what is said at ``address``.

    >>> [is_loopback(each) for each in ("127.0.0.1:1", "[::1]:1", "unix:/run/table", "0.0.0.0:1", "192.0.2.7:1")]
    [True, True, True, False, False]
    """
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Of names localhost alone, and only where it means what it says.
        return host == "localhost" and all(ipaddress.ip_address(each).is_loopback for each in _addresses(host))


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return {"0.0.0.0"}  # nowhere: not here


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(
            f"the certificate {path} cannot be read: {error.strerror}; `fedtower certs` makes one"
        ) from error


def _read_certificates(path: Path) -> bytes:
    data = _read(path)
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise TrustError(f"{path} holds no certificate that can be read: {error}") from error
    return data


def _refuse_unusable(chain: bytes, key: bytes, certificate_path: Path, key_path: Path) -> None:
    """gRPC takes any pair, and every handshake with a wrong one then fails without a reason."""
    try:
        certificate, private = x509.load_pem_x509_certificates(chain)[0], load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise TrustError(f"{certificate_path} and {key_path} are no certificate and its key: {error}") from error
    if certificate.public_key() != private.public_key():
        raise TrustError(f"{key_path} is not the key of {certificate_path}: are they of two days?")
    if certificate.not_valid_after_utc < datetime.now(UTC):
        raise TrustError(
            f"the certificate {certificate_path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; of a "
            "development authority, `fedtower certs --renew` makes a new one"
        )
