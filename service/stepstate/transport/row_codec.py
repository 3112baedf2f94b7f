"""The bytes of one-row messages of `StreamSteps`, without protobuf.

The requests of a session that steps row by row differ in t and in their floats, and so do its
replies. Of a session at row t it is known with which bytes the request for that row begins, and how
long it is: to compare them costs a fraction of parsing a message and reading its fields.

    request   session_id  t  x of one row
    reply     session_id  t  y of one row  durable_t, if it is not 0

Rule 1: a request that is recognized means to protobuf what it means here. One that means the same
        in other bytes (fields in another order, an unknown field, a longer varint) is not
        recognized, and goes the ordinary way.
Rule 2: a reply has the bytes that protobuf serializes. Whatever else a reply may hold (an error,
        layers, that it is replayed) makes it one for protobuf.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from functools import lru_cache

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import packed_header

_LAST = tuple(bytes((n,)) for n in range(128))
_MORE = tuple(bytes((n | 128,)) for n in range(128))
_FLOAT_BYTES = 4


def varint(n: int) -> bytes:
    """A number from 0 as protobuf has it: groups of 7 bits, the lowest first."""
    return _LAST[n] if n < 128 else _MORE[n & 127] + _rest(n >> 7)


@lru_cache(maxsize=2**14)
def _rest(n: int) -> bytes:
    """All but the first group, which stay the same for 128 rows."""
    return varint(n)


def _varint_tag(field: int) -> bytes:
    return varint(field << 3)


_T = _varint_tag(pb.StepRequest.T_FIELD_NUMBER)
_DURABLE_T = _varint_tag(pb.StepResponse.DURABLE_T_FIELD_NUMBER)


class RowCodec:
    """The messages of one session. A reply begins as the request after it does.

        _, prefix = codec.heads(t)
        if payload[: -codec.x_bytes] == prefix:  # it is the request for row t
            x = payload[-codec.x_bytes :]
            reply_head, prefix = codec.heads(t + 1)
            reply = reply_head + y

    Args:
        session_id: of the session; not empty.
        input_width: values of a row, D.
        output_width: values of its outputs, O.
    """

    __slots__ = ("_before_t", "_before_x", "_before_y", "x_bytes")

    def __init__(self, session_id: str, input_width: int, output_width: int) -> None:
        name = session_id.encode()
        self.x_bytes = _FLOAT_BYTES * input_width
        """The last bytes of a request: x of its row, float32 [D], little-endian."""
        self._before_t = (
            packed_header(pb.StepRequest.SESSION_ID_FIELD_NUMBER, len(name)) + name + _T
        )
        self._before_x = packed_header(pb.StepRequest.X_FIELD_NUMBER, self.x_bytes)
        self._before_y = packed_header(pb.StepResponse.Y_FIELD_NUMBER, _FLOAT_BYTES * output_width)

    def heads(self, t: int) -> tuple[bytes, bytes]:
        """All of a reply before y, after row t - 1; and all of the request for row t before x."""
        both = self._before_t + varint(t)
        return both + self._before_y, both + self._before_x


def saved(durable_t: int) -> bytes:
    """The end of a reply, after y, where rows are saved: so many, at least one."""
    return _DURABLE_T + varint(durable_t)
