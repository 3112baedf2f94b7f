"""Frames and header blocks as a client that breaks the rules makes them."""

from __future__ import annotations

from hpack import Encoder

from stepstate.h2grpc.frames import Flag, FrameType, frame
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
