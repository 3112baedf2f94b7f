"""One RPC: a servicer's method that runs in a task, with the context that `grpc.aio` gives it.

Servicers of `grpc.aio` run here unchanged; where a `Call` differs from grpcio's context, its
docstring says so. One thing is added: a method may hand its messages over to a `MessageSink`
(`Call.attach`), which gets each where it is read, and answers by `Call.send`. That takes no task
and no coroutine for each message.

Rule 1: the task of a call ends when the RPC has: the method is done, and what it sent has left.
Rule 2: an ended call leaves nothing to Python's garbage collector. So it keeps no exception, whose
        traceback leads to frames that lead to the call.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

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

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
else:
    _Context = grpc.aio.ServicerContext

log = logging.getLogger(__name__)

INBOX_BYTES = 8192
"""Of messages that a servicer has not read: beyond it the client is held back, and what it sends
nevertheless is counted (see `memory`)."""
QUEUED_BYTES = 65_536
"""Bytes of responses that wait for a window: beyond it `write` waits."""
WRITES_WITHOUT_PAUSE = 32
"""A servicer that never waits lets others run after so many messages."""

_CODINGS = {
    grpc.Compression.Gzip: (b"gzip", 31),
    grpc.Compression.Deflate: (b"deflate", 15),
}
"""The name of a compression, and what zlib calls its format, with the largest window."""


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
    """Takes the messages of a call where they are read, without a task.

    It is called while the connection is being read, so it returns soon and raises nothing. It may
    call any method of the `Call` that does not wait. Backpressure is its part: `Call.pause` before
    it holds too many requests, and no more `Call.send` once that has returned False, until
    `writable`.
    """

    def received(self, payload: bytes) -> None:
        """A message has come, as bytes: nothing was deserialized."""
        ...

    def half_closed(self) -> None:
        """The last message has come. The method goes on, and ends the call by returning."""
        ...

    def failed(self, error: Exception) -> None:
        """No more messages come: there is no memory for them."""
        ...

    def writable(self) -> None:
        """All that was sent has left, after `Call.send` said that it had not."""
        ...


class _Phase(Enum):
    """How far a call is, and what its context raises from then on."""

    OPEN = None
    ABORTED = (grpc.aio.AbortError, "Locally aborted.")
    """By `abort`; the same text as grpcio's."""
    CONCLUDED = (grpc.aio.UsageError, "RPC already finished.")
    """The method has returned or raised; the same text as grpcio's."""
    CANCELLED = (grpc.aio.InternalError, "the call was cancelled: its client or deadline ended it")
    """From outside, also as a request could not be read."""


class Call(_Context):
    """A call: the `StreamReceiver` of its stream, and the context of its servicer's method.

    Where it differs from grpcio's: `cancelled()` and `done()` are also true when the client or the
    deadline has ended the call; metadata that can't be sent is refused where it is set.

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
        self._phase = _Phase.OPEN
        self._ended = False  # the stream has, in both directions
        self._callbacks: list[Callable[[Any], None]] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._sink: MessageSink | None = None
        # Requests
        self._metadata: Metadata | None = None
        self._inbox: deque[bytes] | None = None  # made when it is needed: most are not
        self._inbox_bytes = 0
        self._half_closed = False
        self._refusal: Exception | None = None  # of the messages that would come next
        self._deserialize: Callable[[bytes], Any] | None = None
        # Responses
        self._started = False
        self._serialize: Callable[[Any], bytes] | None = None
        self._coding: tuple[bytes, int] | None = None
        self._next_plain = False
        self._sent = 0
        self._code: Any = None
        self._details = ""
        self._trailing: Any = ()
        self._trailing_block = b""
        loop = asyncio.get_running_loop()
        self._timer = None if deadline is None else loop.call_at(deadline, self._expire)
        self._task: asyncio.Task[None] | None = loop.create_task(self._run())
        self._task.add_done_callback(self._call_back)
        host.running(self._task)

    # What comes on the stream: see `StreamReceiver`

    def message(self, payload: bytes) -> None:
        """See `StreamReceiver`."""
        if self._sink is not None:
            self._sink.received(payload)
            return
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append(payload)
        self._inbox_bytes += len(payload) + KEPT_BYTES
        if self._inbox_bytes > INBOX_BYTES:
            self._stream.pause()
        self._wake()

    def half_closed(self) -> None:
        """See `StreamReceiver`."""
        self._half_closed = True
        if self._sink is not None:
            self._sink.half_closed()
        self._wake()

    def writable(self) -> None:
        """See `StreamReceiver`."""
        if self._sink is not None:
            self._sink.writable()
        self._wake()

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        """See `StreamReceiver`."""
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if too_large else grpc.StatusCode.INTERNAL
        self._cancel()
        self._finish(code, reason)

    def refused(self, error: Exception) -> None:
        """See `StreamReceiver`."""
        self._refusal = error
        if self._sink is not None:
            self._sink.failed(error)
        self._wake()

    def reset(self) -> None:
        """See `StreamReceiver`."""
        self._cancel()
        self.finished()

    def finished(self) -> None:
        """See `StreamReceiver`."""
        self._ended = True
        self._sink = None
        self._inbox = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _expire(self) -> None:
        self.drop_responses()
        self._cancel()
        self._finish(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _cancel(self) -> None:
        """Cancels the method, unless it has given the call its status already."""
        if self._phase is _Phase.OPEN and self._task is not None:
            self._phase = _Phase.CANCELLED
            self._task.cancel()

    # Messages without tasks

    def attach(self, sink: MessageSink) -> None:
        """Hands all messages over to a sink from now on, those that wait first."""
        self._sink = sink
        while self._inbox and self._sink is not None:
            sink.received(self._inbox.popleft())
        self._inbox, self._inbox_bytes = None, 0
        self._stream.resume()
        if self._refusal is not None:
            sink.failed(self._refusal)
        elif self._half_closed:
            sink.half_closed()

    def detach(self) -> None:
        """Hands no more messages over; those that come wait for `read`."""
        self._sink = None

    def send(self, payload: bytes) -> bool:
        """Sends a response that is bytes already, never compressed. It never waits.

        Returns:
            Whether it has left, or never will as the call has ended; False: it waits for a window,
            and `MessageSink.writable` will say when all has left.
        """
        if not self._started:
            self._start()
        return self._stream.send(payload)

    def pause(self) -> None:
        """Takes no more messages than the client may send already, one window of the stream."""
        self._stream.pause()

    def resume(self) -> None:
        """Takes more messages again."""
        self._stream.resume()

    def drop_responses(self) -> None:
        """Forgets the responses that wait for a window, so that a status does not wait for them.

        A message that was begun stays a part of one. Only `Call` has this.
        """
        self._stream.drop_queue()

    # The context: see `grpc.aio.ServicerContext`

    async def read(self) -> Any:
        """The next request, or `grpc.aio.EOF`.

        Raises:
            grpc.aio.BaseError: the call has ended.
            Exception: there is no memory for it, see `ConnectionMemory.refusal`.
        """
        self._check_open()
        while not self._inbox:
            if self._refusal is not None:
                raise self._refusal
            if self._half_closed:
                return grpc.aio.EOF
            await self._wait()
            self._check_open()
        payload = self._inbox.popleft()
        self._inbox_bytes -= len(payload) + KEPT_BYTES
        if self._stream.paused and self._inbox_bytes <= INBOX_BYTES // 2:
            self._stream.resume()
        return payload if self._deserialize is None else self._deserialize(payload)

    async def write(self, message: Any) -> None:
        """Sends a response, when the client takes it.

        Raises:
            grpc.aio.BaseError: the call has ended.
        """
        self._check_open()
        self._write(message)
        while self._stream.queued_bytes > QUEUED_BYTES:
            await self._wait()
        if not self._sent % WRITES_WITHOUT_PAUSE:
            await asyncio.sleep(0)

    def _write(self, message: Any) -> None:
        payload = message if self._serialize is None else self._serialize(message)
        if not self._started:
            self._start()
        compressed = self._coding is not None and not self._next_plain
        if self._coding is not None and compressed:
            packer = zlib.compressobj(wbits=self._coding[1])
            payload = packer.compress(payload) + packer.flush()
        self._next_plain = False
        self._sent += 1
        self._stream.send(payload, compressed=compressed)

    def _start(self, metadata: bytes = b"") -> None:
        """Sends the headers of the response."""
        self._started = True
        coding = b"" if self._coding is None else literal(b"grpc-encoding", self._coding[0])
        self._stream.start(GRPC_HEADERS + coding + metadata)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Sends the headers of the response.

        Raises:
            grpc.aio.UsageError: they were sent already.
            TypeError, ValueError: it can't be sent.
        """
        self._check_open()
        if self._started:
            raise grpc.aio.UsageError("Send initial metadata failed: already sent")
        self._start(encode_metadata(initial_metadata))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        """Ends the call with a status, at once; OK is no status to abort with: it is UNKNOWN.

        Raises:
            grpc.aio.AbortError: always.
            grpc.aio.UsageError: it was called already.
        """
        if self._phase is _Phase.ABORTED:
            raise grpc.aio.UsageError("Abort already called!")
        self._check_open()
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        self._code, self._details = code, details or self._details
        self._conclude(grpc.StatusCode.UNKNOWN, self._details)
        self._phase = _Phase.ABORTED
        self._check_open()
        raise AssertionError

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """See `abort`."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Sets what ends the call, beside its status.

        Raises:
            TypeError, ValueError: it can't be sent.
        """
        self._trailing_block = encode_metadata(trailing_metadata)
        self._trailing = tuple(trailing_metadata)

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
        """The status that was set; None: none was."""
        return self._code

    def set_details(self, details: str) -> None:
        """Sets the text of the status."""
        self._details = details

    def details(self) -> str:
        """The text that was set."""
        return self._details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Compresses the responses, if the client takes it.

        Raises:
            RuntimeError: the headers were sent already.
        """
        if self._started:
            raise RuntimeError("compression must be set before the initial metadata is sent")
        coding = _CODINGS.get(compression)
        accepted = self._request.field(b"grpc-accept-encoding").replace(b" ", b"").split(b",")
        self._coding = coding if coding is not None and coding[0] in accepted else None

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
        """Calls back, with the context, when the RPC has ended: see rule 1."""
        self._callbacks.append(callback)

    def done(self) -> bool:
        """Whether it has a status, or was cancelled."""
        return self._phase is not _Phase.OPEN

    def cancelled(self) -> bool:
        """Whether the client or the deadline ended it, or the method with that code."""
        return self._phase is _Phase.CANCELLED or self._code == grpc.StatusCode.CANCELLED

    def peer_identities(self) -> Iterable[bytes] | None:
        """Of the client's certificate."""
        key = self.peer_identity_key()
        return None if key is None else self.auth_context().get(key)

    def peer_identity_key(self) -> str | None:
        """Which property of the certificate says who the client is."""
        return identity_key(self.auth_context())

    def _check_open(self) -> None:
        """Stops a method that goes on after the end of its call."""
        if self._phase is not _Phase.OPEN:
            error, text = self._phase.value
            raise error(text)

    # The task

    async def _wait(self) -> None:
        """Waits until something has happened to the call."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def _run(self) -> None:
        try:
            await self._serve()
        except asyncio.CancelledError:
            self._finish(grpc.StatusCode.CANCELLED)
        except Exception as error:  # noqa: BLE001 (whatever a servicer raises becomes a status)
            self._fail(error)
        while not self._ended:
            await self._wait()

    def _fail(self, error: Exception) -> None:
        """A servicer's method raised: the call ends with UNKNOWN, or with the code that was set."""
        if self.done() and isinstance(error, grpc.aio.BaseError):
            return  # of this context: the method went on after the end
        log.error("%s raised", self._path, exc_info=error)
        self._conclude(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")

    def _call_back(self, _task: asyncio.Task[None]) -> None:
        self._task = self._refusal = None
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a callback of %s raised", self._path)
        self._callbacks.clear()

    @property
    def _path(self) -> str:
        return self._request.path.decode("latin-1")

    async def _serve(self) -> None:
        try:
            metadata = self.invocation_metadata()
        except ValueError as error:
            self._finish(grpc.StatusCode.INTERNAL, f"metadata: {error}")
            return
        handler = await self._host.handler(self._path, metadata)
        if handler is None:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            return
        self._deserialize = handler.request_deserializer
        self._serialize = handler.response_serializer
        request: Any = _Requests(self)
        if not handler.request_streaming and (request := await self.read()) is grpc.aio.EOF:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "the call has no request")
            return
        await self._serve_with(handler, request)

    async def _serve_with(self, handler: Handler, request: Any) -> None:
        behavior: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        if handler.response_streaming and inspect.isasyncgenfunction(behavior):
            async with aclosing(behavior(request, self)) as responses:
                async for response in responses:
                    await self.write(response)
        elif not inspect.iscoroutinefunction(behavior):
            log.error("%s is not served: it is no `async def`", self._path)
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")
            return
        else:
            response = await behavior(request, self)
            self._check_open()
            if not handler.response_streaming and not _number(self._code):
                self._write(response)
        self._check_open()
        self._conclude(grpc.StatusCode.OK, self._details)

    def _conclude(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with the code that was set, or with this one."""
        self._finish(self._code if _number(self._code) else code, details, self._trailing_block)

    def _finish(self, code: Any, details: str = "", trailing: bytes = b"") -> None:
        """Ends the call with a status, after the messages before it. Only the first one counts."""
        if self._phase is _Phase.OPEN:
            self._phase = _Phase.CONCLUDED
        block = encode_status(_number(code), details) + trailing
        self._stream.finish(block if self._started else GRPC_HEADERS + block)


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


def _number(code: Any) -> int:
    """The number of a status code that a servicer set; None is OK, and nonsense UNKNOWN."""
    if code is None:
        return 0
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    known = isinstance(number, int) and 0 <= number <= 16
    return int(number) if known else int(grpc.StatusCode.UNKNOWN.value[0])
