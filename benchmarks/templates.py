"""Templates of requests: a step of a session, or a packed message of several sessions.

Requests are prepared bytes, then `t`, since protobuf takes fields in any order: the client
is not what is measured. Steps carry `t`, as a real client's do. The first and the last reply
to each are checked. That is enough: a step that failed in between would leave the session
behind, and every later reply would be an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks import BenchError
from benchmarks.load import Kind
from stepstate.client.convert import from_status
from stepstate.v1 import stepstate_pb2 as pb

Key: TypeAlias = "bytes | int"

_T_TAG = bytes([pb.StepRequest.T_FIELD_NUMBER << 3])
"""Field number, and wire type 0: a varint follows."""
_PACKED_T_TAG = bytes([pb.StreamPackedRequest.T_FIELD_NUMBER << 3 | 2])
"""Wire type 2: a length follows, then so many bytes."""


class RequestTemplate(Protocol):
    """Makes the messages of a session, or of a group of them, one after the other."""

    since: deque[float]
    """For each unanswered message, when it was sent or due."""
    rows: int

    @property
    def key(self) -> Key:
        """What identifies its replies."""
        ...

    def request(self) -> bytes:
        """Its next message."""
        ...

    def check(self, kind: Kind, reply: bytes) -> None:
        """Raises unless this is the right reply to its last message."""
        ...


class StepTemplate:
    """One session, one row a message."""

    rows = 1

    def __init__(self, name: str, x: NDArray[np.float32]) -> None:
        self.since: deque[float] = deque()
        self.key: Key = name.encode()
        self._prefix = pb.StepRequest(session_id=name, x=x.tolist()).SerializeToString()
        self._t = 0

    def request(self) -> bytes:
        """The session's next step."""
        self._t += 1
        return self._prefix + _T_TAG + varint(self._t - 1)

    def check(self, kind: Kind, reply: bytes) -> None:
        """Raises unless the session is at the right t, or the echo sent the same."""
        if kind is Kind.ECHO:
            if reply != self._prefix + _T_TAG + varint(self._t - 1):
                raise BenchError("the echo sent something else back")
            return
        response = pb.StepResponse.FromString(reply)
        if response.HasField("error"):
            raise from_status(response.error)
        if response.t != self._t or not response.y:
            raise BenchError(
                f"a step to t = {self._t} was answered with t = {response.t}, y = {response.y}"
            )


def session_key(reply: bytes) -> Key:
    """The session's id, at its place in the bytes: it is field 1, which protobuf writes first.

    An id has less than 128 characters here, so its length is one byte.
    """
    return reply[2 : 2 + reply[1]]


class PackedTemplate:
    """A group of sessions of one stream, one row of each a message.

    Args:
        number: of the group on its stream, from 0.
        first: the handle of its first session; the others follow.
        names: of its sessions, N of them.
        x: [N, D].
    """

    def __init__(
        self, number: int, first: int, names: Sequence[str], x: NDArray[np.float32]
    ) -> None:
        self.since: deque[float] = deque()
        self.rows = len(names)
        self.key: Key = number + 1
        handles = np.arange(first, first + self.rows, dtype="<u4")
        message = pb.StreamPackedRequest(
            id=number + 1, handles=handles.tobytes(), x=x.astype("<f4").tobytes()
        )
        self._prefix = message.SerializeToString() + _PACKED_T_TAG + varint(8 * self.rows)
        pairs = zip(handles.tolist(), names, strict=True)
        bindings = [pb.Binding(handle=handle, session_id=name) for handle, name in pairs]
        self._bindings = pb.StreamPackedRequest(bindings=bindings).SerializeToString()
        self._t = 0
        self._sent = b""

    def request(self) -> bytes:
        """The group's next message; the first one binds the handles."""
        self._sent = self._prefix + np.full(self.rows, self._t, "<u8").tobytes()
        if self._t == 0:
            self._sent += self._bindings
        self._t += 1
        return self._sent

    def check(self, kind: Kind, reply: bytes) -> None:
        """Raises unless every session is at the right t, or the echo sent the same."""
        if kind is Kind.ECHO:
            if reply != self._sent:
                raise BenchError("the echo sent something else back")
            return
        response = pb.StreamPackedResponse.FromString(reply)
        t = np.frombuffer(response.t, "<u8")
        y = np.frombuffer(response.y, "<f4")
        if len(t) != self.rows or (t != self._t).any() or not len(y) or not np.isfinite(y).all():
            raise BenchError(f"rows to t = {self._t} were answered with t = {t}, y = {y}")


def packed_key(kind: Kind, reply: bytes) -> Key:
    """The message's id; raises if the message or a row was refused."""
    if kind is Kind.ECHO:
        return pb.StreamPackedRequest.FromString(reply).id
    response = pb.StreamPackedResponse.FromString(reply)
    if response.HasField("error"):
        raise from_status(response.error)
    if response.errors:
        raise from_status(response.errors[0].status)
    return response.id


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first (protobuf.dev/programming-guides/encoding)."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
