"""Frames and header blocks as a client that breaks the rules makes them."""

from __future__ import annotations

from typing import NamedTuple

from hpack import Encoder

from stepstate.h2grpc.frames import HEADER_BYTES, ErrorCode, Flag, FrameType, frame, unpack_header
from tests.unit.h2grpc.client import HEADERS, message

WHOLE = Flag.END_HEADERS
LAST = Flag.END_HEADERS | Flag.END_STREAM


def block(*extra: tuple[str, str], without: str = "") -> bytes:
    """The header block of a call, which leaves the tables of both sides alone."""
    fields = [(name, value, True) for name, value in (*HEADERS, *extra) if name != without]
    return Encoder().encode(fields, huffman=False)


def headers(stream_id: int, flags: int = WHOLE, data: bytes | None = None) -> bytes:
    """Begins a stream, or ends one."""
    return frame(FrameType.HEADERS, flags, stream_id, block() if data is None else data)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    """A message."""
    return frame(FrameType.DATA, flags, stream_id, message(payload))


def priority(stream_id: int, on: int) -> bytes:
    """Makes a stream depend on another."""
    return frame(FrameType.PRIORITY, 0, stream_id, on.to_bytes(4, "big") + b"\x10")


class RawFrame(NamedTuple):
    """A frame that a server sent."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> ErrorCode:
        """Of GOAWAY or RST_STREAM."""
        first = 4 if self.kind == FrameType.GOAWAY else 0
        return ErrorCode(int.from_bytes(self.payload[first : first + 4], "big"))


def frames_of(output: bytes) -> list[RawFrame]:
    """The frames of an output."""
    found, place = [], 0
    while place < len(output):
        word, flags, stream_id = unpack_header(output, place)
        place += HEADER_BYTES + (word >> 8)
        payload = output[place - (word >> 8) : place]
        found.append(RawFrame(word & 0xFF, flags, stream_id, payload))
    return found


def goaway_of(output: bytes) -> tuple[ErrorCode, bytes]:
    """Why an output is the last: the code and the words of its GOAWAY."""
    (last,) = frames_of(output)[-1:]
    assert last.kind == FrameType.GOAWAY
    return last.code, last.payload[8:]
