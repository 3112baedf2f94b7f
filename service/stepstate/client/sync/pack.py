"""Many sessions of the synchronous client, stepped together."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._protocol.packed import (
    PackedProtocol,
    PackedResult,
    PackMembers,
    RowsInFlight,
)
from stepstate.client.sync.session import Session
from stepstate.client.times import TimedRows
from stepstate.errors import ServerUnreachable, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.client.sync.client import Client


class Pack:
    """Sessions of one model whose rows travel together, as columns: for gateways.

    One thread at a time may use it.

    Args:
        client: connected to their server.
        sessions: at least one; a session's place in the list stands for it.

    Raises:
        InvalidField: they are of several models, or one comes twice.
    """

    def __init__(self, client: Client, sessions: Sequence[Session]) -> None:
        self._client = client
        self._members = PackMembers.of(sessions)
        self._requests: queue.SimpleQueue[pb.StreamPackedRequest | None] = queue.SimpleQueue()
        self._replies: Any = None  # what grpc gives for a call has no name
        self._ids = count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        which: ArrayLike | None = None,
        timeout: float | None = None,
    ) -> PackedResult:
        """Applies one row to each session, or rows to some of them, each row exactly once.

        A row that can't be applied is refused alone, and so are the rows of its
        session behind it: look at the result's `errors`. What is lost on the way
        is sent again with the same t, and a server that was set back is brought
        up.

        Args:
            x: rows [N, D] in raw units; NaN is a missing value. Rows with times, in
                an index of pandas or in `TimedRows`, must each be their session's
                next one.
            which: whose row each is [N], as a place in the pack; a session may
                come several times. Left out: one row for each session in order.
            timeout: seconds for all tries that do not bring a row on; left out: the
                client's own.

        Returns:
            What became of each row.

        Raises:
            InvalidField: x or `which` has another shape, or a row has another time.
            Cancelled: the client was disconnected.
        """
        seconds = self._client.timeout if timeout is None else timeout
        call = PackedProtocol(self._members, x, which, timeout=seconds)
        try:
            while not call.done:
                self._round(call)
                for session, t in call.settle():
                    try:
                        session.catch_up(t, timeout=timeout)
                    except StepstateError as error:
                        call.ended(session, error)
                time.sleep(call.pause())
        except BaseException:
            call.given_up()
            self.end()  # replies that nobody takes any more
            raise
        return call.result()

    def end(self) -> None:
        """Ends the stream; the sessions stay open."""
        if self._replies is not None:
            self._requests.put(None)
            self._replies.cancel()
            self._replies = None

    def _round(self, call: PackedProtocol[Session]) -> None:
        """Sends what is left, and takes the replies that come."""
        try:
            self._connect()
            on_their_way = {self._send(message): message for message in call.messages()}
            while on_their_way:
                reply = self._receive()
                call.answered(on_their_way.pop(reply.id), reply)
        except grpc.RpcError as failure:
            call.broken(convert.from_rpc(failure, self._client.target))
            self.end()
        except StepstateError as error:
            call.broken(error)
            self.end()

    def _connect(self) -> None:
        if self._replies is None:
            self._requests = queue.SimpleQueue()
            self._replies = self._client.stub.StreamPacked(iter(self._requests.get, None))
            self._requests.put(self._members.bindings())
            bound = self._receive()
            if bound.HasField("error"):
                raise convert.from_status(bound.error)

    def _send(self, message: RowsInFlight) -> int:
        message.request.id = next(self._ids)
        self._requests.put(message.request)
        return message.request.id

    def _receive(self) -> pb.StreamPackedResponse:
        reply: pb.StreamPackedResponse | None = next(self._replies, None)
        if reply is None:
            raise ServerUnreachable(self._client.target, "the stream ended early")
        return reply
