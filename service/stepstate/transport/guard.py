"""What surrounds every RPC: its metrics, and errors as statuses.

Every `StepstateError` leaves with its code and details. Everything else that
a handler raises becomes INTERNAL with an id that is also in the log: never
UNKNOWN, never a traceback on the wire.
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
from stepstate.transport.status import DETAILS_KEY, code_of, status_of

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


class Guard(grpc.aio.ServerInterceptor):
    """Wraps each handler once, when its RPC is first called."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._wrapped: dict[str, Handler | None] = {}

    def expect(self, methods: Iterable[MethodDescriptor]) -> None:
        """Makes the series of RPCs, before any is called."""
        for method in methods:
            kind = _KINDS[method.client_streaming, method.server_streaming]
            self._metrics.rpc(kind, method.containing_service.full_name, method.name)

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
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        guarded = _GuardedRpc(path, self._metrics, self._metrics.rpc(kind, service, method))
        behaviors: tuple[tuple[Any, Any, Any], ...] = (
            (grpc.unary_unary_rpc_method_handler, handler.unary_unary, guarded.unary),
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream, guarded.stream),
            (grpc.stream_stream_rpc_method_handler, handler.stream_stream, guarded.stream),
        )
        for make, behavior, guard in behaviors:
            if behavior is not None:
                decode = _tolerant(handler.request_deserializer)
                wrapped: Handler = make(guard(behavior), decode, handler.response_serializer)
                return wrapped
        raise NotImplementedError(f"{path} streams requests only: give it a guard first")


class _GuardedRpc:
    """The guard of one RPC."""

    def __init__(self, path: str, metrics: Metrics, rpc: RpcMetrics) -> None:
        self._path = path
        self._metrics = metrics
        self._rpc = rpc

    def unary(self, behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        async def guarded(request: Any, context: Context) -> Any:
            async with self._watch(context):
                self._rpc.received += 1
                response = await behavior(_well_formed(request), context)
                self._rpc.sent += 1
                return response

        return guarded

    def stream(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        """Serves handlers that use `context.read` and `write`, and async generators."""
        if inspect.isasyncgenfunction(behavior):

            async def generated(requests: Any, context: Context) -> AsyncIterator[Any]:
                async with self._watch(context):
                    async for response in behavior(self._counted(requests), context):
                        self._rpc.sent += 1
                        yield response

            return generated

        async def guarded(requests: Any, context: Context) -> None:
            async with self._watch(context):
                await behavior(requests, CountingContext(context, self._rpc))

        return guarded

    async def _counted(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._rpc.received += 1
            yield _well_formed(request)

    @asynccontextmanager
    async def _watch(self, context: Context) -> AsyncIterator[None]:
        self._rpc.started += 1
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except StepstateError as error:
            code = code_of(error)
            self._metrics.refused(error.reason)
            log.info("refused: %s", error, extra={"rpc": self._path, "reason": error.reason})
            _refuse(context, error)
        except Exception:
            surprise = Internal(secrets.token_hex(8))
            code = grpc.StatusCode.INTERNAL
            self._metrics.refused(surprise.reason)
            log.exception("an RPC failed", extra={"rpc": self._path, "error_id": surprise.error_id})
            _refuse(context, surprise)
        finally:
            self._rpc.handled[_go_name(code)] += 1
            self._rpc.seconds.observe(time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for bytes that are no message of the RPC's type."""

    detail: str


def _tolerant(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """A deserializer that never raises: gRPC would answer UNKNOWN, and end a stream unseen."""

    def tolerant(data: bytes) -> Any:
        try:
            return data if decode is None else decode(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return tolerant


def _well_formed(message: Any) -> Any:
    if isinstance(message, _Malformed):
        raise InvalidField("message", f"can't be parsed ({message.detail}): is the proto file old?")
    return message


class CountingContext:
    """A context whose messages are counted; the rest of a context is not needed by streams."""

    def __init__(self, context: Context, rpc: RpcMetrics) -> None:
        self._context = context
        self._rpc = rpc

    async def read(self) -> Any:
        """The next message, or `grpc.aio.EOF`.

        Raises:
            InvalidField: bytes came that are no message; the next read goes on after them.
        """
        try:
            message = await self._context.read()
        except ExecuteBatchError:
            raise asyncio.CancelledError from None  # the client is gone
        if message is not grpc.aio.EOF:
            self._rpc.received += 1
        return _well_formed(message)

    async def write(self, message: Any) -> None:
        """Sends a message."""
        self._rpc.sent += 1
        try:
            await self._context.write(message)
        except ExecuteBatchError:
            raise asyncio.CancelledError from None  # the client is gone


def _refuse(context: Context, error: StepstateError) -> None:
    """Ends the call with an error; gRPC then ignores what the handler returns.

    `context.abort` would raise, and gRPC keeps what it raises: a cycle from the
    call over the frames of its handlers, in which a large request stays alive
    until the garbage collector comes by.
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
