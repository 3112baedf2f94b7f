"""Headers: what HTTP/2 allows in a request, and what gRPC puts into them.

Sources: RFC 9113, section 8; RFC 7541 (HPACK), whose decoder is the package `hpack`; gRPC's
protocol, https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from stepstate.h2grpc.errors import StreamFailure
from stepstate.h2grpc.frames import ErrorCode

Headers = Sequence[tuple[bytes, bytes]]


class Metadatum(NamedTuple):
    """One key and value of metadata, as grpcio names them."""

    key: str
    value: str | bytes
    """Of a key that ends in "-bin": bytes; of another: str, in ASCII."""


Metadata = tuple[tuple[str, str | bytes], ...]
"""In the order of the headers; what a client sent, as `Metadatum`."""

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[^\0\r\n]*")  # also with spaces at its ends, as clients of gRPC send it
_PRINTABLE_ASCII = re.compile(rb"[ -~]*")
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_THE_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NOT_METADATA = frozenset((b"te", b"content-type", b"content-length", b"grpc-timeout"))
_RESERVED = (b"grpc-encoding", b"grpc-accept-encoding", b"grpc-message-type")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@dataclass(frozen=True, slots=True)
class Request:
    """The headers that begin a stream, checked."""

    method: bytes
    path: bytes
    authority: bytes
    fields: Headers
    """The others, in their order."""
    content_length: int | None

    def field(self, name: bytes, default: bytes = b"") -> bytes:
        """The first value of a field."""
        return next((value for key, value in self.fields if key == name), default)


def check_request(headers: Headers) -> Request:
    """The request of a header list, as decoded.

    Raises:
        StreamFailure: it is malformed (RFC 9113, sections 8.2 and 8.3).
    """
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name[:1] == b":":
            if fields or name in pseudo or name not in _PSEUDO or not _VALUE.fullmatch(value):
                raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
            pseudo[name] = value
        else:
            _check_field(name, value)
            fields.append((name, value))
    if not (pseudo.get(b":method") and pseudo.get(b":scheme") and pseudo.get(b":path")):
        raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
    return Request(
        pseudo[b":method"],
        pseudo[b":path"],
        pseudo.get(b":authority", b""),
        fields,
        _content_length(fields),
    )


def check_trailers(headers: Headers) -> None:
    """Checks the header list that ends a request.

    Raises:
        StreamFailure: it is malformed.
    """
    for name, value in headers:
        _check_field(name, value)


def _check_field(name: bytes, value: bytes) -> None:
    if (
        not _NAME.fullmatch(name)
        or not _VALUE.fullmatch(value)
        or name in _OF_THE_CONNECTION
        or (name == b"te" and value != b"trailers")
    ):
        raise StreamFailure(ErrorCode.PROTOCOL_ERROR)


def _content_length(fields: Headers) -> int | None:
    lengths = {value for name, value in fields if name == b"content-length"}
    if not lengths:
        return None
    value = lengths.pop()
    if lengths or not value.isdigit() or len(value) > 18:
        raise StreamFailure(ErrorCode.PROTOCOL_ERROR)
    return int(value)


def list_bytes(headers: Headers) -> int:
    """The size of a header list, as limits count it (RFC 9113, section 6.5.2)."""
    return sum(len(name) + len(value) + 32 for name, value in headers)


def timeout_of(value: bytes) -> float | None:
    """Seconds of a `grpc-timeout`; None: it is not one."""
    match = _TIMEOUT.fullmatch(value)
    return None if match is None else int(match[1]) * _SECONDS[match[2]]


def metadata_of(fields: Headers) -> Metadata:
    """The metadata of a call, without the fields of the protocol itself.

    Raises:
        ValueError: a value of a "-bin" key is not base64, or another value not ASCII.
    """
    found: list[Metadatum] = []
    for name, value in fields:
        if name in _NOT_METADATA or name in _RESERVED:
            continue
        key = name.decode("ascii")
        if name.endswith(b"-bin"):
            found += [Metadatum(key, _from_base64(part)) for part in value.split(b",")]
        else:
            found.append(Metadatum(key, value.decode("ascii")))
    return tuple(found)


def _from_base64(value: bytes) -> bytes:
    """The bytes of a value, with padding or without."""
    try:
        return base64.b64decode(value.strip() + b"=" * (-len(value.strip()) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not base64: {error}") from None


def encode_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Metadata as a part of a header block.

    Raises:
        TypeError, ValueError: a key or value can't be sent.
    """
    return b"".join(_encode_entry(entry) for entry in metadata)


def _encode_entry(entry: object) -> bytes:
    match entry:
        case (str() as key, str() | bytes() as value):
            name = key.encode()
        case _:
            raise TypeError(f"metadata is pairs of str and str or bytes, not {entry!r}")
    data = value.encode() if isinstance(value, str) else value
    binary = name.endswith(b"-bin")
    data = base64.b64encode(data).rstrip(b"=") if binary else data.strip()
    if not _NAME.fullmatch(name) or not _PRINTABLE_ASCII.fullmatch(data):
        raise ValueError(f"metadata can't hold {key!r} with this value")
    return literal(name, data)


def encode_status(code: int, message: str = "") -> bytes:
    """The status of a call as the beginning of its trailers' header block."""
    block = literal(b"grpc-status", b"%d" % code)
    if message:
        text = quote(message, safe=_PRINTABLE, errors="replace")
        block += literal(b"grpc-message", text.encode())
    return block


def literal(name: bytes, value: bytes) -> bytes:
    """A field of a header block: not indexed, not Huffman-coded (RFC 7541, section 6.2.2)."""
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    """The length of a string, a prefix integer of 7 bits (RFC 7541, section 5.1)."""
    if size < 127:
        return bytes((size,))
    rest, digits = size - 127, bytearray((127,))
    while rest >= 128:
        digits.append(rest & 127 | 128)
        rest >>= 7
    digits.append(rest)
    return bytes(digits)


DEFAULT_TABLE_BYTES = 4096
"""Of the dynamic table that the other side keeps for what it is sent. Nothing is put into it."""
NO_TABLE = b"\x20"
"""Sets the size of that table to 0. The first header block must begin with it after the other side
has allowed less than before (RFC 7541, section 4.2)."""
STATUS_200 = b"\x88"
"""`:status: 200`, in HPACK's static table."""
STATUS_405 = b"\x08\x03405"
STATUS_415 = b"\x08\x03415"
GRPC_HEADERS = STATUS_200 + literal(b"content-type", b"application/grpc")
"""What every gRPC response begins with."""
HEADERS_TOO_LONG = GRPC_HEADERS + encode_status(8, "received metadata size exceeds the limit")
"""RESOURCE_EXHAUSTED, to a call whose metadata are not taken."""
