"""Bounds the parts of a message before it is parsed.

An empty string or message takes 2 bytes on the wire, and 16 to 90 in memory: a message of 16 MiB
that consists of them takes a second and 700 MiB to parse. So of a long message only the values of
tensors may be long, and the rest of it is measured on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from stepstate.errors import InvalidField

MAX_REST_BYTES = 64 * 2**10
"""Of a message without its values, if nothing else is said."""
PART_BYTES = 16
"""Each part counts as at least so much: no part takes less in memory."""
_VARINT_LENGTH = 10
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # protobuf.dev/programming-guides/encoding

M = TypeVar("M", bound=Message)


def parser(
    message: type[M], values: Container[str] = (), rest_bytes: int = MAX_REST_BYTES
) -> Callable[[bytes], M]:
    """A deserializer that refuses a message with too many parts, or too long ones.

    Args:
        message: its type.
        values: the full names of the fields that may be long.
        rest_bytes: what all else may take; a message that is not longer is not looked at.
    """
    descriptor: Descriptor = message.DESCRIPTOR  # type: ignore[assignment] # there are two kinds

    def parse(data: bytes) -> M:
        if len(data) > rest_bytes:
            check_parts(data, descriptor, values, rest_bytes)
        return message.FromString(data)

    return parse


def check_parts(data: bytes, message: Descriptor, values: Container[str], rest_bytes: int) -> None:
    """Refuses a message that is long beside its values.

    Raises:
        InvalidField: it names the field that was one too many, or too long.
    """
    with suppress(IndexError):  # it is cut: the parser says so
        _Walk(data, values, rest_bytes).over(0, len(data), message, "")


class _Walk:
    """Over the parts of a message on the wire, as far as they fit."""

    def __init__(self, data: bytes, values: Container[str], rest_bytes: int) -> None:
        self._data = data
        self._values = values
        self._rest_bytes = rest_bytes
        self._left = rest_bytes

    def over(self, at: int, end: int, message: Descriptor, where: str) -> None:
        """Walks over a message that is at `at` to `end` of the data."""
        for field, first, last in _parts(self._data, at, end, message):
            name = f"{where}{field.name if field else 'unknown'}"
            self._left -= PART_BYTES
            if field is not None and field.message_type is not None:
                self.over(first, last, field.message_type, f"{name}.")
            elif field is None or field.full_name not in self._values:
                self._left -= last - first
            if self._left < 0:
                raise InvalidField(
                    name,
                    f"makes the request longer than {self._rest_bytes} bytes beside its values "
                    f"(each part counts as at least {PART_BYTES}): send fewer and shorter names, "
                    "ids and parameters",
                )


def _parts(
    data: bytes, at: int, end: int, message: Descriptor
) -> Iterator[tuple[FieldDescriptor | None, int, int]]:
    """The parts of a message on the wire: the field (None: unknown), and where its content is."""
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _LENGTH:
            size, at = _varint(data, at)
            last = at + size
        elif kind == _VARINT:
            last = _varint(data, at)[1]
        else:  # the start or the end of a group has no content
            last = at + {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
        yield message.fields_by_number.get(key >> 3), at, last
        at = last


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer, and where it ends.

    Raises:
        IndexError: it does not end.
    """
    value = 0
    for place in range(_VARINT_LENGTH):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise IndexError
