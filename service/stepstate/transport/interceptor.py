"""Around every RPC: its peer and memory, its metrics, and errors as statuses.

Every `StepstateError` leaves with its code and details. Anything else that a handler raises becomes
INTERNAL with an id that is also in the log: never UNKNOWN, never a traceback on the wire.

gRPC hands requests over as bytes, so that they are counted before they are decoded.

It serves both transports. What only grpcio needs is harmless on the lean one, which leaves no
reference cycles, logs nothing of clients that have left, and knows whose request it reads.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError

from stepstate.budget import MemoryUse, call_memory
from stepstate.errors import Internal, InvalidField, StepstateError, without_frames
from stepstate.h2grpc import Call, MessageSink
from stepstate.metrics import Metrics, RpcMetrics
from stepstate.transport.admission import CallAdmission
from stepstate.transport.auditing import AUTH_ERRORS, audited, refused_credential
from stepstate.transport.authentication import Authenticator, NoAuthentication, authenticate
from stepstate.transport.methods import LONG, METHODS, STREAM
from stepstate.transport.open_calls import OpenCalls
from stepstate.transport.peers import current_peer
from stepstate.transport.pump import Pump
from stepstate.transport.receiving import Receiver
from stepstate.transport.shares import CALL_COST, cost_of
from stepstate.transport.status import DETAILS_KEY, code_of, status_of

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from stepstate.transport.peers import Context

    Handler = grpc.RpcMethodHandler[Any, Any]
    _Codec = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]

_GRPC_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


@dataclass(frozen=True, slots=True)
class DecodeFailure:
    """Stands for bytes that are no message of the RPC's type, until they are answered."""

    field: str
    problem: str

    @property
    def error(self) -> InvalidField:
        """What the client is answered."""
        return InvalidField(self.field, self.problem)


DECODED = 3
"""Bytes that a request of one byte takes while it is served: received, decoded, and copied."""
SENT = 2
"""Bytes that a reply of one byte takes until it has left: here, and as gRPC's copy."""
REQUEST_BYTES = 4096
"""What the shortest request takes beside."""


class MessageChannel:
    """The messages of an RPC with many requests, which come as bytes.

    As an iterator, it receives them with others in turn, and decodes them. Attached to a sink, it
    hands each over when it comes, and `send` answers.

    Args:
        context: of the RPC.
        codec: a request from its bytes, or `DecodeFailure`; and the bytes of a reply.
        receiver: for the iterator.
        counts: of the RPC; whoever does without the codec counts there.
    """

    def __init__(
        self, context: Context, codec: _Codec, receiver: Receiver, counts: RpcMetrics
    ) -> None:
        self.counts = counts
        self._context = context
        self._receiver = receiver
        self._pipe: Any = context if isinstance(context, Call) else Pump(context)
        self.decode, self.encode = codec
        self.send = self._pipe.send
        self.pause = self._pipe.pause
        self.resume = self._pipe.resume

    def attach(self, sink: MessageSink) -> None:
        """Hands all requests over to a sink."""
        self._pipe.attach(sink)

    def detach(self) -> None:
        """Hands no more requests over."""
        self._pipe.detach()

    def __aiter__(self) -> MessageChannel:
        return self

    async def __anext__(self) -> Any:
        data = await _receive(self._receiver, self._context)
        if data is grpc.aio.EOF:
            raise StopAsyncIteration
        return _well_formed(self.decode(data))


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler once, when its RPC is first called.

    Args:
        metrics: counts the RPCs.
        admission: counts the calls of each peer, and lets long ones wait.
        receiver: receives their requests.
        authenticator: knows who makes them.
    """

    def __init__(
        self,
        metrics: Metrics,
        admission: CallAdmission,
        receiver: Receiver,
        authenticator: Authenticator | None = None,
    ) -> None:
        self._metrics = metrics
        self._admission = admission
        self._receiver = receiver
        self._authenticator = authenticator or NoAuthentication()
        self._wrapped: dict[str, Handler | None] = {}
        self.open_calls = OpenCalls()
        """Calls that end with their credential."""
        # What grpcio itself logs: a filter is added once, however many servers a process has.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_client_is_there)

    def expect(self, methods: Iterable[MethodDescriptor]) -> None:
        """Makes the metrics of RPCs before any is called."""
        for method in methods:
            grpc_type = _GRPC_TYPES[method.client_streaming, method.server_streaming]
            self._metrics.rpc(grpc_type, method.containing_service.full_name, method.name)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See `grpc.aio.ServerInterceptor`."""
        wrapped = self._wrapped.get(details.method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(details)
        if handler is None:  # no such RPC: UNIMPLEMENTED, and no series for made-up names
            return handler
        self._wrapped[details.method] = wrapped = self._wrap(details.method, handler)
        return wrapped

    def _wrap(self, path: str, handler: Handler) -> Handler:
        _, service, method = path.split("/")
        grpc_type = _GRPC_TYPES[handler.request_streaming, handler.response_streaming]
        counts = self._metrics.rpc(grpc_type, service, method)
        rpc = _Rpc(
            path,
            self._admission,
            self._receiver,
            authenticator=self._authenticator,
            open_calls=self.open_calls,
            metrics=self._metrics,
            counts=counts,
            codec=_codec(counts, handler),
        )
        # A handler of one request is one of a stream to gRPC: otherwise it would read the request
        # before a handler says whose it is, and may have it wait (see `receiving`).
        one, many = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        behaviors: tuple[tuple[Any, Any, Any, Any], ...] = (
            (one, handler.unary_unary, rpc.returning, rpc.only_request),
            (many, handler.unary_stream, rpc.writing, rpc.only_request),
            (one, handler.stream_unary, rpc.returning, rpc.all_requests),
            (many, handler.stream_stream, rpc.writing, rpc.all_requests),
        )
        for make, behavior, wrap, requests in behaviors:
            if behavior is not None:
                wrapped: Handler = make(wrap(behavior, requests), None, rpc.encode)
                return wrapped
        raise NotImplementedError(f"{path} has no handler")


class _Rpc:
    """Wraps the handler of one RPC."""

    def __init__(
        self,
        path: str,
        admission: CallAdmission,
        receiver: Receiver,
        *,
        authenticator: Authenticator,
        open_calls: OpenCalls,
        metrics: Metrics,
        counts: RpcMetrics,
        codec: _Codec,
    ) -> None:
        self._path = path
        self._method = path.rpartition("/")[2]
        self._authenticator = authenticator
        self._open_calls = open_calls
        self._kind = METHODS[self._method].kind
        self._metrics = metrics
        self._counts = counts
        self._admission = admission
        self._receiver = receiver
        self._codec = codec
        self._decode, self.encode = codec

    def returning(
        self,
        behavior: Callable[..., Awaitable[Any]],
        read: Callable[[Context], Awaitable[Any]],
    ) -> Callable[..., Any]:
        """Serves handlers that return their one response; `read` gives them their requests."""
        if self._kind is LONG:
            behavior = self._admission.in_turn(behavior)
        serve = self._serving(audited(self._method, behavior), read)

        async def watched(_: object, context: Context) -> Any:
            async with self._watch(context):
                await self._begin(context)
                reply = self.encode(await serve(context))
                call_memory.get().resize(MemoryUse.REPLIES, SENT * len(reply))
                return reply

        return watched

    def writing(
        self, behavior: Callable[..., Any], read: Callable[[Context], Awaitable[Any]]
    ) -> Callable[..., Any]:
        """Serves handlers that use `context.write`, and async generators."""
        if inspect.isasyncgenfunction(behavior):
            behavior = _written(behavior)
        serve = self._serving(audited(self._method, behavior), read)

        async def watched(_: object, context: Context) -> None:
            async with self._watch(context):
                await self._begin(context)
                await serve(context)

        return watched

    def _serving(
        self, behavior: Callable[..., Awaitable[Any]], read: Callable[[Context], Awaitable[Any]]
    ) -> Callable[[Context], Awaitable[Any]]:
        """Reads what a handler needs, and calls it.

        A stream ends when its credential does. So does another call that has sent no request yet;
        one that has is answered.
        """
        guarded = self._open_calls.until_credential_ends
        if self._kind is not STREAM:
            read = guarded(read)

        async def serve(context: Context) -> Any:
            return await behavior(await read(context), context)

        return guarded(serve) if self._kind is STREAM else serve

    async def _begin(self, context: Context) -> None:
        """Makes sure that a call may be made, and counts it.

        Raises:
            StepstateError: it is refused.
        """
        try:
            await authenticate(self._authenticator, context, self._method)
        except StepstateError as error:
            if isinstance(error, AUTH_ERRORS):
                self._metrics.auth_failures[error.cause] += 1
            await self._admission.pay_unidentified(context)
            raise
        try:
            self._admission.begin(context, self._kind, _when_done)
        except StepstateError:
            await self._admission.pay_refusal()
            raise

    async def only_request(self, context: Context) -> Any:
        """The request of an RPC that has one.

        Raises:
            MemoryLimit: its peer holds too much, or it came slowly and others waited.
            InvalidField: it can't be parsed, or did not come.
        """
        peer = current_peer.get()
        data = await _receive(self._receiver, context)
        if data is grpc.aio.EOF:
            raise InvalidField("message", "is missing: the call ended before its request")
        call_memory.get().reserve(MemoryUse.REQUESTS, DECODED * len(data) + REQUEST_BYTES)
        if (turn := self._admission.shares.take(peer, CALL_COST + cost_of(data))) is not None:
            await turn
        return _well_formed(self._decode(data))

    async def all_requests(self, context: Context) -> MessageChannel:
        """The requests of an RPC that has many."""
        return MessageChannel(context, self._codec, self._receiver, self._counts)

    @asynccontextmanager
    async def _watch(self, context: Context) -> AsyncIterator[None]:
        self._counts.started += 1
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.InternalError):  # a write to a client that is gone
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except StepstateError as error:
            code = code_of(error)
            self._metrics.refused(error.reason)
            log.info("refused: %s", error, extra={"rpc": self._path, "reason": error.reason})
            if isinstance(error, AUTH_ERRORS):
                refused_credential(error, self._method, self._admission.name_of(context))
            _refuse(context, error)
            without_frames(error)
        except Exception as error:
            internal = Internal(secrets.token_hex(8))
            code = grpc.StatusCode.INTERNAL
            self._metrics.refused(internal.reason)
            log.exception("an RPC failed", extra={"rpc": self._path, "error_id": internal.error_id})
            _refuse(context, internal)
            without_frames(error)
        finally:
            self._counts.handled[_go_name(code)] += 1
            self._counts.seconds.observe(time.perf_counter() - started)


def _written(generate: Callable[..., AsyncGenerator[Any]]) -> Callable[..., Awaitable[None]]:
    """Makes an async generator a handler that writes.

    A generator that waits at a `yield` does not see that its call is cancelled, and grpcio leaves
    its end to the garbage collector.
    """

    async def write(request: Any, context: Context) -> None:
        async with aclosing(generate(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write


def _codec(counts: RpcMetrics, handler: Handler) -> _Codec:
    """A deserializer and a serializer that count.

    The deserializer never raises, so that one bad message does not end a stream.
    """
    decode, encode = handler.request_deserializer, handler.response_serializer
    assert encode is not None, "a handler of messages"

    def decoded(data: bytes) -> Any:
        counts.received += 1
        try:
            return data if decode is None else decode(data)
        except DecodeError as error:
            problem = f"can't be parsed ({error}): is the proto file old?"
            return DecodeFailure("message", problem)
        except InvalidField as error:
            return DecodeFailure(error.field, error.problem)

    def encoded(message: Any) -> bytes:
        if isinstance(message, bytes):  # encoded before it was given to gRPC
            return message
        counts.sent += 1
        data: bytes = encode(message)
        return data

    return decoded, encoded


def _well_formed(message: Any) -> Any:
    """The message.

    Raises:
        InvalidField: it is a `DecodeFailure`.
    """
    if isinstance(message, DecodeFailure):
        raise message.error
    return message


async def _receive(receiver: Receiver, context: Context) -> Any:
    """The next request of an RPC, as bytes; `grpc.aio.EOF`: there are no more."""
    if isinstance(context, Call):  # whose transport has reserved what it received
        return await context.read()
    return await receiver.read(current_peer.get().receiving, context.read)


def _when_done(callback: Callable[[object], None]) -> None:
    """Calls a function when gRPC is done with an RPC, its replies have left: its task ends then.

    `context.add_done_callback` does so too, but with grpcio it makes a reference cycle of each RPC.
    """
    task = asyncio.current_task()
    assert task is not None, "gRPC has one for each RPC"
    task.add_done_callback(callback)


def _refuse(context: Context, error: StepstateError) -> None:
    """Ends the call with an error; gRPC then ignores what the handler returns.

    `context.abort` would raise, and grpcio keeps what it raises: a cycle from the call over
    the frames of its handlers, which keeps a large request alive until the next garbage collection.
    """
    status = status_of(error)
    context.set_code(code_of(error))
    context.set_details(status.message)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))


def _go_name(code: grpc.StatusCode) -> str:
    """A code as go-grpc-middleware labels it: google.golang.org/grpc/codes, Code.String."""
    if code is grpc.StatusCode.OK:
        return "OK"
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    return str(code.name).title().replace("_", "")


def _client_is_there(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC is not just about a reply to a client that has left."""
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))
