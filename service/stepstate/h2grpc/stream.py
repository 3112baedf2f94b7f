"""One HTTP/2 stream of a connection: its windows, its messages in both directions, and its end.

Rule 1: what does not fit into the windows waits in the stream's queue, in order. Whoever sends
        asks `queued_bytes`, and `StreamReceiver.writable` says when the queue is empty.
Rule 2: memory is reserved for what is kept of a message before all of it is here, and for all that
        comes while the receiver has paused the stream (see `memory`).
Rule 3: a stream ends in both directions at once: with trailers, or with RST_STREAM.
"""

from __future__ import annotations

import zlib
from collections import deque
from struct import Struct
from typing import Protocol

from stepstate.h2grpc.errors import StreamFailure
from stepstate.h2grpc.frames import (
    DEFAULT_FRAME_BYTES,
    LARGEST_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    data_header,
    frame,
    rst_stream,
    window_update,
)
from stepstate.h2grpc.limits import Cost, Earning, Http2Limits, WorkMeter
from stepstate.h2grpc.memory import ConnectionMemory, PartialMessages

PREFIX_BYTES = 5
"""Before every gRPC message: one byte that says whether it is compressed, and its length."""
KEPT_BYTES = 64
"""What a message takes in memory beside its payload."""
TINY_PIECE = 256
"""Bytes: a piece of a message that is shorter costs more than it moves."""
FREE_PIECES = 2
"""Tiny pieces of a message that are received for nothing, such as its prefix alone."""
PROGRESS_BYTES = 4096
"""What a stream that waits for a window has to send in some time, or all it has: one byte is no
progress."""

_PREFIX = Struct(">BI")
_MESSAGE = Struct(">IBIBI").pack  # a DATA frame with one whole message: its header, and the prefix
_GZIP_OR_ZLIB = 47  # zlib's name for both formats, whichever comes (gRPC's "deflate" is zlib's)


class StreamReceiver(Protocol):
    """Takes what comes on a stream. It raises nothing, and may end the stream at any time."""

    def message(self, payload: bytes) -> None:
        """A whole message has come."""
        ...

    def half_closed(self) -> None:
        """The last message has come."""
        ...

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        """What has come is no message: too large, of an unknown coding, or damaged."""
        ...

    def refused(self, error: Exception) -> None:
        """There is no memory for what has come: no more messages follow."""
        ...

    def reset(self) -> None:
        """The stream has ended without a status: by the other side, or with the connection."""
        ...

    def writable(self) -> None:
        """All that was sent has left the queue."""
        ...

    def finished(self) -> None:
        """The trailers have left, and with them the stream has ended."""
        ...


class SilentReceiver:
    """A `StreamReceiver` that does nothing."""

    __slots__ = ()

    def message(self, payload: bytes) -> None:
        """See `StreamReceiver`."""

    def half_closed(self) -> None:
        """See `StreamReceiver`."""

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        """See `StreamReceiver`."""

    def refused(self, error: Exception) -> None:
        """See `StreamReceiver`."""

    def reset(self) -> None:
        """See `StreamReceiver`."""

    def writable(self) -> None:
        """See `StreamReceiver`."""

    def finished(self) -> None:
        """See `StreamReceiver`."""


_SILENT = SilentReceiver()


class Sender(Protocol):
    """The connection, as its streams see it."""

    limits: Http2Limits
    meter: WorkMeter
    memory: ConnectionMemory
    partial: PartialMessages
    """The messages that have not come whole."""
    send_window: int
    """Bytes that may be sent now, on all streams together: as far as the other side and the socket
    take them."""
    peer_frame_bytes: int
    """The longest payload of a frame that the other side takes."""
    sent_messages: int
    sent_others: int
    """HEADERS, and pieces of messages; a client may ping after each."""
    block_prefix: bytes
    """What the next header block must begin with."""
    cut_messages: int
    """Messages of the bytes that are taken now that had no frame of their own."""

    def send(self, *data: bytes | memoryview) -> None:
        """Puts bytes into the output."""
        ...

    def block(self, stream: Http2Stream) -> None:
        """The stream has something to send, and waits for a window, or may send it now."""
        ...

    def forget(self, stream: Http2Stream, *, early: bool) -> None:
        """The stream has ended; early: the other side may not know it yet."""
        ...


class Http2Stream:
    """One stream.

    Args:
        stream_id: its number.
        sender: the connection.
        send_window: bytes that the other side takes at first.
        content_length: bytes that it says it sends; None: it does not say.
    """

    __slots__ = (
        "_content_left",
        "_discarding",
        "_ending",
        "_kept",
        "_kept_rest",
        "_message_bytes",
        "_partial",
        "_queue",
        "_reserved",
        "_rest",
        "_sender",
        "_started",
        "_tiny_pieces",
        "id",
        "inflates",
        "open_in",
        "open_out",
        "paused",
        "plain",
        "progress",
        "queued_bytes",
        "receive_window",
        "receiver",
        "send_window",
    )

    receiver: StreamReceiver
    """Takes what comes; the connection sets it before anything can."""

    def __init__(
        self, stream_id: int, sender: Sender, send_window: int, content_length: int | None
    ) -> None:
        self.id = stream_id
        self.open_in = True
        self.open_out = True
        self.inflates = False
        """Whether messages may be compressed: by gzip or deflate."""
        self.paused = False
        self.plain = content_length is None
        """Whether a DATA frame with one whole message needs no more than to be handed over."""
        self.queued_bytes = 0
        """Bytes that wait for a window."""
        self.progress = 0
        """Bytes that have waited for a window and were sent; an empty queue counts as
        PROGRESS_BYTES."""
        self.receive_window = sender.limits.stream_window
        """Bytes that the other side may still send."""
        self.send_window = send_window
        """Bytes that may be sent now; below 0 after the other side has lowered it."""
        self._sender = sender
        self._discarding = False  # what comes is no message
        self._started = False
        self._queue: deque[memoryview] | None = None  # made when it is needed: most are not
        self._ending: bytes | None = None
        self._partial: bytearray | None = None
        self._message_bytes = 0  # of the message in `_partial`, with its prefix; 0: not known
        self._reserved = 0  # for the message in `_partial`, within the window
        self._rest = 0  # the same, beyond it
        self._kept = 0  # reserved for messages that the receiver was given, until it resumes
        self._kept_rest = 0
        self._tiny_pieces = 0  # of the message in `_partial`
        self._content_left = content_length

    # Sending

    @property
    def answered(self) -> bool:
        """Whether the response has begun."""
        return self._started

    def start(self, block: bytes) -> None:
        """Sends the headers of the response, once."""
        if not self._started and self.open_out:
            self._started = True
            self._send_block(block, 0)

    def send(self, payload: bytes, *, compressed: bool = False) -> bool:
        """Sends a message, after the headers; returns False if it waits for a window."""
        size = len(payload) + PREFIX_BYTES
        sender = self._sender
        if (
            size <= self.send_window
            and size <= sender.send_window
            and size <= sender.peer_frame_bytes
            and not self._queue
        ):
            self.send_window -= size
            sender.send_window -= size
            sender.sent_messages += 1
            header = _MESSAGE(size << 8, 0, self.id, compressed, size - PREFIX_BYTES)
            sender.send(header, payload)
            return True
        if self.open_out and self._ending is None:
            self._enqueue(memoryview(_PREFIX.pack(compressed, len(payload)) + payload))
            sender.sent_messages += 1
            sender.block(self)
        return not self.queued_bytes

    def answer(self, block: bytes, body: bytes) -> None:
        """Ends the stream with a response that is not gRPC's, of a few bytes."""
        if not self.open_out:
            return
        self.start(block)
        self._enqueue(memoryview(body))
        self._ending = b""
        self._sender.block(self)

    def _enqueue(self, data: memoryview) -> None:
        if self._queue is None:
            self._queue = deque()
        self._queue.append(data)
        self.queued_bytes += len(data)

    def finish(self, trailers: bytes) -> None:
        """Ends the stream with a header block, after the messages before it."""
        if self.open_out and self._ending is None:
            self._ending = trailers
            if not self._queue:
                self._end()

    def reset(self, code: ErrorCode) -> None:
        """Ends the stream at once, and tells its receiver."""
        if self.open_in or self.open_out:
            self._sender.send(rst_stream(self.id, code))
            self.close(early=True).reset()

    def drop_queue(self) -> None:
        """Forgets what waits, a status too; a message that was begun goes with its stream."""
        self._ending = None
        self._queue = None
        self.queued_bytes = 0

    def send_piece(self) -> bool:
        """Sends one frame of what waits; returns whether it could go on at once."""
        sender, queue = self._sender, self._queue
        room = min(self.send_window, sender.send_window, sender.peer_frame_bytes)
        if not queue or room <= 0:
            return False
        piece = queue.popleft()
        if len(piece) > room:
            queue.appendleft(piece[room:])
            piece = piece[:room]
        size = len(piece)
        last = Flag.END_STREAM if not queue and self._ending == b"" else 0
        if size >= TINY_PIECE:
            sender.meter.earn(Earning.MESSAGE)
        elif queue:
            sender.meter.spend(Cost.PIECE)
        self.queued_bytes -= size
        self.send_window -= size
        sender.send_window -= size
        sender.sent_others += 1
        self.progress += size if queue else PROGRESS_BYTES
        sender.send(data_header(size, last, self.id), piece)
        if queue:
            return self.send_window > 0
        if self._ending is not None:
            self._end()
        else:
            self.receiver.writable()
        return False

    def _end(self) -> None:
        if self._ending:
            if not self._discarding:
                self._sender.meter.earn(Earning.CALL)
            self._send_block(self._ending, Flag.END_STREAM)
        early = self.open_in
        if early:  # the other side need not send the rest (RFC 9113, section 8.1)
            self._sender.send(rst_stream(self.id, ErrorCode.NO_ERROR))
        self.close(early=early).finished()

    def _send_block(self, block: bytes, flags: int) -> None:
        """Sends a header block in as many frames as it takes."""
        sender = self._sender
        block, sender.block_prefix = sender.block_prefix + block, b""
        sender.sent_others += 1
        longest = min(sender.peer_frame_bytes, DEFAULT_FRAME_BYTES)
        kind = FrameType.HEADERS
        for first in range(0, len(block), longest):
            part = block[first : first + longest]
            last = Flag.END_HEADERS if first + longest >= len(block) else 0
            sender.send(frame(kind, flags | last, self.id, part))
            kind, flags = FrameType.CONTINUATION, 0

    # Receiving

    def receive(self, data: bytes, flow_bytes: int) -> None:
        """Takes the data of a DATA frame, which took `flow_bytes` of the window.

        Raises:
            StreamFailure: it is more than was allowed, or than was announced.
        """
        self.receive_window -= flow_bytes
        if self.receive_window < 0:
            raise StreamFailure(ErrorCode.FLOW_CONTROL_ERROR)
        if self._content_left is not None:
            self._content_left -= len(data)
            if self._content_left < 0:
                raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        if data and not self._discarding:
            self._cut(data)
        self.replenish()

    def end_receiving(self) -> None:
        """The other side has sent its last frame.

        Raises:
            StreamFailure: it had announced more.
        """
        if self._content_left:
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        self.open_in = self.plain = False
        if self._partial is not None:
            self._fail("the stream ends within a message")
        elif not self.open_out:
            self.close(early=False)
        else:
            self.receiver.half_closed()

    def replenish(self) -> None:
        """Lets the other side send more, when half of what it may send is used."""
        if not self.open_in or self.paused or self.missing_bytes > 0:
            return
        target = self._sender.limits.stream_window
        if self._partial is not None:
            target = max(target, self._message_bytes - len(self._partial))
        if self.receive_window <= target // 2:
            self._sender.send(window_update(self.id, target - self.receive_window))
            self._sender.sent_others += 1
            self.receive_window = target

    def pause(self) -> None:
        """Takes no more from the other side than its window allows already."""
        self.paused = True
        self.plain = False  # what still comes is counted

    def discard(self) -> None:
        """Takes no messages from what still comes, and no more than the window allows."""
        self._discarding = self.paused = True
        self.plain = False

    def resume(self) -> None:
        """Takes more again: the receiver is done with the messages that it was given."""
        if self._discarding:
            return
        self.paused = False
        self._release_kept()
        if self._partial is not None:
            if self.missing_bytes > 0:
                self._sender.partial.want_rest(self)
        else:
            self.plain = self.open_in and self._content_left is None
        self.replenish()

    def close(self, *, early: bool) -> StreamReceiver:
        """Forgets the stream, and its receiver, which it returns: nobody has told it yet.

        The receiver has the stream: they must be no reference cycle after the end.
        """
        self.open_in = self.open_out = self.plain = False
        self.send_window = -LARGEST_WINDOW
        self._queue = None
        self.queued_bytes = 0
        self._drop_partial()
        self._release_kept()
        self._sender.forget(self, early=early)
        receiver, self.receiver = self.receiver, _SILENT
        return receiver

    def _cut(self, data: bytes) -> None:
        """Hands over the messages that are whole, and keeps the rest."""
        buffer = self._partial
        if buffer is None:
            buffer = self._partial = bytearray()
            self.plain = False
        buffer += data
        while self.open_in and not self._discarding and len(buffer) >= PREFIX_BYTES:
            compressed, size = _PREFIX.unpack_from(buffer)
            if size > self._sender.limits.message_bytes:
                self._fail(
                    f"a message has {size} bytes, at most {self._sender.limits.message_bytes} are "
                    "allowed",
                    too_large=True,
                )
                return
            self._message_bytes = PREFIX_BYTES + size
            if len(buffer) < self._message_bytes:
                self._count_piece(data)
                self._reserve()
                return
            payload = bytes(memoryview(buffer)[PREFIX_BYTES : self._message_bytes])
            del buffer[: self._message_bytes]
            self._tiny_pieces = 0
            self._deliver(payload, compressed)
        if not buffer and not self._discarding:
            self._partial = None
            self.plain = self.open_in and not self.paused and self._content_left is None

    def _count_piece(self, data: bytes) -> None:
        """Charges tiny pieces of messages, but for the few that an odd client makes of each."""
        if len(data) < TINY_PIECE:
            self._tiny_pieces += 1
            if self._tiny_pieces > FREE_PIECES:
                self._sender.meter.charge(Cost.FRAME)

    def _deliver(self, payload: bytes, compressed: int) -> None:
        if compressed:
            if not self.inflates or compressed != 1:
                self._fail("a message is compressed, and its coding is not known")
                return
            inflated = inflate(payload, self._sender.limits.message_bytes)
            if inflated is None:
                self._fail("a compressed message is damaged, or inflates to too many bytes")
                return
            payload = inflated
        if (self.paused or compressed) and not self._reserve_more(len(payload) + KEPT_BYTES):
            return
        if self._reserved:
            self._kept += self._reserved
            self._kept_rest += self._rest
            self._end_partial()
        self._message_bytes = 0
        self._sender.cut_messages += 1
        self.receiver.message(payload)
        if not self.paused:
            self._release_kept()

    # Memory

    @property
    def received_bytes(self) -> int:
        """See `PartialMessage`."""
        return len(self._partial or b"")

    @property
    def missing_bytes(self) -> int:
        """See `PartialMessage`."""
        return self._message_bytes - self._reserved - self._rest

    def receive_rest(self) -> None:
        """See `PartialMessage`."""
        self._rest = self._message_bytes - self._reserved
        self.replenish()

    def refuse(self) -> None:
        """See `PartialMessage`: takes nothing more of what comes."""
        error = self._sender.memory.refusal(self._message_bytes)
        self._drop_partial()
        self.discard()
        self.receiver.refused(error)

    def _reserve(self) -> None:
        """Reserves memory for the message of which a part is here."""
        if not self._reserved:
            size = min(self._message_bytes, self._sender.limits.stream_window)
            if not self._sender.partial.begin(self, size):
                self.refuse()
                return
            self._reserved = size
        if self.missing_bytes > 0 and not self.paused:
            self._sender.partial.want_rest(self)

    def _reserve_more(self, size: int) -> bool:
        """Reserves memory for the message that is whole; False: the stream has failed."""
        more = size - self._reserved - self._rest
        if more > 0:
            if not self._sender.memory.reserve(more):
                self.refuse()
                return False
            self._reserved += more
        return True

    def _end_partial(self) -> None:
        self._reserved = self._rest = self._message_bytes = 0
        self._sender.partial.end(self)

    def _drop_partial(self) -> None:
        self._partial = None
        if self._reserved:
            self._sender.memory.release(self._reserved, self._rest)
            self._end_partial()

    def _release_kept(self) -> None:
        if self._kept:
            kept, rest = self._kept, self._kept_rest
            self._kept = self._kept_rest = 0
            self._sender.memory.release(kept, rest)

    def _fail(self, reason: str, *, too_large: bool = False) -> None:
        """Takes nothing more of what comes: the receiver ends the call, and its client pays."""
        self._drop_partial()
        self.discard()
        self._sender.meter.charge(Cost.RESET)
        self.receiver.unreadable(reason, too_large=too_large)


def inflate(data: bytes, limit: int) -> bytes | None:
    """The bytes of a compressed message; None: it is damaged, or they are more than `limit`."""
    unzip = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = unzip.decompress(data, limit + 1)
    except zlib.error:
        return None
    whole = unzip.eof and not unzip.unused_data and len(plain) <= limit
    return plain if whole else None
