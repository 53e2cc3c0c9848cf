"""Certificates of a development authority, which signs the server's and the devices', for a federation of one's own.

Keys are of the curve P-256. Where an organisation has an authority of its own, its certificates serve as well: nothing
else in fedtower knows who issued them.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtower.core.errors import StorageError, TrustError
from fedtower.core.secret_files import read_secret, write_secret

AUTHORITY_DAYS = 3_650
# A device's clock may be behind: it must not find that a certificate made today is of tomorrow.
_EARLIER = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Authority:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    def issue(self, name: str, hosts: Sequence[str], usage: x509.ObjectIdentifier, days: int) -> tuple[bytes, bytes]:
        """A new key and its certificate, as PEM: valid for ``days`` from now, and two days before."""
        key = generate_private_key(SECP256R1())
        builder = _dated(days).subject_name(_named(name)).issuer_name(self.certificate.subject)
        builder = builder.public_key(key.public_key()).add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(each) for each in hosts]), critical=False
            )
        certificate = builder.sign(self.key, SHA256())
        return _key_pem(key), certificate.public_bytes(Encoding.PEM)


def make_authority(folder: Path) -> Authority:
    """A new authority in ``folder``: ``authority.pem``, which devices are given, and ``authority.key``.

    Raises:
        StorageError: there is one already.
    """
    key = generate_private_key(SECP256R1())
    builder = _dated(AUTHORITY_DAYS).subject_name(_named("fedtower development authority"))
    builder = builder.issuer_name(_named("fedtower development authority")).public_key(key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.sign(key, SHA256())
    write_secret(folder / "authority.key", _key_pem(key))
    (folder / "authority.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    return Authority(certificate, key)


def read_authority(folder: Path) -> Authority:
    """The authority that is in ``folder``. Raises TrustError when it is damaged, or its key is not its own."""
    secret, path = read_secret(folder / "authority.key"), folder / "authority.pem"
    try:
        key = load_pem_private_key(secret, password=None)
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise TrustError(f"the authority in {folder} cannot be read: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise TrustError(f"{folder / 'authority.key'} is not the key of {path}; make another authority elsewhere")
    return Authority(certificate, key)


def issue_server(authority: Authority, folder: Path, hosts: Sequence[str], days: int, *, renew: bool = False) -> None:
    """Write ``server.pem`` and ``server.key``, for all the ``hosts`` by which devices call the server."""
    _write(authority.issue(hosts[0], hosts, ExtendedKeyUsageOID.SERVER_AUTH, days), folder, "server", renew)


def issue_client(authority: Authority, folder: Path, name: str, days: int, *, renew: bool = False) -> None:
    """Write ``clients/NAME.pem`` and ``clients/NAME.key``: the device whose certificate's subject is ``NAME``."""
    if not name or len(name) > 64 or Path(name).name != name or not name.isprintable():
        raise TrustError(f"a certificate cannot be for {name!r}: a name has 1 to 64 letters, and no slash")
    (folder / "clients").mkdir(exist_ok=True)
    _write(authority.issue(name, (), ExtendedKeyUsageOID.CLIENT_AUTH, days), folder / "clients", name, renew)


def hosts_of(path: Path) -> tuple[str, ...]:
    """The hosts that a server's certificate is for."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise TrustError(f"{path} is no certificate of a server: {error}") from error
    dns = names.get_values_for_type(x509.DNSName)
    return (*dns, *map(str, names.get_values_for_type(x509.IPAddress)))


def _write(pair: tuple[bytes, bytes], folder: Path, name: str, renew: bool) -> None:
    """Write a key and its certificate; renewed, each takes its place at once, so that a server that looks sees a pair
    or two halves that do not fit, and never half a file.
    """
    places = [folder / f"{name}.key", folder / f"{name}.pem"]
    taken = [path for path in places if path.exists()]
    if taken and not renew:
        raise StorageError(f"{taken[0]} is there already; --renew makes a new one in its place")
    beside = [path.with_name(f"{path.name}.new") for path in places]
    for path in beside:
        path.unlink(missing_ok=True)
    for path, data in zip(beside, pair, strict=True):
        write_secret(path, data)
    beside[1].chmod(0o644)
    for path, place in zip(beside, places, strict=True):
        path.replace(place)


def _dated(days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _EARLIER).not_valid_after(now + datetime.timedelta(days=days))


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise TrustError(f"{host!r} is neither a host's name in ASCII nor an address: {error}") from error


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
