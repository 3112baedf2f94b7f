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
    """Wraps each handler once, when its RPC is first called."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._wrapped: dict[str, Handler | None] = {}

    def expect(self, methods: Iterable[MethodDescriptor]) -> None:
        """Makes the metrics of RPCs before any is called."""
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
        rpc = _Rpc(path, self._metrics, self._metrics.rpc(kind, service, method))
        behaviors: tuple[tuple[Any, Any, Any], ...] = (
            (grpc.unary_unary_rpc_method_handler, handler.unary_unary, well_formed),
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream, None),
            (grpc.stream_unary_rpc_method_handler, handler.stream_unary, _all_well_formed),
            (grpc.stream_stream_rpc_method_handler, handler.stream_stream, None),
        )
        for make, behavior, check in behaviors:
            if behavior is not None:
                wrapped: Handler = make(
                    rpc.unary(behavior, check) if check else rpc.stream(behavior),
                    rpc.decoder(handler.request_deserializer),
                    rpc.encoder(handler.response_serializer),
                )
                return wrapped
        raise NotImplementedError(f"{path} has no handler")


class _Rpc:
    """Wraps the handler of one RPC."""

    def __init__(self, path: str, metrics: Metrics, counts: RpcMetrics) -> None:
        self._path = path
        self._metrics = metrics
        self._counts = counts

    def unary(
        self, behavior: Callable[..., Awaitable[Any]], check: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        """Serves handlers that return their one response."""

        async def watched(request: Any, context: Context) -> Any:
            async with self._watch(context):
                return await behavior(check(request), context)

        return watched

    def stream(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        """Serves handlers that use `context.read` and `write`, and async generators."""
        if inspect.isasyncgenfunction(behavior):

            async def generated(requests: Any, context: Context) -> AsyncIterator[Any]:
                async with self._watch(context):
                    async for response in behavior(_all_well_formed(requests), context):
                        yield response

            return generated

        async def watched(requests: Any, context: Context) -> None:
            async with self._watch(context):
                await behavior(requests, context)

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


async def _all_well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
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
