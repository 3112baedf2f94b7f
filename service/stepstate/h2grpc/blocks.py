"""Header blocks: what HEADERS and CONTINUATION frames bring, and HPACK makes of it.

A block is bounded in four ways: frames (CONTINUATION floods, CVE-2024-27316), bytes as they come,
bytes of the list that HPACK makes of them (its bombs, CVE-2016-6581), and the work that decoding
is. A list that is only longer than was announced costs its own call alone. Sources: RFC 9113,
sections 4.3, 6.2 and 6.10; RFC 7541 (HPACK).

The calls of a client mostly have the same headers. By then each is in HPACK's tables, or, as the
token of a call, a literal that does not go there. Such a block has the bytes of the one before,
changes no table, and so means the same: it is not decoded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError

from stepstate.h2grpc.errors import ConnectionFailure, HeadersTooLong
from stepstate.h2grpc.frames import STREAM_ID, ErrorCode, Flag, read_number, without_padding
from stepstate.h2grpc.headers import Headers
from stepstate.h2grpc.limits import Http2Limits, WorkMeter

# Its lines for debugging have the values of headers, and a header may be a credential.
logging.getLogger("hpack").setLevel(logging.WARNING)

BYTES_PER_CREDIT = 512
"""Decoding so many bytes of Huffman code is as much work as a frame that does nothing."""
INDEXED = 0x80
"""A field that begins with such a byte, or a larger one, is in a table."""
NEW_ENTRY_OR_SIZE = 0x20
"""One that begins with such a byte, or a larger one, changes the dynamic table."""
MAX_KEPT_BYTES = 4096
"""Of a block with literals that is remembered: most tokens, and the other headers of a call."""
MAX_TABLE_UPDATES = 2
"""At the beginning of a block (RFC 7541, section 4.2). One is a byte, and takes 3 µs."""


@dataclass(frozen=True, slots=True)
class HeaderBlock:
    """A header block that is whole."""

    stream_id: int
    fields: Headers
    end_stream: bool
    """It is the last that its stream sends."""
    depends_on_itself: bool
    """Its priority is malformed like that (RFC 7540, section 5.3.1)."""


class HeaderReader:
    """Reads the header blocks of a connection.

    Args:
        limits: of a block.
        meter: what decoding is charged to.
    """

    __slots__ = ("_decoder", "_last", "_limits", "_meter", "last_fields", "partial")

    def __init__(self, limits: Http2Limits, meter: WorkMeter) -> None:
        self.partial: _PartialBlock | None = None
        """The block that has begun and not ended: no other frame may come before its end."""
        self._limits = limits
        self._meter = meter
        self._decoder = Decoder(limits.header_block_bytes)
        self._last = b""
        self.last_fields: Headers = ()
        """Of the last block, if it changed no table: it may come again."""

    def headers(self, flags: int, stream_id: int, payload: bytes) -> HeaderBlock | None:
        """Takes a HEADERS frame; returns the block if that is all of it.

        Raises:
            ConnectionFailure: it is malformed.
            HeadersTooLong: it is.
        """
        block = without_padding(flags, payload)
        looped = False
        if block is not None and flags & Flag.PRIORITY:
            looped = depends_on_itself(stream_id, block)
            block = block[5:] if len(block) >= 5 else None
        if block is None:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame")
        self.partial = _PartialBlock(
            stream_id, bytearray(block), end_stream=bool(flags & Flag.END_STREAM), looped=looped
        )
        return self._end(self.partial) if flags & Flag.END_HEADERS else None

    def continuation(self, flags: int, stream_id: int, payload: bytes) -> HeaderBlock | None:
        """Takes a CONTINUATION frame; returns the block if that is the last of it.

        Raises:
            ConnectionFailure: nothing is to be continued.
            HeadersTooLong: it is.
        """
        block, limits = self.partial, self._limits
        if block is None or block.stream_id != stream_id:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        block.data += payload
        block.frames += 1
        if len(block.data) > limits.header_block_bytes or block.frames > limits.header_frames:
            raise HeadersTooLong(stream_id)
        return self._end(block) if flags & Flag.END_HEADERS else None

    def _end(self, block: _PartialBlock) -> HeaderBlock:
        self.partial = None
        fields = self._decode(block.stream_id, bytes(block.data))
        return HeaderBlock(block.stream_id, fields, block.end_stream, block.looped)

    def _decode(self, stream_id: int, data: bytes) -> Headers:
        """The fields of a block: the same object as before, if it repeats the one before."""
        if data and data == self._last:
            return self.last_fields
        self._meter.charge(len(data) // BYTES_PER_CREDIT)
        if _table_updates(data) > MAX_TABLE_UPDATES:
            raise ConnectionFailure(ErrorCode.COMPRESSION_ERROR, "too many updates of the table")
        try:
            fields = self._decoder.decode(data, raw=True)
        except OversizedHeaderListError:
            raise HeadersTooLong(stream_id) from None
        except (HPACKError, ValueError, IndexError):
            raise ConnectionFailure(ErrorCode.COMPRESSION_ERROR) from None
        found = [(bytes(name), bytes(value)) for name, value in fields]
        self._last, self.last_fields = (data, found) if _changes_no_table(data) else (b"", ())
        return found


class _PartialBlock:
    """A header block that is being received."""

    __slots__ = ("data", "end_stream", "frames", "looped", "stream_id")

    def __init__(self, stream_id: int, data: bytearray, *, end_stream: bool, looped: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.end_stream = end_stream
        self.looped = looped
        self.frames = 1


def depends_on_itself(stream_id: int, priority: bytes) -> bool:
    """Whether the priority of a stream is malformed like that (RFC 7540, section 5.3.1)."""
    return len(priority) >= 5 and read_number(priority[:4]) & STREAM_ID == stream_id


def _changes_no_table(data: bytes) -> bool:
    """Whether a valid block has only indexed fields, and literals that stay out of the table.

    A long one with literals does not count. Source: RFC 7541, sections 6.1, 6.2.2 and 6.2.3.
    """
    if data and min(data) >= INDEXED:  # the last byte of a longer number is smaller
        return True
    if len(data) > MAX_KEPT_BYTES:
        return False
    place = 0
    while place < len(data):
        first = data[place]
        if INDEXED > first >= NEW_ENTRY_OR_SIZE:
            return False
        index, place = _number(data, place, 0x7F if first >= INDEXED else 0x0F)
        if first < NEW_ENTRY_OR_SIZE:
            for _ in range(1 if index else 2):  # the name, if it is not in the tables; the value
                length, place = _number(data, place, 0x7F)
                place += length
    return bool(data)


def _number(data: bytes, place: int, mask: int) -> tuple[int, int]:
    """A number, and the place after it (RFC 7541, section 5.1)."""
    number, shift = data[place] & mask, 0
    place += 1
    while number >= mask:
        number += (data[place] & 0x7F) << shift
        shift += 7
        place += 1
        if data[place - 1] < 0x80:
            break
    return number, place


def _table_updates(data: bytes) -> int:
    """How many updates of the dynamic table's size a block begins with; 3: or more."""
    found = place = 0
    while found <= MAX_TABLE_UPDATES and place < len(data) and data[place] & 0xE0 == 0x20:
        found += 1
        place += 1
        if data[place - 1] == 0x3F:  # the size goes on (RFC 7541, section 5.1)
            while place < len(data) and data[place] & 0x80:
                place += 1
            place += 1
    return found
