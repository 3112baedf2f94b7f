"""Many sessions of the synchronous client, stepped together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from typing import Self

from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._api import PackAPI
from stepstate.client._protocol.packed import (
    PackedProtocol,
    PackedResult,
    PackMembers,
    RowsInFlight,
)
from stepstate.client.sync.connection import Connection
from stepstate.client.sync.session import Session
from stepstate.client.sync.stream import RequestStream
from stepstate.client.times import RowsLike
from stepstate.errors import StepstateError
from stepstate.v1 import stepstate_pb2 as pb

_Stream = RequestStream[pb.StreamPackedRequest, pb.StreamPackedResponse]


class Pack(PackAPI):
    """Sessions of one model whose rows travel together, as columns: for gateways.

    One thread at a time may use it.

    Args:
        client: connected to their server.
        sessions: at least one; a session is named by its place in this list.

    Raises:
        InvalidField: they are of several models, or one comes twice.
    """

    def __init__(self, client: Connection, sessions: Sequence[Session]) -> None:
        self._client = client
        self._members = PackMembers.of(sessions)
        self._stream: _Stream | None = None
        self._ids = count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def step(
        self, x: RowsLike, *, which: ArrayLike | None = None, timeout: float | None = None
    ) -> PackedResult:
        seconds = self._client.timeout if timeout is None else timeout
        protocol = PackedProtocol(self._members, x, which, timeout=seconds)
        try:
            while not protocol.done:
                self._round(protocol)
                for session, t in protocol.settle():
                    try:
                        session.catch_up(t, timeout=timeout)
                    except StepstateError as error:
                        protocol.ended(session, error)
                time.sleep(protocol.pause())
        except BaseException:
            protocol.given_up()
            self.end()  # replies that nobody takes any more
            raise
        return protocol.result()

    def end(self) -> None:
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _round(self, protocol: PackedProtocol[Session]) -> None:
        """Sends what is left, and takes the replies that come."""
        try:
            stream = self._stream or self._connect()
            in_flight = {self._send(stream, message): message for message in protocol.messages()}
            while in_flight:
                reply = stream.receive()
                protocol.answered(in_flight.pop(reply.id), reply)
        except StepstateError as error:
            self._broken(protocol, error)

    def _connect(self) -> _Stream:
        stream = self._stream = RequestStream(self._client.stub.StreamPacked, self._client)
        for bindings in self._members.bindings():
            stream.send(bindings)
            bound = stream.receive()
            if bound.HasField("error"):
                raise convert.from_status(bound.error)
        return stream

    def _send(self, stream: _Stream, message: RowsInFlight) -> int:
        message.request.id = next(self._ids)
        stream.send(message.request)
        return message.request.id

    def _broken(self, protocol: PackedProtocol[Session], error: StepstateError) -> None:
        self.end()
        protocol.broken(error)
