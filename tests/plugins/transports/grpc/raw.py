"""Connections that are no gRPC: opened and left, at every stage of one."""

from __future__ import annotations

import random
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, CONTINUATION = 4, 1, 9


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """A frame of HTTP/2: https://www.rfc-editor.org/rfc/rfc9113#section-4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def tcp(port: int) -> socket.socket:
    """A connection, and no more."""
    return socket.create_connection(("127.0.0.1", port), timeout=30.0)


def tls(port: int) -> ssl.SSLSocket:
    """A connection with TLS, and no more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(tcp(port))


def http2(port: int) -> ssl.SSLSocket:
    """A connection with HTTP/2, and no request."""
    line = tls(port)
    line.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
    return line


def unfinished_headers(port: int) -> ssl.SSLSocket:
    """A request whose headers never end."""
    line = http2(port)
    line.sendall(frame(HEADERS, b"\x83", stream=1) + frame(CONTINUATION, b"\x87", stream=1))
    return line


@contextmanager
def half_open(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections, of all four kinds, that are left as they are."""
    kinds = (tcp, tcp, tls, http2, unfinished_headers)
    with ExitStack() as stack:
        yield [stack.enter_context(kinds[number % len(kinds)](port)) for number in range(count)]


def garbage(port: int, draw: random.Random) -> None:
    """Bytes that mean nothing, at one of the layers; until the other side has had enough."""
    with suppress(OSError), draw.choice([tcp, tls, http2])(port) as line:
        line.settimeout(0.2)
        for _ in range(draw.randrange(1, 5)):
            data = draw.randbytes(draw.randrange(1, 3_000))
            if draw.random() < 0.7:
                kind, flags, stream = draw.randrange(12), draw.randrange(256), draw.choice([0, 1, 3, 2**31 - 1])
                data = frame(kind, data[: draw.choice([0, 4, 8, 3_000])], flags=flags, stream=stream)
            line.sendall(data)
        line.recv(100)
