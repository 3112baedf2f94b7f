"""Bytes as a program: what a client sends on a connection, and what its calls do meanwhile.

Whoever makes the bytes, a fuzzer or Hypothesis, reaches every frame, in every order, cut anywhere,
with calls that answer, pause, end or reset their stream where they are called, even within it.
"""

from __future__ import annotations

from collections.abc import Callable

from stepstate.h2grpc.connection import Http2Connection
from stepstate.h2grpc.frames import (
    CLIENT_PREFACE,
    DEFAULT_WINDOW,
    ErrorCode,
    Flag,
    FrameType,
    frame,
    ping,
    read_number,
    rst_stream,
    settings,
    window_update,
)
from stepstate.h2grpc.headers import GRPC_HEADERS, Request, encode_status, literal
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.stream import Http2Stream, StreamReceiver
from tests.unit.h2grpc.client import Room, message
from tests.unit.h2grpc.raw import RawFrame, block, frames_of

LIMITS = Http2Limits(
    concurrent_streams=4, message_bytes=100_000, connection_window=2**17, header_block_bytes=20_000
)
MAX_STEPS = 200
OPENING = block()
LONG_MESSAGE = message(bytes(90_000))
ODD_BLOCKS = (
    OPENING,
    OPENING + literal(b"x-long", bytes(4000)),
    OPENING + literal(b"content-length", b"7"),
    OPENING + literal(b"Upper", b"case"),
    b"\x20" + OPENING,
    OPENING[:-3],
    b"",
)


class Input:
    """The bytes of a program, from which numbers are taken; 0 when there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def left(self) -> bool:
        """Whether there are more."""
        return self._place < len(self._data)

    def number(self, limit: int) -> int:
        """From 0 on, below a limit of at most 2^16."""
        taken = self.take(1 if limit <= 256 else 2)
        return int.from_bytes(taken, "big") % limit

    def take(self, size: int) -> bytes:
        """The next bytes."""
        first, self._place = self._place, self._place + size
        return self._data[first : self._place]


class FuzzedCall:
    """Takes what comes on a stream, does what the program says, and checks what it is told."""

    def __init__(self, stream: Http2Stream, data: Input) -> None:
        self.stream = stream
        self.ended = False
        self._half_closed = False
        self._data = data
        self._depth = 0

    def message(self, payload: bytes) -> None:
        assert not self.ended
        assert not self._half_closed
        assert len(payload) <= LIMITS.message_bytes
        self.act()

    def half_closed(self) -> None:
        assert not self.ended
        assert not self._half_closed
        self._half_closed = True
        self.act()

    def unreadable(self, reason: str, *, too_large: bool) -> None:
        assert not self.ended
        self.act()

    def refused(self, error: Exception) -> None:
        assert not self.ended
        self.act()

    def writable(self) -> None:
        assert not self.ended
        self.act()

    def reset(self) -> None:
        assert not self.ended
        self.ended = True

    def finished(self) -> None:
        assert not self.ended
        self.ended = True

    def act(self) -> None:
        """One thing that a call may do to its stream, also where it is called by it."""
        if self._depth == 3:  # as calls don't answer each answer that has left
            return
        self._depth += 1
        stream, data = self.stream, self._data
        acts: tuple[Callable[[], object], ...] = (
            lambda: None,
            lambda: stream.start(GRPC_HEADERS),
            lambda: self._send(data.number(60)),
            lambda: self._send(data.number(2**16)),
            lambda: stream.finish(encode_status(0, "done")),
            lambda: stream.reset(ErrorCode.CANCEL),
            stream.pause,
            stream.resume,
            stream.drop_queue,
            stream.discard,
            lambda: stream.answer(GRPC_HEADERS, b"text"),
        )
        acts[data.number(len(acts))]()
        self._depth -= 1

    def _send(self, size: int) -> None:
        self.stream.start(GRPC_HEADERS)
        self.stream.send(bytes(size))


class Judge:
    """Reads what a connection sends, as a client that forgives nothing."""

    def __init__(self) -> None:
        self.window = DEFAULT_WINDOW
        self._ended: set[int] = set()
        self._begun: set[int] = set()
        self._last_id = 2**31 - 1

    def read(self, output: bytes) -> None:
        """Checks the frames of an output."""
        for it in frames_of(output):
            assert len(it.payload) <= 2**14 or it.kind == FrameType.DATA
            if it.kind in (FrameType.DATA, FrameType.HEADERS, FrameType.CONTINUATION):
                self._read_response(it)
            elif it.kind == FrameType.RST_STREAM:
                self._ended.add(it.stream_id)
            elif it.kind == FrameType.GOAWAY:
                last = read_number(it.payload[:4])
                assert last <= self._last_id
                self._last_id = last

    def _read_response(self, it: RawFrame) -> None:
        assert it.stream_id & 1
        assert it.stream_id not in self._ended
        if it.kind == FrameType.DATA:
            assert it.stream_id in self._begun
            self.window -= len(it.payload)
            assert self.window >= 0
        self._begun.add(it.stream_id)
        if it.flags & Flag.END_STREAM:
            self._ended.add(it.stream_id)


class Program:
    """A client, a connection and its calls.

    Args:
        data: what they do.
    """

    def __init__(self, data: bytes) -> None:
        self.calls: list[FuzzedCall] = []
        self.memory = Room(left=200_000)
        self._data = Input(data)
        self._now = 0.0
        self._judge = Judge()
        self._next_id = 1
        self.server = Http2Connection(self, LIMITS, lambda: self._now, self.memory)

    def accept(self, stream: Http2Stream, _request: Request) -> StreamReceiver:
        self.calls.append(FuzzedCall(stream, self._data))
        return self.calls[-1]

    def write_soon(self) -> None:
        pass

    def run(self) -> None:
        """Runs to the end of the bytes, or of the connection, and checks that nothing is left."""
        self.server.receive(CLIENT_PREFACE + settings({}))
        pending = b""
        for _ in range(MAX_STEPS):
            if not self._data.left:
                break
            pending += self._frame()
            cut = self._data.number(4)
            if cut < 3:  # else the next frame comes in the same read
                size = len(pending) if cut else self._data.number(2**16) % (len(pending) + 1)
                self.server.receive(pending[:size])
                pending = pending[size:]
            self._happen()
            if not self._data.number(3):
                self._judge.read(self.server.take_output())
        self.server.receive(pending)
        self._judge.read(self.server.take_output())
        self._end()

    def _end(self) -> None:
        self.server.lose()
        assert not self.server.streams
        assert all(call.ended for call in self.calls)
        assert self.memory.left == 200_000

    def _happen(self) -> None:
        """What happens on the server's side between two reads."""
        data, server = self._data, self.server
        events: tuple[Callable[[], object], ...] = (
            lambda: None,
            lambda: None,
            self._act,
            self._act,
            server.check_alive,
            self._wait,
            server.hold,
            server.go_on,
            lambda: self.memory.grow(self.memory.left),
        )
        choice = data.number(256)
        if choice == 255:
            (server.drain, server.refuse_more)[data.number(2)]()
        else:
            events[choice % len(events)]()

    def _act(self) -> None:
        open_calls = [call for call in self.calls if not call.ended]
        if open_calls:
            open_calls[self._data.number(len(open_calls))].act()

    def _wait(self) -> None:
        self._now += 40.0
        self.server.end_stalled(self._now, 60.0)

    def _frame(self) -> bytes:
        """A frame or two, mostly as they should be."""
        data = self._data
        if self._next_id == 1:
            return self._open()
        stream_id = self._stream()
        flag = (0, 0, 0, int(Flag.END_STREAM))[data.number(4)]
        makers: tuple[Callable[[], bytes], ...] = (
            self._open,
            self._open,
            lambda: frame(FrameType.DATA, flag, stream_id, message(bytes(data.number(300)))),
            lambda: frame(FrameType.DATA, flag, stream_id, message(bytes(data.number(16_000)))),
            lambda: frame(FrameType.DATA, flag, stream_id, data.take(data.number(40))),
            lambda: frame(FrameType.DATA, flag | Flag.PADDED, stream_id, self._padded()),
            lambda: frame(FrameType.DATA, 0, stream_id, LONG_MESSAGE[: data.number(2**14)]),
            lambda: self._window(stream_id),
            lambda: rst_stream(stream_id, ErrorCode.CANCEL),
            lambda: settings({4: data.number(2**16)}),  # type: ignore[dict-item]
            lambda: ping((b"draining", bytes(8))[data.number(2)], ack=bool(data.number(2))),
            lambda: frame(FrameType.PRIORITY, 0, stream_id, bytes(4) + data.take(1)),
        )
        choice = data.number(256)
        if choice > 253:
            return data.take(data.number(60))
        return self._any(stream_id) if choice > 248 else makers[choice % len(makers)]()

    def _padded(self) -> bytes:
        size = self._data.number(256)
        return bytes((size,)) + message(b"padded") + bytes(size if size < 250 else 0)

    def _stream(self) -> int:
        """One that is open, mostly; else one that was, and seldom any."""
        choice = self._data.number(256)
        ids = list(self.server.streams)
        if choice < 220 and ids:
            return ids[choice % len(ids)]
        return self._data.number(20) if choice == 255 else max(1, self._next_id - 2)

    def _open(self) -> bytes:
        data = self._data
        stream_id, self._next_id = self._next_id, self._next_id + 2
        odd = data.number(256)
        headers = ODD_BLOCKS[odd] if odd < len(ODD_BLOCKS) else OPENING
        flags = data.number(2) * Flag.END_STREAM
        if data.number(4):
            return frame(FrameType.HEADERS, flags | Flag.END_HEADERS, stream_id, headers)
        cut = data.number(len(headers) + 1)
        rest = frame(FrameType.CONTINUATION, Flag.END_HEADERS, stream_id, headers[cut:])
        return frame(FrameType.HEADERS, flags, stream_id, headers[:cut]) + rest

    def _window(self, stream_id: int) -> bytes:
        increment = self._data.number(2**16) << 16 * (self._data.number(32) == 31)
        on = self._data.number(2) * stream_id
        if not on:
            self._judge.window += increment & 0x7FFF_FFFF
        return window_update(on, increment)

    def _any(self, stream_id: int) -> bytes:
        """A frame of any type with anything in it."""
        data = self._data
        kind, flags = data.number(11), data.number(256)
        if kind == FrameType.WINDOW_UPDATE:
            kind = FrameType.PING
        return frame(kind, flags, stream_id * data.number(2), data.take(data.number(60)))  # type: ignore[arg-type]
