"""Packed `repeated float` fields as bytes.

On the wire they are little-endian float32, so to parse or to make one is a copy,
where a Python loop over its values costs 50 ns each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedScalarFieldContainer

FEW_VALUES = 64
"""Up to here a list is faster than the detour over bytes (0.3 against 2 microseconds)."""


@lru_cache(maxsize=1024)
def packed_header(field: int, length: int) -> bytes:
    """What precedes a packed field of so many bytes: its tag, and the length as a varint."""
    header = bytearray(((field << 3) | 2,))
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return bytes(header)


def put_floats(message: Message, field: int, data: bytes) -> None:
    """Appends float32 values, given as bytes, to a `repeated float` field."""
    if data:
        message.MergeFromString(packed_header(field, len(data)) + data)


def x_of(request: pb.StepRequest) -> NDArray[np.float32]:
    """x of a request."""
    return array_of(request.x)


def y_of(response: pb.StepResponse) -> NDArray[np.float32]:
    """y of a reply."""
    return array_of(response.y)


def array_of(values: RepeatedScalarFieldContainer[float]) -> NDArray[np.float32]:
    """The values of any `repeated float` field."""
    if len(values) <= FEW_VALUES:
        return np.array(values[:], np.float32)
    alone = pb.StepRequest()
    alone.x.MergeFrom(values)
    # The one field of this message: its values are the last bytes on the wire.
    return np.frombuffer(alone.SerializeToString()[-4 * len(values) :], "<f4").copy()
