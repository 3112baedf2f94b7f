"""HTTP/2 frames: their types, flags and codes, and their bytes (RFC 9113, sections 4, 6 and 7)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

CLIENT_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP_1_RESPONSE = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\n"
    b"connection: close\r\ncontent-type: text/plain\r\ncontent-length: 45\r\n\r\n"
    b"this is a gRPC server: it takes HTTP/2 alone\n"
)
"""The answer to a client of HTTP/1.1."""
HEADER_BYTES = 9
"""Of every frame, before its payload."""
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_BYTES = 16_384
"""The longest payload that each side must take."""
LARGEST_FRAME_BYTES = 2**24 - 1
LARGEST_WINDOW = 2**31 - 1
STREAM_ID = 0x7FFF_FFFF
"""The bits of a stream's number; the one above is reserved, and ignored."""


class FrameType(IntEnum):
    """The types of frames. Others are ignored."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag:
    """The flags of frames. ACK is END_STREAM's bit, of SETTINGS and PING.

    They are plain integers: the operators of `IntFlag` take longer than the rest of a frame.
    """

    END_STREAM = 0x1
    ACK = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class Setting(IntEnum):
    """The settings of a connection. Others are ignored."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


_HEADER = Struct(">IBI")  # length << 8 | type, flags, stream
_NUMBER = Struct(">I")
_SETTING = Struct(">HI")
_GOAWAY = Struct(">II")

unpack_header = _HEADER.unpack_from
"""(length << 8 | type, flags, stream) of the frame at a place in a buffer."""


def frame(kind: FrameType, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame; the payload is at most as long as the other side takes."""
    return _HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def data_header(size: int, flags: int, stream_id: int) -> bytes:
    """The header of a DATA frame of `size` bytes."""
    return _HEADER.pack(size << 8, flags, stream_id)


def window_update(stream_id: int, increment: int) -> bytes:
    """Lets the other side send more bytes; stream 0: on the whole connection."""
    return frame(FrameType.WINDOW_UPDATE, 0, stream_id, _NUMBER.pack(increment))


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    """Ends a stream at once."""
    return frame(FrameType.RST_STREAM, 0, stream_id, _NUMBER.pack(code))


def goaway(last_stream_id: int, code: ErrorCode, debug: bytes = b"") -> bytes:
    """Says which streams are the last that are served, and why."""
    return frame(FrameType.GOAWAY, 0, 0, _GOAWAY.pack(last_stream_id, code) + debug)


def settings(values: dict[Setting, int]) -> bytes:
    """Says what this side allows."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values.items())
    return frame(FrameType.SETTINGS, 0, 0, payload)


SETTINGS_ACK = frame(FrameType.SETTINGS, Flag.ACK, 0)


def ping(payload: bytes, *, ack: bool) -> bytes:
    """Asks whether the other side is there, or answers that; 8 bytes."""
    return frame(FrameType.PING, Flag.ACK if ack else 0, 0, payload)


def read_number(payload: bytes) -> int:
    """The one number of a WINDOW_UPDATE or RST_STREAM frame."""
    number: int = _NUMBER.unpack(payload)[0]
    return number


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings in a frame, in order."""
    return list(_SETTING.iter_unpack(payload))


def without_padding(flags: int, payload: bytes) -> bytes | None:
    """The payload of a DATA or HEADERS frame; None: the padding is longer than the frame."""
    if not flags & Flag.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        return None
    return payload[1 : len(payload) - payload[0]]
