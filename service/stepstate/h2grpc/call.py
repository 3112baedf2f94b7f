"""One RPC: a servicer's method that runs in a task, with the context that `grpc.aio` gives it.

Its behaviour is that of `grpc.aio`, whose servicers run here unchanged. There is one thing more: a
method may hand the messages over to a `MessageSink` (`Call.attach`), which then gets each where it
is read, and answers by `Call.send`. That takes no task and no coroutine for each message.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

import grpc

from stepstate.h2grpc.headers import (
    GRPC_HEADERS,
    Metadata,
    Request,
    encode_metadata,
    encode_status,
    literal,
    metadata_of,
)
from stepstate.h2grpc.stream import KEPT_BYTES, Http2Stream
from stepstate.h2grpc.tls import identity_key

log = logging.getLogger(__name__)

INBOX_BYTES = 8192
"""Of messages that a servicer has not read: beyond it the client is held back, and what it sends
nevertheless is counted (see `memory`)."""
QUEUED_BYTES = 65_536
"""Bytes of responses that wait for a window: beyond it `write` waits."""
WRITES_WITHOUT_PAUSE = 32
"""A servicer that never waits lets others run after so many messages."""

Handler = Any
"""A `grpc.RpcMethodHandler`, whose attributes its stubs do not name."""
_GZIP = 31  # zlib's name for gzip's format, with the largest window


class CallHost(Protocol):
    """The connection of a call, as the call sees it."""

    @property
    def peer(self) -> str:
        """The client's address, as gRPC names it."""
        ...

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What is known of the client by TLS."""
        ...

    async def handler(self, path: str, metadata: Metadata) -> Handler | None:
        """The handler of a method, through the interceptors; None: there is none."""
        ...

    def running(self, task: asyncio.Task[None]) -> None:
        """The task of a call begins."""
        ...


class MessageSink(Protocol):
    """Takes the messages of a call where they are read. It raises nothing."""

    def received(self, payload: bytes) -> None:
        """A message has come."""
        ...

    def half_closed(self) -> None:
        """The last message has come."""
        ...

    def failed(self, error: Exception) -> None:
        """No more messages come: there is no memory for them."""
        ...

    def writable(self) -> None:
        """All that was sent has left, after `Call.send` said that it had not."""
        ...


class Call(grpc.aio.ServicerContext):  # type: ignore[type-arg]
    """A call: the `StreamReceiver` of its stream, and the context of its servicer's method.

    Args:
        stream: its stream.
        request: its headers.
        host: its connection.
        deadline: `loop.time()` at which it ends; None: never.
    """

    def __init__(
        self, stream: Http2Stream, request: Request, host: CallHost, deadline: float | None
    ) -> None:
        self._stream = stream
        self._request = request
        self._host = host
        self._deadline = deadline
        self._started = False
        self._compress = False
        self._done = False
        self._callbacks: list[Callable[[Any], None]] = []
        self._sink: MessageSink | None = None
        self._metadata: Metadata | None = None
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._peer_ended = False
        self._refusal: Exception | None = None  # of the messages that would come next
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._deserialize: Callable[[bytes], Any] | None = None
        self._serialize: Callable[[Any], bytes] | None = None
        self._next_plain = False
        self._sent = 0
        self._code: Any = None
        self._details = ""
        self._trailing: Any = ()
        loop = asyncio.get_running_loop()
        self._timer = None if deadline is None else loop.call_at(deadline, self._expire)
        self._task = loop.create_task(self._run())
        host.running(self._task)

    # What comes on the stream: see `StreamReceiver`

    def message(self, payload: bytes) -> None:
        """See `StreamReceiver`."""
        if self._sink is not None:
            self._sink.received(payload)
            return
        self._inbox.append(payload)
        self._inbox_bytes += len(payload) + KEPT_BYTES
        if self._inbox_bytes > INBOX_BYTES:
            self._stream.pause()
        _wake(self._reader)

    def half_closed(self) -> None:
        """See `StreamReceiver`."""
        self._peer_ended = True
        if self._sink is not None:
            self._sink.half_closed()
        _wake(self._reader)

    def writable(self) -> None:
        """See `StreamReceiver`."""
        if self._sink is not None:
            self._sink.writable()
        _wake(self._writer)

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        """See `StreamReceiver`."""
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if too_large else grpc.StatusCode.INTERNAL
        self._finish(code, reason)
        self._task.cancel()

    def refused(self, error: Exception) -> None:
        """See `StreamReceiver`."""
        self._refusal = error
        if self._sink is not None:
            self._sink.failed(error)
        _wake(self._reader)

    def reset(self) -> None:
        """See `StreamReceiver`."""
        self._task.cancel()
        self.finished()

    def finished(self) -> None:
        """See `StreamReceiver`."""
        if self._done:
            return
        self._done = True
        self._sink = None
        self._inbox.clear()
        _wake(self._writer)
        if self._timer is not None:
            self._timer.cancel()
        for callback in self._callbacks:
            callback(self)
        self._callbacks.clear()

    def _expire(self) -> None:
        self._stream.drop_queue()
        self._finish(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        self._task.cancel()

    # Messages without tasks

    def attach(self, sink: MessageSink) -> None:
        """Hands all messages over to a sink from now on, those that wait first."""
        self._sink = sink
        while self._inbox and self._sink is not None:
            sink.received(self._inbox.popleft())
        self._inbox_bytes = 0
        self._stream.resume()
        if self._refusal is not None:
            sink.failed(self._refusal)
        elif self._peer_ended:
            sink.half_closed()

    def detach(self) -> None:
        """Hands no more messages over."""
        self._sink = None

    def send(self, payload: bytes) -> bool:
        """Sends a response that is bytes already.

        Returns:
            Whether it has left; False: it waits for a window, and `MessageSink.writable` will say
            when all has left.
        """
        if not self._started:
            self.start()
        return self._stream.send(payload)

    def pause(self) -> None:
        """Takes no more messages than the client may send already."""
        self._stream.pause()

    def resume(self) -> None:
        """Takes more messages again."""
        self._stream.resume()

    # The context: see `grpc.aio.ServicerContext`

    async def read(self) -> Any:
        """The next request, or `grpc.aio.EOF`."""
        while not self._inbox:
            if self._refusal is not None:
                raise self._refusal
            if self._peer_ended:
                return grpc.aio.EOF
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        payload = self._inbox.popleft()
        self._inbox_bytes -= len(payload) + KEPT_BYTES
        if self._stream.paused and self._inbox_bytes <= INBOX_BYTES // 2:
            self._stream.resume()
        return payload if self._deserialize is None else self._deserialize(payload)

    async def write(self, message: Any) -> None:
        """Sends a response, when the client takes it."""
        self._write(message)
        while self._stream.queued_bytes > QUEUED_BYTES:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        if not self._sent % WRITES_WITHOUT_PAUSE:
            await asyncio.sleep(0)

    def _write(self, message: Any) -> None:
        payload = message if self._serialize is None else self._serialize(message)
        if not self._started:
            self.start()
        compressed = self._compress and not self._next_plain
        if compressed:
            packer = zlib.compressobj(wbits=_GZIP)
            payload = packer.compress(payload) + packer.flush()
        self._next_plain = False
        self._sent += 1
        self._stream.send(payload, compressed=compressed)

    def start(self, metadata: Any = ()) -> None:
        """Sends the headers of the response, once."""
        self._started = True
        block = GRPC_HEADERS
        if self._compress:
            block += literal(b"grpc-encoding", b"gzip")
        self._stream.start(block + encode_metadata(metadata or ()))

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Sends the headers of the response."""
        if self._started:
            raise RuntimeError("the initial metadata was sent already")
        self.start(initial_metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        """Ends the call with a status."""
        if trailing_metadata:
            self._trailing = trailing_metadata
        self._code, self._details = code, details
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """Ends the call with a status."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets what ends the call, beside its status."""
        self._trailing = trailing_metadata

    def trailing_metadata(self) -> Any:
        """What was set."""
        return self._trailing

    def invocation_metadata(self) -> Any:
        """What the client sent with its call."""
        if self._metadata is None:
            self._metadata = metadata_of(self._request.fields)
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status of the call."""
        self._code = code

    def code(self) -> Any:
        """The status that was set."""
        return self._code

    def set_details(self, details: str) -> None:
        """Sets the text of the status."""
        self._details = details

    def details(self) -> str:
        """The text that was set."""
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Compresses the responses, if it is gzip and the client takes it."""
        if self._started:
            raise RuntimeError("the initial metadata was sent already")
        accepted = b"gzip" in self._request.field(b"grpc-accept-encoding")
        self._compress = accepted and compression == grpc.Compression.Gzip

    def disable_next_message_compression(self) -> None:
        """Sends the next response as it is."""
        self._next_plain = True

    def peer(self) -> str:
        """The client's address."""
        return self._host.peer

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What is known of the client by TLS."""
        return self._host.auth_context()

    def time_remaining(self) -> float | None:  # type: ignore[override]
        """Seconds until the deadline; None: there is none."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Calls back when the call has ended, and what it sent has left."""
        if self._done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def done(self) -> bool:
        """Whether it has ended."""
        return self._done

    def peer_identities(self) -> Iterable[bytes] | None:
        """Of the client's certificate."""
        key = self.peer_identity_key()
        return None if key is None else self.auth_context().get(key)

    def peer_identity_key(self) -> str | None:
        """Which property of the certificate says who the client is."""
        return identity_key(self.auth_context())

    def cancelled(self) -> bool:
        """Whether its task was told to end."""
        return self._task.cancelled()

    # The task

    async def _run(self) -> None:
        try:
            await self._serve()
        except grpc.aio.AbortError:
            self._conclude(grpc.StatusCode.UNKNOWN, self._details)
        except asyncio.CancelledError:
            self._finish(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            log.exception("a servicer's method raised")
            self._conclude(
                grpc.StatusCode.UNKNOWN, self._details or f"Unexpected {type(error)}: {error}"
            )

    async def _serve(self) -> None:
        try:
            metadata = self.invocation_metadata()
        except ValueError as error:
            self._finish(grpc.StatusCode.INTERNAL, f"metadata: {error}")
            return
        handler = await self._host.handler(self._request.path.decode("latin-1"), metadata)
        if handler is None:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            return
        self._deserialize = handler.request_deserializer
        self._serialize = handler.response_serializer
        request: Any = _Requests(self)
        if not handler.request_streaming and (request := await self.read()) is grpc.aio.EOF:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "the call has no request")
            return
        if handler.response_streaming:
            await self._write_all(handler.stream_stream or handler.unary_stream, request)
        else:
            response = await (handler.stream_unary or handler.unary_unary)(request, self)
            if self._code in (None, grpc.StatusCode.OK, 0):
                self._write(response)
        self._conclude(grpc.StatusCode.OK, self._details)

    async def _write_all(self, behavior: Callable[..., Any], request: Any) -> None:
        """Runs a method with many responses: a generator, or one that uses `write`."""
        if inspect.isasyncgenfunction(behavior):
            async for response in behavior(request, self):
                await self.write(response)
        else:
            await behavior(request, self)

    def _finish(self, code: Any = 0, details: str = "", trailing: Any = ()) -> None:
        """Ends the call with a status, after the messages before it."""
        number: int = code.value[0] if isinstance(code, grpc.StatusCode) else int(code)
        try:
            block = encode_status(number, details) + encode_metadata(trailing or ())
        except (ValueError, UnicodeEncodeError) as error:
            block = encode_status(13, f"trailing metadata: {error}")
        self._stream.finish(block if self._started else GRPC_HEADERS + block)

    def _conclude(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with the status that was set, or with this one."""
        self._finish(self._code or code, details, self._trailing)


class _Requests:
    """The requests of a call with many, for servicers that iterate over them."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        request = await self._call.read()
        if request is grpc.aio.EOF:
            raise StopAsyncIteration
        return request


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
