"""One HTTP/2 connection from the server's side: bytes in, bytes out, and no I/O (RFC 9113).

`receive` takes what was read, calls the receivers of the streams, and leaves what is to be written
in the output, which `take_output` returns. Whoever owns the connection is its `Host`.

The frame that matters, a DATA frame with exactly one whole message, is taken in the loop of
`receive` itself, and so are WINDOW_UPDATEs, of which some clients send three for each message that
they read. Every other frame goes through the table `_HANDLERS`.

Faults of one stream end that stream, faults of the connection end it with GOAWAY. What a client can
repeat at no cost to itself is charged (see `limits`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from struct import Struct
from typing import ClassVar, Protocol

from stepstate.h2grpc.blocks import HeaderBlock, HeaderReader, depends_on_itself
from stepstate.h2grpc.errors import ConnectionFailure, HeadersTooLong, StreamFailure
from stepstate.h2grpc.frames import (
    CLIENT_PREFACE,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    HEADER_BYTES,
    HTTP_1_RESPONSE,
    LARGEST_FRAME_BYTES,
    LARGEST_WINDOW,
    SETTINGS_ACK,
    STREAM_ID,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway,
    ping,
    read_number,
    read_settings,
    rst_stream,
    settings,
    unpack_header,
    window_update,
    without_padding,
)
from stepstate.h2grpc.headers import (
    DEFAULT_TABLE_BYTES,
    HEADERS_TOO_LONG,
    NO_TABLE,
    Headers,
    Request,
    check_request,
    check_trailers,
    list_bytes,
)
from stepstate.h2grpc.limits import TOO_MUCH_WORK, Cost, Earning, Http2Limits, PingMeter, WorkMeter
from stepstate.h2grpc.memory import ConnectionMemory, PartialMessages
from stepstate.h2grpc.stream import PREFIX_BYTES, Http2Stream, StreamReceiver
from stepstate.h2grpc.waiting import WaitingStreams

_MESSAGE_BYTES = HEADER_BYTES + PREFIX_BYTES
_unpack_message = Struct(">IBIBI").unpack_from  # a frame's header, and a message's prefix
OUTPUT_BYTES = 2**16
"""Of messages that are put out between two writes: the rest waits until the socket takes these."""
_WINDOW_UPDATE = 4 << 8 | FrameType.WINDOW_UPDATE  # the first word of such a frame
_WINDOW_UPDATE_BYTES = HEADER_BYTES + 4
STREAMS_AT_ONCE = 8
"""Streams that begin or end in one turn of the event loop: half a millisecond of work."""
FIELDS_AT_ONCE = 512
"""Of headers, with which they begin: 470 in 2 KB take 2 ms. An ordinary call has a dozen."""
MESSAGES_AT_ONCE = 128
"""Messages that are taken in one turn, unless a frame has more: half a millisecond of work."""
STREAMS_PER_CREDIT = 8
"""Moving the windows of so many streams is as much work as a frame that does nothing."""
_DRAIN_PING = b"draining"
_ALIVE_PING = b"alive? \n"


class Host(Protocol):
    """Owns a connection."""

    def accept(self, stream: Http2Stream, request: Request) -> StreamReceiver:
        """A client begins a stream."""
        ...

    def write_soon(self) -> None:
        """There is output, and `receive` is not at work."""
        ...


class _NoHost:
    """The `Host` of a connection that has ended."""

    def accept(self, _stream: Http2Stream, _request: Request) -> StreamReceiver:
        """See `Host`."""
        raise AssertionError("nothing is received any more")

    def write_soon(self) -> None:
        """See `Host`."""


_NO_HOST = _NoHost()
_FrameHandler = Callable[["Http2Connection", int, int, bytes], None]


class Http2Connection:
    """The state of a connection.

    Args:
        host: owns it.
        limits: what it may cost.
        clock: seconds, for the rule about pings and for messages that come slowly.
        memory: what it may keep.
    """

    __slots__ = (
        "_begun",
        "_clock",
        "_ended_early",
        "_fields_now",
        "_half_window",
        "_headers",
        "_host",
        "_last_id",
        "_last_request",
        "_last_served",
        "_opened_now",
        "_output",
        "_paid_messages",
        "_peer_window",
        "_pings",
        "_receive_window",
        "_rest",
        "_settled",
        "_waiting",
        "_withheld",
        "_writing",
        "behind",
        "block_prefix",
        "cut_messages",
        "draining",
        "ended",
        "held",
        "limits",
        "memory",
        "meter",
        "partial",
        "peer_frame_bytes",
        "received_frames",
        "send_window",
        "sent_messages",
        "sent_others",
        "streams",
    )

    def __init__(
        self,
        host: Host,
        limits: Http2Limits,
        clock: Callable[[], float],
        memory: ConnectionMemory,
    ) -> None:
        self.limits = limits
        self.meter = WorkMeter()
        self.memory = memory
        self.partial = PartialMessages(memory, clock)
        self.streams: dict[int, Http2Stream] = {}
        """The streams that have not ended."""
        self.send_window = DEFAULT_WINDOW
        self._withheld = 0  # of the client's window: the socket has no room for it
        self.held = False
        """The client does not read: no messages are sent."""
        self.peer_frame_bytes = DEFAULT_FRAME_BYTES
        self.sent_messages = 0
        self.sent_others = 0
        self.block_prefix = b""
        self.cut_messages = 0
        self._paid_messages = 0  # of them, those that have brought credit
        self.received_frames = 0
        """Frames that have come, for whoever asks whether the client is alive."""
        self.behind = False
        """There are bytes that were read and not taken; see `receive`."""
        self.ended = False
        """Nothing is received any more; the output is the last."""
        self.draining = False
        """The client was told to begin no more streams."""
        self._host = host
        self._clock = clock
        self._headers = HeaderReader(limits, self.meter)
        self._output: list[bytes | memoryview] = []
        self._writing = False  # somebody takes the output when this call is done
        self._rest = b""
        self._begun = False
        self._settled = False  # the client's SETTINGS have come
        self._last_id = 0
        self._last_request: tuple[Headers, Request | None] = ((), None)
        self._peer_window = DEFAULT_WINDOW
        self._receive_window = limits.connection_window
        self._half_window = limits.stream_window // 2
        self._waiting = WaitingStreams()
        self._ended_early: OrderedDict[int, None] = OrderedDict()
        self._opened_now: set[int] = set()  # in the read that is taken
        self._fields_now = 0  # of their headers
        self._last_served = LARGEST_WINDOW  # streams after it are not served
        self._pings = PingMeter(limits)

    @property
    def begun(self) -> bool:
        """Whether the client has shown that it speaks HTTP/2."""
        return self._settled

    # Output

    def send(self, *data: bytes | memoryview) -> None:
        """See `Sender`."""
        self._output += data
        if not self._writing:
            self._writing = True
            self._host.write_soon()

    def take_output(self) -> bytes:
        """What is to be written now; the host is told if there is more to write after it."""
        if self._withheld and not self.held:
            self._writing = True
            self._open_window()
        if self.meter.credit < 0 and not self.ended:  # it was used up while something was sent
            self.end(ErrorCode.ENHANCE_YOUR_CALM, TOO_MUCH_WORK)
        self._writing = False
        if not self._output:
            return b""
        output = b"".join(self._output)
        self._output.clear()
        if self._withheld and not self.held and self._waiting.ready:
            self._writing = True
            self._host.write_soon()
        return output

    def hold(self) -> None:
        """Sends no more messages: the client does not read what is written already."""
        self.held = True
        self._withheld += self.send_window
        self.send_window = 0

    def go_on(self) -> None:
        """Sends messages again."""
        self.held = False
        self._open_window()

    def _open_window(self) -> None:
        window = self.send_window + self._withheld
        self.send_window = min(window, OUTPUT_BYTES)
        self._withheld = window - self.send_window
        self._waiting.pump(self)

    def block(self, stream: Http2Stream) -> None:
        """See `Sender`."""
        self._waiting.add(stream, self)

    def end_stalled(self, now: float, seconds: float) -> None:
        """Ends the streams whose replies have waited so long for a window without progress.

        gRPC's clients report the code as RESOURCE_EXHAUSTED.
        """
        for stream in self._waiting.stalled(now, seconds):
            stream.reset(ErrorCode.ENHANCE_YOUR_CALM)

    def forget(self, stream: Http2Stream, *, early: bool) -> None:
        """See `Sender`."""
        self.streams.pop(stream.id, None)
        self._waiting.remove(stream)
        if early:
            self._note_early(stream.id)
        self._end_if_drained()

    def _note_early(self, stream_id: int) -> None:
        """Remembers a stream whose end the client may not know yet; what it sends is ignored."""
        self._ended_early[stream_id] = None
        if len(self._ended_early) > self.limits.concurrent_streams:
            self._ended_early.popitem(last=False)

    # The end

    def drain(self) -> None:
        """Asks the client to begin no more streams, and ends the connection after the last one.

        Streams that are on their way are still served (grpc/grpc-java#5806): a second GOAWAY says
        which was the last, when the client has answered a ping, and so has read the first. If it
        does not answer, somebody calls `refuse_more` (RFC 9113, section 6.8).
        """
        if not self.draining and not self.ended:
            self.draining = True
            if self._begun:
                self._announce_end()

    def _announce_end(self) -> None:
        self.send(goaway(LARGEST_WINDOW, ErrorCode.NO_ERROR), ping(_DRAIN_PING, ack=False))

    def refuse_more(self) -> None:
        """Serves no streams but those that have begun: the second GOAWAY, once."""
        if self._last_served == LARGEST_WINDOW and not self.ended:
            self.draining = True
            self._last_served = self._last_id
            self.send(goaway(self._last_id, ErrorCode.NO_ERROR))
            self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._last_served != LARGEST_WINDOW and not self.streams:
            self.end()

    def check_alive(self) -> None:
        """Sends a ping; `received_frames` grows when it is answered."""
        self.send(ping(_ALIVE_PING, ack=False))

    def end(self, code: ErrorCode = ErrorCode.NO_ERROR, debug: str = "") -> None:
        """Ends the connection; the output says why."""
        if not self.ended:
            self.ended = True
            last = min(self._last_id, self._last_served)  # it may not grow
            self.send(goaway(last, code, debug.encode()))
            self.lose()

    def lose(self, most: int | None = None) -> int:
        """The connection is gone: ends all streams, or at most so many; returns how many."""
        self.ended = True
        streams = list(islice(self.streams.values(), most))
        for stream in streams:
            stream.close(early=False).reset()
        if not self.streams:
            self._host = _NO_HOST  # which has the connection: they must be no reference cycle
        return len(streams)

    # Input

    def receive(self, data: bytes) -> None:
        """Takes bytes that were read. Output may be there afterwards.

        If it is `behind` then, it is to be called again in a later turn of the loop, with nothing:
        so much has been taken that others come first.
        """
        self.behind = False
        if self.ended:
            return
        self._writing = True
        try:
            self._receive(self._rest + data if self._rest else data)
        except HeadersTooLong as failure:
            if failure.stream_id > self._last_id:  # else its client would try again
                self._last_id = failure.stream_id
                self._refuse_long(failure.stream_id)
            self.end(failure.code, failure.debug)
        except ConnectionFailure as failure:
            self.end(failure.code, failure.debug)

    def _receive(self, data: bytes) -> None:
        position, end = 0 if self._begun else self._take_preface(data), len(data)
        messages, taken, updates, streams, headers = 0, 0, 0, self.streams, self._headers
        while end - position >= _MESSAGE_BYTES:
            word, flags, stream_id, compressed, size = _unpack_message(data, position)
            stop = position + _MESSAGE_BYTES + size
            if (
                word == size + PREFIX_BYTES << 8
                and not flags
                and not compressed
                and stop <= end
                and (stream := streams.get(stream_id)) is not None
                and stream.plain
                and headers.partial is None
            ):
                messages += 1
                taken += size + PREFIX_BYTES
                stream.receive_window -= size + PREFIX_BYTES
                stream.receiver.message(data[position + _MESSAGE_BYTES : stop])
                if stream.receive_window <= self._half_window:
                    self._replenish(stream)
                position = stop
                if messages + self.cut_messages < MESSAGES_AT_ONCE:
                    continue
                self.behind = True
                break
            if word == _WINDOW_UPDATE and headers.partial is None:
                increment = compressed << 24 | size >> 8
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and 0 < increment <= LARGEST_WINDOW - stream.send_window
                    and not stream.queued_bytes
                ):
                    stream.send_window += increment
                    widened = True
                else:
                    widened = not stream_id and self._widens(increment)
                if widened:
                    updates += 1
                    position += _WINDOW_UPDATE_BYTES
                    continue
            following = self._take_frame(data, position, end)
            whole = following != position
            position = following
            self.behind = (
                len(self._opened_now) >= STREAMS_AT_ONCE
                or self._fields_now >= FIELDS_AT_ONCE
                or messages + self.cut_messages >= MESSAGES_AT_ONCE
            )
            if self.behind or not whole:
                break
        else:
            while (following := self._take_frame(data, position, end)) != position:
                position = following
        self._rest = data[position:]
        self._finish_read(messages, taken, updates)

    def _widens(self, increment: int) -> bool:
        """Takes a WINDOW_UPDATE of the connection; False: this is not the plain case of one."""
        if not self._settled:
            return False
        if not 0 < increment <= LARGEST_WINDOW - self.send_window - self._withheld:
            return False
        self._withheld += increment  # `take_output` opens it
        return True

    def _take_preface(self, data: bytes) -> int:
        """Takes the first bytes; returns how many, 0: more have to come."""
        if len(data) < len(CLIENT_PREFACE) and CLIENT_PREFACE.startswith(data):
            return 0
        if not data.startswith(CLIENT_PREFACE):
            if b" HTTP/1." in data:
                self.send(HTTP_1_RESPONSE)
                self.ended = True
                return len(data)
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "this is not HTTP/2")
        self._begun = True
        self._greet()
        return len(CLIENT_PREFACE)

    def _greet(self) -> None:
        """Says what this side allows."""
        limits = self.limits
        values = {
            Setting.MAX_CONCURRENT_STREAMS: limits.concurrent_streams,
            Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
            Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        more = window_update(0, limits.connection_window - DEFAULT_WINDOW)
        self.send(settings(values), more)
        if self.draining:
            self._announce_end()

    def _take_frame(self, data: bytes, position: int, end: int) -> int:
        """Takes the frame at a position; returns the one after it, or the same: it is not whole.

        Raises:
            ConnectionFailure.
        """
        if end - position < HEADER_BYTES or not self._begun or self.ended:
            return position
        word, flags, stream_id = unpack_header(data, position)
        kind, length = word & 0xFF, int(word >> 8)
        if length > DEFAULT_FRAME_BYTES:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        stop = position + HEADER_BYTES + length
        if stop > end:
            return position
        if not self._settled and kind != FrameType.SETTINGS:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._headers.partial is not None and kind != FrameType.CONTINUATION:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "a header block has not ended")
        self.received_frames += 1
        payload = data[position + HEADER_BYTES : stop]
        stream_id &= STREAM_ID
        handle = self._HANDLERS.get(kind)
        try:
            if handle is None:
                self.meter.charge(Cost.FRAME)
            else:
                handle(self, flags, stream_id, payload)
        except StreamFailure as failure:
            self._fail_stream(stream_id, failure.code)
        return stop

    def _finish_read(self, messages: int, taken: int, updates: int) -> None:
        """Counts the frames that were taken in the loop, and the replies since the last read."""
        self._opened_now.clear()
        self._fields_now = self.cut_messages = 0
        earned = self.sent_messages - self._paid_messages
        if earned:
            self._paid_messages = self.sent_messages
            self.meter.earn(earned * Earning.MESSAGE)
        self.received_frames += messages + updates
        if messages:
            self._take_from_window(taken)
        if updates:
            self.meter.charge(updates * Cost.FRAME)

    def _replenish(self, stream: Http2Stream) -> None:
        if stream.receive_window < 0:
            self._fail_stream(stream.id, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            stream.replenish()

    def _take_from_window(self, size: int) -> None:
        """Counts bytes of DATA frames, whatever their stream, and gives them back in time."""
        self._receive_window -= size
        if self._receive_window < 0:
            raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR, "more than the window was sent")
        used = self.limits.connection_window - self._receive_window
        if used >= self.limits.connection_window // 2:
            self._receive_window += used
            self.send(window_update(0, used))

    def _fail_stream(self, stream_id: int, code: ErrorCode) -> None:
        """Resets a stream for a fault of the client, who pays for it (CVE-2025-8671)."""
        self.meter.charge(Cost.RESET)
        stream = self.streams.get(stream_id)
        if stream is None:
            self.send(rst_stream(stream_id, code))
            self._note_early(stream_id)
        else:
            stream.reset(code)

    def _ignored(self, stream_id: int) -> bool:
        """Whether frames of a stream that is not open may have crossed what this side sent."""
        return stream_id in self._ended_early or stream_id > self._last_served

    def _check_begun(self, stream_id: int) -> None:
        """Refuses frames on streams that can't have begun.

        Raises:
            ConnectionFailure.
        """
        if not stream_id or stream_id > self._last_id or not stream_id & 1:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} has not begun")

    # Frames

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._take_from_window(len(payload))
        self._check_begun(stream_id)
        data = without_padding(flags, payload)
        if data is None:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame")
        if not data and not flags & Flag.END_STREAM:
            self.meter.charge(Cost.FRAME)
        stream = self.streams.get(stream_id)
        if stream is None and self._ignored(stream_id):
            self.meter.charge(Cost.FRAME)
        elif stream is None or not stream.open_in:
            raise StreamFailure(ErrorCode.STREAM_CLOSED)
        else:
            stream.receive(data, len(payload))
            if flags & Flag.END_STREAM and stream.open_in:
                stream.end_receiving()

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        self._take_block(self._headers.headers(flags, stream_id, payload))

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._take_block(self._headers.continuation(flags, stream_id, payload))

    def _take_block(self, block: HeaderBlock | None) -> None:
        """Takes a header block, if it is whole."""
        if block is None:
            return
        self._fields_now += len(block.fields)
        if block.stream_id > self._last_id:
            self._begin(block)
        else:
            self._take_trailers(block)

    def _begin(self, block: HeaderBlock) -> None:
        stream_id = self._last_id = block.stream_id
        if block.depends_on_itself:
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        if stream_id > self._last_served:
            self.meter.charge(Cost.RESET)  # it crossed the second GOAWAY, which refuses it
            return
        if len(self.streams) >= self.limits.concurrent_streams:
            raise StreamFailure(ErrorCode.REFUSED_STREAM)
        fields, request = self._last_request
        if request is None or fields is not block.fields:
            if list_bytes(block.fields) > self.limits.header_list_bytes:
                self.meter.charge(Cost.LONG_HEADERS)
                self._refuse_long(stream_id)
                return
            request = check_request(block.fields)
            if block.fields is self._headers.last_fields:
                self._last_request = (block.fields, request)
        if block.end_stream and request.content_length:
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        stream = Http2Stream(stream_id, self, self._peer_window, request.content_length)
        self.streams[stream_id] = stream
        self._opened_now.add(stream_id)
        stream.receiver = self._host.accept(stream, request)
        if block.end_stream and stream.open_in:
            stream.end_receiving()

    def _refuse_long(self, stream_id: int) -> None:
        """Answers a call whose headers are too long."""
        block, self.block_prefix = self.block_prefix + HEADERS_TOO_LONG, b""
        flags = Flag.END_HEADERS | Flag.END_STREAM
        self.send(frame(FrameType.HEADERS, flags, stream_id, block))
        self.send(rst_stream(stream_id, ErrorCode.NO_ERROR))
        self._note_early(stream_id)

    def _take_trailers(self, block: HeaderBlock) -> None:
        stream = self.streams.get(block.stream_id)
        if stream is None and self._ignored(block.stream_id):
            self.meter.charge(Cost.FRAME)
        elif stream is None:
            raise ConnectionFailure(ErrorCode.STREAM_CLOSED, "HEADERS on a stream that has ended")
        elif not stream.open_in:
            raise StreamFailure(ErrorCode.STREAM_CLOSED)
        elif not block.end_stream:
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        elif list_bytes(block.fields) > self.limits.header_list_bytes:
            raise StreamFailure(ErrorCode.ENHANCE_YOUR_CALM)
        else:
            check_trailers(block.fields)
            stream.end_receiving()

    def _on_priority(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """Priorities are ignored, if they are well-formed."""
        self.meter.charge(Cost.FRAME)
        if not stream_id:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise StreamFailure(ErrorCode.FRAME_SIZE_ERROR)
        if depends_on_itself(stream_id, payload):
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._check_begun(stream_id)
        if len(payload) != 4:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR)
        stream = self.streams.get(stream_id)
        if stream is None:
            self.meter.charge(Cost.FRAME)
            return
        self.meter.charge(self._cost_of_reset(stream))
        stream.close(early=False).reset()

    def _cost_of_reset(self, stream: Http2Stream) -> Cost:
        if stream.id in self._opened_now:
            return Cost.ABRUPT_RESET
        return Cost.FRAME if stream.answered else Cost.RESET

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self.meter.charge(Cost.FRAME)
        if stream_id:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & Flag.ACK and payload):
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR)
        if flags & Flag.ACK:
            return
        self._settled = True
        self.send(SETTINGS_ACK)  # before what a larger window lets out
        for name, value in read_settings(payload):
            self.meter.charge(Cost.FRAME)
            self._set(name, value)

    def _set(self, name: int, value: int) -> None:
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > LARGEST_WINDOW:
                raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR)
            self.meter.charge(len(self.streams) // STREAMS_PER_CREDIT)
            for stream in list(self.streams.values()):  # one whose reply waited may end
                self._widen(stream, value - self._peer_window)
            self._peer_window = value
        elif name == Setting.HEADER_TABLE_SIZE and value < DEFAULT_TABLE_BYTES:
            self.block_prefix = NO_TABLE
        elif name == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_BYTES <= value <= LARGEST_FRAME_BYTES:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR)
            self.peer_frame_bytes = value
        elif name == Setting.ENABLE_PUSH and value > 1:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR)

    def _widen(self, stream: Http2Stream, increment: int) -> None:
        stream.send_window += increment
        if stream.send_window > LARGEST_WINDOW:
            raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR)
        if stream.queued_bytes:
            self.block(stream)

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "a client can't push")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR)
        if not flags & Flag.ACK:
            self.meter.charge(Cost.FRAME)
            self._pings.count(self._clock(), self.sent_messages + self.sent_others)
            self.send(ping(payload, ack=True))
        elif payload == _DRAIN_PING and self.draining:
            self.refuse_more()
        else:
            self.meter.charge(Cost.FRAME)

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """The client begins no more streams; those that are open are served."""
        self.meter.charge(Cost.FRAME)
        if stream_id:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR)

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self.meter.charge(Cost.FRAME)
        if len(payload) != 4:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR)
        increment = read_number(payload) & STREAM_ID
        if stream_id:
            self._widen_stream(stream_id, increment)
            return
        self._withheld += increment  # `take_output` opens it
        if not increment:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        if self.send_window + self._withheld > LARGEST_WINDOW:
            raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR)

    def _widen_stream(self, stream_id: int, increment: int) -> None:
        self._check_begun(stream_id)
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        if not increment:
            raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
        stream.send_window += increment
        if stream.send_window > LARGEST_WINDOW:
            raise StreamFailure(ErrorCode.FLOW_CONTROL_ERROR)
        if stream.queued_bytes:
            self.block(stream)

    # By type; a frame of another type is ignored.
    _HANDLERS: ClassVar[dict[int, _FrameHandler]] = {
        FrameType.DATA: _on_data,
        FrameType.HEADERS: _on_headers,
        FrameType.PRIORITY: _on_priority,
        FrameType.RST_STREAM: _on_rst_stream,
        FrameType.SETTINGS: _on_settings,
        FrameType.PUSH_PROMISE: _on_push_promise,
        FrameType.PING: _on_ping,
        FrameType.GOAWAY: _on_goaway,
        FrameType.WINDOW_UPDATE: _on_window_update,
        FrameType.CONTINUATION: _on_continuation,
    }
