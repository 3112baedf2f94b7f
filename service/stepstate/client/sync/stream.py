"""Step requests of the synchronous client: sent one after the other, by a thread that waits."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from stepstate.client import convert
from stepstate.client._protocol.session import BaseSession
from stepstate.client._protocol.steps import StepProtocol
from stepstate.client.sync.connection import Connection
from stepstate.client.times import RowsLike
from stepstate.client.types import Floats
from stepstate.errors import ServerUnreachable, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

S = TypeVar("S", bound=BaseSession)
Q = TypeVar("Q")
A = TypeVar("A")


def complete(
    protocol: StepProtocol[S],
    ask: Callable[[pb.StepRequest], pb.StepResponse],
    *,
    client: Connection,
) -> pb.StepResponse:
    """Sends a protocol's one request until it is answered.

    Raises:
        StepstateError: it can't be answered.
    """
    while True:
        error: StepstateError
        error_of = client.call_errors.begin()
        try:
            response = ask(protocol.next_request())
        except grpc.RpcError as failure:
            error = error_of(failure)
        except StepstateError as refused:
            error = refused
        else:
            if protocol.answered(response.durable_t) is not None:
                return response
            continue
        protocol.refused(error)
        time.sleep(protocol.rest())


class RequestStream(Generic[Q, A]):
    """A bidirectional call whose requests are put and whose replies are taken.

    Args:
        connect: starts the call.
        client: whose call it is.
    """

    def __init__(self, connect: Callable[..., Any], client: Connection) -> None:
        self._error_of = client.call_errors.begin()
        self._requests: queue.SimpleQueue[Q | None] = queue.SimpleQueue()
        self._replies = connect(iter(self._requests.get, None))
        self._target = client.target

    def send(self, request: Q) -> None:
        """Sends a request."""
        self._requests.put(request)

    def receive(self) -> A:
        """Waits for the next reply.

        Raises:
            StepstateError: the call broke, or ended.
        """
        try:
            reply: A | None = next(self._replies, None)
        except grpc.RpcError as failure:
            raise self._error_of(failure) from failure
        if reply is None:
            raise ServerUnreachable(self._target, "the stream ended early")
        return reply

    def end(self) -> None:
        """Ends the call."""
        self._requests.put(None)
        self._replies.cancel()


class SyncStream:
    """Step requests over StreamSteps, on a new stream when one breaks.

    Args:
        client: connected to the server.
    """

    def __init__(self, client: Connection) -> None:
        self._connect: Callable[..., Any] = client.stub.StreamSteps
        self._client = client
        self._stream: RequestStream[pb.StepRequest, pb.StepResponse] | None = None

    def step(self, session: BaseSession, x: RowsLike, timeout: float) -> Floats:
        """Applies an item to a session and returns the outputs [O] of its last row.

        Raises:
            StepstateError: as `Session.step`.
        """
        protocol = StepProtocol(session, timeout=timeout)
        protocol.add(protocol.place(x), last_only=True)
        return session.item_result(complete(protocol, self._ask, client=self._client))

    def pieces(
        self, session: BaseSession, pieces: Iterable[Floats], timeout: float, *, window: int
    ) -> Iterator[Floats]:
        """Applies pieces, some in flight, and yields the outputs [O] of the last row of each.

        Raises:
            StepstateError: as `Session.step`.
        """
        protocol = StepProtocol(session, timeout=timeout, window=window)
        source = iter(pieces)
        while True:
            while len(protocol) < window and (rows := next(source, None)) is not None:
                protocol.add(rows, last_only=True)
            if not len(protocol):
                return
            response = self._exchange(protocol)
            if response is not None:
                yield session.item_result(response)

    def end(self) -> None:
        """Ends the stream, if there is one."""
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _exchange(self, protocol: StepProtocol[BaseSession]) -> pb.StepResponse | None:
        """Sends what may be sent and takes one answer; returns it if it is the application's."""
        while protocol.sendable:
            self._send(protocol.next_request())
        try:
            response = self._receive()
        except StepstateError as ended:
            protocol.broken(ended)
        else:
            if not response.HasField("error"):
                return None if protocol.answered(response.durable_t) is None else response
            protocol.refused(convert.from_status(response.error))
        time.sleep(protocol.rest())
        return None

    def _ask(self, request: pb.StepRequest) -> pb.StepResponse:
        self._send(request)
        response = self._receive()
        if response.HasField("error"):
            raise convert.from_status(response.error)
        return response

    def _send(self, request: pb.StepRequest) -> None:
        if self._stream is None:
            self._stream = RequestStream(self._connect, self._client)
        self._stream.send(request)

    def _receive(self) -> pb.StepResponse:
        assert self._stream is not None
        try:
            return self._stream.receive()
        except StepstateError:
            self.end()
            raise
