"""Web: how an intake stands, over HTTP: a live page for people, health for balancers, meters for Prometheus.

======================  ==============================================================================================
``/``                   the page; it asks for the next every two seconds
``/status.json``        :class:`fedtower.recsys.status.Status`, at most a second old
``/health``             200 or 503, with the reasons
``/metrics``            what is counted, for Prometheus
======================  ==============================================================================================

It is never on the devices' port. Only GET is answered; on a loopback address only calls that name one, so that a page
from elsewhere cannot read this one through its reader's browser. There is no password: who can reach it may read it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from fedtower.core.errors import FedtowerError, ServingError
from fedtower.plugins.transports.grpc.tls import is_loopback
from fedtower.recsys.status import Status

_MOST_CALLS = 16
_CALL_SECONDS = 5.0
_FRESH_SECONDS = 1.0

Answer = tuple[str, str, bytes]


@dataclass
class Pages:
    """The WSGI application. ``host`` is what it is bound to."""

    host: str
    status: Callable[[], Status]
    health: Callable[[], tuple[bool, dict[str, Any]]]
    registry: CollectorRegistry
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _held: tuple[float, bytes] = field(default=(float("-inf"), b""), repr=False)

    def __post_init__(self) -> None:
        self._page = resources.files("fedtower.recsys").joinpath("status.html").read_bytes()
        self._headers = [*_HEADERS.items(), ("Content-Security-Policy", _policy(self._page))]
        self._meters = make_wsgi_app(self.registry)

    def __call__(self, environ: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a call."""
        method, path = str(environ["REQUEST_METHOD"]), str(environ.get("PATH_INFO", ""))
        if method == "GET" and path == "/metrics" and self._may(environ):
            scraped: Iterable[bytes] = self._meters(dict(environ), start)
            return scraped
        status, kind, body = self._answer(method, path, environ)
        extra = [("Allow", "GET")] if status.startswith("405") else []
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *self._headers, *extra])
        return [body]

    def _answer(self, method: str, path: str, environ: Mapping[str, Any]) -> Answer:
        if method != "GET":
            return _json("405 Method Not Allowed", {"error": "there is nothing here but GET"})
        if not self._may(environ):
            return _json("403 Forbidden", {"error": "call this by a loopback address, or by localhost"})
        if path == "/":
            return "200 OK", "text/html; charset=utf-8", self._page
        if path == "/status.json":
            return self._told()
        if path == "/health":
            well, told = self.health()
            return _json("200 OK" if well else "503 Service Unavailable", told)
        return _json("404 Not Found", {"error": "there are /, /status.json, /health and /metrics"})

    def _told(self) -> Answer:
        """The status; many that look at the same time look once."""
        with self._lock:
            read, body = self._held
            if time.monotonic() - read > _FRESH_SECONDS:
                try:
                    body = json.dumps(self.status().to_dict()).encode()
                except FedtowerError as error:
                    return _json("503 Service Unavailable", {"error": str(error)})
                self._held = (time.monotonic(), body)
        return "200 OK", "application/json", body

    def _may(self, environ: Mapping[str, Any]) -> bool:
        """Whether the call names a host that this may be called by."""
        named = str(environ.get("HTTP_HOST", ""))
        return not is_loopback(f"{self.host}:0") or bool(re.fullmatch(_LOOPBACK, named))


class Web:
    """A server of pages in threads of its own, until :meth:`close`.

    Raises:
        ServingError: the port is taken.
    """

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        try:
            self._server = _Bounded((host, port), _Quiet)
        except OSError as error:
            raise ServingError(
                f"the live page cannot be served at {host}:{port} ({error.strerror}); choose another --status-port"
            ) from error
        self._server.set_app(pages)
        self._thread = threading.Thread(target=self._server.serve_forever, name="status page", daemon=True)
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._server.server_address[1]}/"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Bounded(ThreadingMixIn, WSGIServer):
    """At most so many calls at once; one more is hung up on."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(_MOST_CALLS)
        self.address_family = _FAMILIES[":" in address[0]]
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # The library's own asks a name server for this host's name.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news."""


class _Quiet(WSGIRequestHandler):
    """Waits for a caller no longer than a few seconds, and tells nobody."""

    timeout = _CALL_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        pass


_FAMILIES = {False: socket.AF_INET, True: socket.AF_INET6}
_LOOPBACK = r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?"
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _policy(page: bytes) -> str:
    """What a browser lets the page do: run its own script, and ask this server."""
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(status: str, told: Mapping[str, Any]) -> Answer:
    return status, "application/json", json.dumps(told).encode()
