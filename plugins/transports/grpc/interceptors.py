"""The gate: who calls is known, and within its rate, before anything that it sent is decoded."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fedtower.core.errors import FedtowerError
from fedtower.plugins.transports.grpc.credentials import Credentials, Device
from fedtower.plugins.transports.grpc.rates import Rates
from fedtower.plugins.transports.grpc.refusals import REFUSAL_KEY, Reason, Refused

OPEN = frozenset({"/fedtower.v1.Federation/Enrol"})
"""The calls of those who have no credentials yet; they are counted by address."""

_log = logging.getLogger(__name__)
_caller: ContextVar[Device] = ContextVar("caller")

_STATUS = {
    Reason.UNKNOWN_DEVICE: grpc.StatusCode.UNAUTHENTICATED,
    Reason.REVOKED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.RATE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_STRANGE = (Reason.UNKNOWN_DEVICE, Reason.REVOKED)


def caller() -> Device:
    """The device whose call is being answered. Raises LookupError outside of a call, and in one of OPEN."""
    return _caller.get()


@dataclass(frozen=True)
class Gate(grpc.aio.ServerInterceptor):
    """Lets in whom ``credentials`` knows, by token or by the certificate of the handshake, at the rates of ``rates``.

    Behind it a handler is called with the bytes of a request; one that was registered with a deserializer gets what
    that makes of them, after the caller was let in. ``observe`` is told each refusal, and of whom; ``said`` too, as
    long as there are few of one caller, and how many of it were not said before: a log has an end.
    """

    credentials: Credentials
    rates: Rates
    observe: Callable[[Refused, str], None] = lambda _refusal, _who: None
    said: Callable[[Refused, str, int], None] = lambda refusal, who, silent: _log.info(
        "refused %s: %s: %s (%d before it were not logged)", who, refusal.reason.name, refusal, silent
    )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, behind the gate; of a call with a wrong token, one that does not even read it."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        token = None if method in OPEN else _bearer(handler_call_details)
        try:
            device = None if token is None else self.credentials.by_token(token)
        except FedtowerError as error:
            return grpc.stream_stream_rpc_method_handler(_Refusing(self, error).refuse)
        return None if handler is None else _Guarded(self, handler, method in OPEN, device).handler()

    def admit(self, context: Any, device: Device | None, *, without: bool) -> str:
        """Who calls, for messages: known (or ``without`` credentials, where that may be), and not too often."""
        if without:
            who = address(context)
        else:
            device = device or self._by_certificate(context)
            _caller.set(device)
            who = f"device {device.id}"
        self.rates.call(who)
        return who

    def _by_certificate(self, context: Any) -> Device:
        names = list(context.auth_context().get("x509_common_name", ()))
        if names:
            return self.credentials.by_certificate(names[0].decode("utf-8", "replace"))
        raise Refused(
            Reason.UNKNOWN_DEVICE,
            "the call has no credentials: they are the metadata `authorization: Bearer TOKEN`, with the token that "
            "enrolling gave, or a certificate",
        )

    async def turn_away(self, context: Any, error: FedtowerError, who: str) -> None:
        """End a call with a status, and the refusal beside it; this raises."""
        if not isinstance(error, Refused):  # no fault of the caller's: the disk is full, the file is damaged
            _log.error("who calls could not be looked up: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "credentials cannot be looked up now; come back later")
        assert isinstance(error, Refused)
        strange = error.reason in _STRANGE
        wait, silent = self.rates.refused(address(context) if strange else who)
        if wait and strange:
            # Only what fails is counted, and credentials are looked up first: of many devices behind one address, those
            # that are known call as before, whatever their neighbours do.
            error = Refused(
                Reason.RATE,
                f"too many calls without good credentials come from {address(context)}; come back in {wait:.1f} s",
                retry_after_seconds=wait,
            )
        self.observe(error, who)
        if not wait:
            self.said(error, who, silent)
        status = _STATUS.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION)
        refusal = error.to_message()
        await context.abort(status, refusal.message, ((REFUSAL_KEY, refusal.SerializeToString()),))


def address(context: Any) -> str:
    """Where a call comes from, without the port: see :func:`network`."""
    return network(str(context.peer()))


def network(peer: str) -> str:
    """The address of a peer as gRPC writes it; of IPv6 the network, as whoever has one address there has 2^64.

    >>> network("ipv4:192.0.2.7:4711"), network("ipv6:%5B2001:db8::1:2:3:4%5D:4711"), network("unix:/run/table")
    ('ipv4:192.0.2.7', 'ipv6:2001:db8::/64', 'unix')
    >>> network("ipv6:[::ffff:192.0.2.7]:4711"), network("ipv6:[fe80::1%25eth0]:4711")
    ('ipv4:192.0.2.7', 'ipv6:fe80::/64')
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind != "ipv6":
        return f"{kind}:{rest.rpartition(':')[0]}".rstrip(":")
    try:
        found = ipaddress.IPv6Address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return peer
    if found.ipv4_mapped is not None:
        return f"ipv4:{found.ipv4_mapped}"
    return f"ipv6:{ipaddress.IPv6Network((found, 64), strict=False)}"


@dataclass(frozen=True)
class _Refusing:
    """A handler that refuses whatever comes, and reads none of it."""

    gate: Gate
    error: FedtowerError

    async def refuse(self, _requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self.gate.turn_away(context, self.error, address(context))
        yield b""  # never: it makes this a generator, which a handler of streams is


@dataclass(frozen=True)
class _Guarded:
    """A handler, and the gate before it. Handlers that stream their replies are generators."""

    gate: Gate
    inner: Any
    without: bool
    device: Device | None

    def handler(self) -> Any:
        """The guarded handler, of the same kind and without a deserializer."""
        kind = f"{'stream' if self.inner.request_streaming else 'unary'}_"
        kind += "stream" if self.inner.response_streaming else "unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(getattr(self, kind), response_serializer=self.inner.response_serializer)

    async def unary_unary(self, request: bytes, context: Any) -> Any:
        async with self._admitted(context) as who:
            return await self.inner.unary_unary(await self._taken(request, who, context), context)

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[Any]:
        async with self._admitted(context) as who:
            async for reply in self.inner.unary_stream(await self._taken(request, who, context), context):
                yield reply

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> Any:
        async with self._admitted(context) as who:
            return await self.inner.stream_unary(self._each(requests, who, context), context)

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        async with self._admitted(context) as who:
            async for reply in self.inner.stream_stream(self._each(requests, who, context), context):
                yield reply

    @asynccontextmanager
    async def _admitted(self, context: Any) -> AsyncIterator[str]:
        """Who calls, for as long as it is answered."""
        with ExitStack() as answered:
            try:
                who = self.gate.admit(context, self.device, without=self.without)
                if not self.without:  # behind one address may be many who enrol
                    answered.enter_context(self.gate.rates.running(who))
            except FedtowerError as error:
                await self.gate.turn_away(context, error, address(context) if self.device is None else self.device.id)
                raise
            yield who

    async def _each(self, requests: AsyncIterator[bytes], who: str, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self._taken(request, who, context)

    async def _taken(self, request: bytes, who: str, context: Any) -> Any:
        """A request, counted, and decoded if the handler wants it so."""
        try:
            self.gate.rates.sent(who, len(request))
            decode = self.inner.request_deserializer
            return request if decode is None else decode(request)
        except DecodeError as error:
            refusal = Refused(Reason.CORRUPT, f"{who} sent {len(request):,} bytes that are no such message: {error}")
            await self.gate.turn_away(context, refusal, who)
        except FedtowerError as error:
            await self.gate.turn_away(context, error, who)


def _bearer(details: grpc.HandlerCallDetails) -> str | None:
    """The token of a call; none where it has none."""
    for key, value in details.invocation_metadata or ():
        if key == "authorization":
            scheme, _, token = str(value).partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return None
