"""Around every RPC: its metrics, and errors as statuses.

Every `StepstateError` leaves with its code and details. Anything else that a handler raises becomes
INTERNAL with an id that is also in the log: never UNKNOWN, never a traceback on the wire.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from grpc._cython.cygrpc import ExecuteBatchError

from stepstate.errors import Internal, InvalidField, StepstateError
from stepstate.metrics import Metrics, RpcMetrics
from stepstate.transport.admission import KINDS, LONG, CallAdmission, CallKind
from stepstate.transport.peers import current_peer
from stepstate.transport.status import DETAILS_KEY, code_of, status_of

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from stepstate.transport.peers import Context

    Handler = grpc.RpcMethodHandler[Any, Any]

_GRPC_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


@dataclass(frozen=True, slots=True)
class DecodeFailure:
    """Stands for bytes that are no message of the RPC's type, until they are answered."""

    detail: str

    @property
    def error(self) -> InvalidField:
        """What the client is answered."""
        return InvalidField("message", f"can't be parsed ({self.detail}): is the proto file old?")


def well_formed(message: Any) -> Any:
    """The message.

    Raises:
        InvalidField: it is a `DecodeFailure`.
    """
    if isinstance(message, DecodeFailure):
        raise message.error
    return message


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler once, when its RPC is first called.

    Args:
        metrics: counts the RPCs.
        admission: counts the calls of each peer, and lets long ones wait.
    """

    def __init__(self, metrics: Metrics, admission: CallAdmission) -> None:
        self._metrics = metrics
        self._admission = admission
        self._wrapped: dict[str, Handler | None] = {}

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
        rpc = _Rpc(path, KINDS[method], self._metrics, counts, admission=self._admission)
        # A handler of one request is one of a stream to gRPC: it would read the request before it
        # says whose it is.
        one, many = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        behaviors: tuple[tuple[Any, Any, Any, Any], ...] = (
            (one, handler.unary_unary, rpc.returning, _only_request),
            (many, handler.unary_stream, rpc.writing, _only_request),
            (one, handler.stream_unary, rpc.returning, _all_requests),
            (many, handler.stream_stream, rpc.writing, _all_requests),
        )
        for make, behavior, wrap, requests in behaviors:
            if behavior is not None:
                wrapped: Handler = make(
                    wrap(behavior, requests),
                    rpc.decoder(handler.request_deserializer),
                    rpc.encoder(handler.response_serializer),
                )
                return wrapped
        raise NotImplementedError(f"{path} has no handler")


class _Rpc:
    """Wraps the handler of one RPC."""

    def __init__(
        self,
        path: str,
        kind: CallKind,
        metrics: Metrics,
        counts: RpcMetrics,
        *,
        admission: CallAdmission,
    ) -> None:
        self._path = path
        self._kind = kind
        self._metrics = metrics
        self._counts = counts
        self._admission = admission

    def returning(
        self,
        behavior: Callable[..., Awaitable[Any]],
        read: Callable[[Any, Context], Awaitable[Any]],
    ) -> Callable[..., Any]:
        """Serves handlers that return their one response; `read` gives them their requests."""
        if self._kind is LONG:
            behavior = self._admission.in_turn(behavior)

        async def watched(requests: Any, context: Context) -> Any:
            async with self._watch(context):
                self._admit(context)
                return await behavior(await read(requests, context), context)

        return watched

    def writing(
        self, behavior: Callable[..., Any], read: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[..., Any]:
        """Serves handlers that use `context.write`, and async generators."""
        if inspect.isasyncgenfunction(behavior):

            async def generated(requests: Any, context: Context) -> AsyncIterator[Any]:
                async with self._watch(context):
                    self._admit(context)
                    async for response in behavior(await read(requests, context), context):
                        yield response

            return generated

        async def watched(requests: Any, context: Context) -> None:
            async with self._watch(context):
                self._admit(context)
                await behavior(await read(requests, context), context)

        return watched

    def decoder(self, decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        """A deserializer that counts and never raises.

        gRPC would answer UNKNOWN, and end a stream unseen.
        """
        counts = self._counts

        def decoded(data: bytes) -> Any:
            counts.received += 1
            try:
                return data if decode is None else decode(data)
            except DecodeError as error:
                return DecodeFailure(str(error))

        return decoded

    def encoder(self, encode: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
        """A serializer that counts."""
        counts = self._counts

        def encoded(message: Any) -> bytes:
            counts.sent += 1
            data: bytes = message if encode is None else encode(message)
            return data

        return encoded

    def _admit(self, context: Context) -> None:
        """Begins the call, before its request is read.

        Raises:
            TooManyCalls, MemoryLimit.
        """
        current_peer.set(self._admission.begin(context, self._kind))

    @asynccontextmanager
    async def _watch(self, context: Context) -> AsyncIterator[None]:
        self._counts.started += 1
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, ExecuteBatchError):  # a write to a client that is gone
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except StepstateError as error:
            code = code_of(error)
            self._metrics.refused(error.reason)
            log.info("refused: %s", error, extra={"rpc": self._path, "reason": error.reason})
            _refuse(context, error)
        except Exception:
            internal = Internal(secrets.token_hex(8))
            code = grpc.StatusCode.INTERNAL
            self._metrics.refused(internal.reason)
            log.exception("an RPC failed", extra={"rpc": self._path, "error_id": internal.error_id})
            _refuse(context, internal)
        finally:
            self._counts.handled[_go_name(code)] += 1
            self._counts.seconds.observe(time.perf_counter() - started)


async def _only_request(_: object, context: Context) -> Any:
    """The request of an RPC that has one.

    Raises:
        InvalidField: it can't be parsed, or did not come.
    """
    request = await context.read()
    if request is grpc.aio.EOF:
        raise InvalidField("message", "is missing: the call ended before its request")
    return well_formed(request)


async def _all_requests(_: object, context: Context) -> AsyncIterator[Any]:
    """The requests of an RPC with many, for handlers that do not use `context.read`."""
    return _each_request(context)


async def _each_request(context: Context) -> AsyncIterator[Any]:
    while (request := await context.read()) is not grpc.aio.EOF:
        yield well_formed(request)


def _refuse(context: Context, error: StepstateError) -> None:
    """Ends the call with an error; gRPC then ignores what the handler returns.

    `context.abort` would raise, and gRPC keeps what it raises: a reference cycle from the call over
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
