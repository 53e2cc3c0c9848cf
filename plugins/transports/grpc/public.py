"""The public port: calls of devices, behind the gate, answered by the intake; what is refused is said in the reply."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from fedtower.core.errors import FedtowerError, StorageError
from fedtower.core.journal import Busy
from fedtower.plugins.transports.grpc.bounds import CALL_BYTES
from fedtower.plugins.transports.grpc.credentials import Credentials
from fedtower.plugins.transports.grpc.enrolment import EnrolService
from fedtower.plugins.transports.grpc.intake import Caller, Intake, RowsAway, about
from fedtower.plugins.transports.grpc.interceptors import Gate, caller
from fedtower.plugins.transports.grpc.rates import Rates, RateSettings
from fedtower.plugins.transports.grpc.refusals import Refused
from fedtower.plugins.transports.grpc.rows import METHOD
from fedtower.protos.v1 import federation_pb2 as pb

SERVICE = "fedtower.v1.Federation"
OPTIONS = (
    ("grpc.max_receive_message_length", CALL_BYTES),
    ("grpc.max_send_message_length", 2 * CALL_BYTES),
    # Without these two, memory grows with the number of large uploads.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 << 10),
    ("grpc.so_reuseport", 1),
    ("grpc.keepalive_permit_without_calls", 1),
    # A connection that does not come to TLS and HTTP/2 within this time, or that nobody calls over, or from which no
    # answer to a ping comes, is closed: half-open ones must not use up the files of the process.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@dataclass(frozen=True)
class Public:
    """Handlers of the calls. They are given bytes, and give messages."""

    intake: Intake
    credentials: Credentials

    def handlers(self) -> grpc.GenericRpcHandler:
        """All calls of the service."""
        one = grpc.unary_unary_rpc_method_handler
        many = grpc.unary_stream_rpc_method_handler
        methods: dict[str, Any] = {
            "Enrol": one(EnrolService(self.intake.federation, self.credentials, self._not_enrolled).enrol),
            "CheckIn": one(
                self._answering("CheckIn", self.intake.check_in, pb.CheckInReply), response_serializer=_bytes
            ),
            "Heartbeat": one(
                self._answering("Heartbeat", self.intake.heartbeat, pb.HeartbeatReply), response_serializer=_bytes
            ),
            "Resume": one(self._answering("Resume", self.intake.resume, pb.ResumeReply), response_serializer=_bytes),
            "Submit": grpc.stream_unary_rpc_method_handler(
                self._answering("Submit", self.intake.submit, pb.SubmitReply), response_serializer=_bytes
            ),
            "Fetch": many(self._streaming("Fetch", self.intake.fetch, pb.Chunk), response_serializer=_bytes),
            "FetchRows": many(
                self._streaming("FetchRows", self.intake.fetch_rows, pb.RowsChunk), response_serializer=_bytes
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _answering(
        self, call: str, answer: Callable[[Any, Any], Awaitable[Any]], reply: Any
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """A handler that says what is refused, or not possible now, in a reply of its kind."""

        async def handle(request: Any, context: Any) -> Any:
            started = time.monotonic()
            try:
                return await answer(self._caller(), request)
            except (FedtowerError, OSError) as error:
                return self._said(error, reply, call, context)
            finally:
                self.intake.meters.answered(call, time.monotonic() - started)

        return handle

    def _streaming(
        self, call: str, answer: Callable[[Any, Any], AsyncIterator[Any]], reply: Any
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def handle(request: bytes, context: Any) -> AsyncIterator[Any]:
            started = time.monotonic()
            try:
                async for part in answer(self._caller(), request):
                    yield part
            except (FedtowerError, OSError) as error:
                yield self._said(error, reply, call, context)
            finally:
                self.intake.meters.answered(call, time.monotonic() - started)

        return handle

    def _not_enrolled(self, error: Refused) -> None:
        refused(self.intake, error, call="Enrol")

    def _caller(self) -> Caller:
        return Caller(caller().id, caller().client)

    def _said(self, error: FedtowerError | OSError, reply: Any, call: str, context: Any) -> Any:
        """The error as a reply; where the fault is here (a disk that is full, no more files to be opened), the device
        is asked to come back.
        """
        whose = {"device": caller().id, "client": caller().client, **about()}
        if isinstance(error, Refused):
            refused(self.intake, error, call=call, **whose)
            return reply(refusal=error.to_message())
        seconds = error.seconds if isinstance(error, Busy) else 5.0
        self.intake.said("not_now", call=call, **whose, message=str(error))
        if isinstance(error, StorageError | OSError) and not isinstance(error, Busy):
            self.intake.stumbled = time.monotonic()
        if isinstance(error, StorageError | OSError) and "come_back" in reply.DESCRIPTOR.fields_by_name:
            return reply(come_back=pb.ComeBack(seconds=seconds, reason="the server cannot store anything now"))
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(f"the server cannot do that now; come back in {seconds:g} seconds")
        return reply()


@dataclass(frozen=True)
class SocketRows:
    """Asks the table process for rows."""

    channel: grpc.aio.Channel

    async def __call__(self, request: bytes) -> AsyncIterator[bytes]:
        """The chunks, unread."""
        try:
            call: Any = self.channel.unary_stream(METHOD)
            async for chunk in call(request, timeout=60.0):
                yield chunk
        except grpc.aio.AioRpcError as error:
            raise RowsAway(str(error.details())) from error


def public_server(
    intake: Intake, credentials: Credentials, rates: RateSettings, most_calls: int | None = None
) -> grpc.aio.Server:
    """The server of the public port; its address is still to be added."""

    def said(refusal: Refused, who: str, silent: int) -> None:
        more = {"not_logged_before": silent} if silent else {}
        intake.said("refused", reason=refusal.reason.name.lower(), who=who, **more, message=str(refusal))

    gate = Gate(credentials, Rates(rates), lambda refusal, _who: intake.meters.refused(refusal.reason), said)
    server = grpc.aio.server(interceptors=[gate], options=OPTIONS, maximum_concurrent_rpcs=most_calls)
    server.add_generic_rpc_handlers((Public(intake, credentials).handlers(),))
    return server


def refused(intake: Intake, refusal: Refused, **values: Any) -> None:
    """Count a refusal, and write it to the log: one line, typed."""
    intake.meters.refused(refusal.reason)
    intake.said("refused", reason=refusal.reason.name.lower(), **values, message=str(refusal))


def _bytes(reply: Any) -> bytes:
    """A message serialised; bytes as they are."""
    return reply if isinstance(reply, bytes) else bytes(reply.SerializeToString())
