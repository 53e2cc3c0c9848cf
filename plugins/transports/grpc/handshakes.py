"""Handshakes that failed: what the words of the TLS library mean to the one who runs a device."""

from __future__ import annotations

from datetime import UTC, datetime

from fedtower.core.errors import TrustError

# As BoringSSL and gRPC say it; none of these is a server that is down.
_MEANINGS = (
    (
        "certificate has expired",
        "the server's certificate has expired by the clock of this device, which says {now}. If the clock is right, "
        "the server's operator must renew it (`fedtower certs DIR --renew`, of a development authority)",
    ),
    (
        "certificate is not yet valid",
        "the server's certificate is not valid yet by the clock of this device, which says {now}: set the clock",
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate is not for the name by which it was called: call it by one that is in the "
        "certificate, or have it made for this one too (`fedtower certs DIR --renew --host NAME`)",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is of another authority than the one that this device was given: is authority.pem "
        "of this federation, and the address right?",
    ),
)


def distrust(details: str) -> TrustError | None:
    """Why the certificate of a server is not believed, given the details of a call that failed; nothing where that was
    not the reason.

    >>> distrust("Socket closed")
    >>> print(distrust("SSL routines: CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"))
    the server's certificate is of another authority than the one that this device was given: is authority.pem of this \
federation, and the address right?
    """
    for words, meaning in _MEANINGS:
        if words in details:
            return TrustError(meaning.format(now=f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}"))
    return None
