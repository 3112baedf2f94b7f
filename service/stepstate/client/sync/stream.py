"""Steps one at a time, for the synchronous client."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._protocol.steps import StepProtocol
from stepstate.client._protocol.session import BaseSession
from stepstate.client.times import TimedRows
from stepstate.client.types import Floats
from stepstate.errors import ServerUnreachable, StepstateError
from stepstate.v1 import stepstate_pb2 as pb


def bring(
    track: StepProtocol, ask: Callable[[pb.StepRequest], pb.StepResponse], *, target: str
) -> pb.StepResponse:
    """Brings a track with one request to its answer.

    Raises:
        StepstateError: there will be none.
    """
    while True:
        request = convert.step_request(track.footing.session_id, track.next())
        error: StepstateError
        try:
            response = ask(request)
        except grpc.RpcError as failure:
            error = convert.from_rpc(failure, target)
        except StepstateError as refused:
            error = refused
        else:
            if track.answered(response.durable_t) is not None:
                return response
            continue
        track.refused(error)
        time.sleep(track.rest())


class SyncStream:
    """Requests and replies in turn over StreamSteps, on a new stream when one breaks.

    Args:
        connect: opens a stream.
        target: the server, for errors.
    """

    def __init__(self, connect: Callable[..., Any], target: str) -> None:
        self._connect = connect
        self._target = target
        self._requests: queue.SimpleQueue[pb.StepRequest | None] = queue.SimpleQueue()
        self._replies: Any = None  # what grpc gives for a call has no name

    def step(self, session: BaseSession, x: ArrayLike | TimedRows, timeout: float) -> Floats:
        """Applies an item to a session and returns the outputs [O] of its last row.

        Raises:
            StepstateError: as `AsyncSession.step`.
        """
        track = StepProtocol(session, timeout=timeout)
        track.add(track.place(x), last_only=True)
        return _taken(session, bring(track, self._ask, target=self._target))

    def flow(
        self, session: BaseSession, pieces: Iterable[Floats], timeout: float, *, window: int
    ) -> Iterator[Floats]:
        """Applies pieces, some in flight, and yields the outputs [O] of the last row of each.

        Raises:
            StepstateError: as `AsyncSession.step`.
        """
        track = StepProtocol(session, timeout=timeout, window=window)
        source = iter(pieces)
        while True:
            while len(track) < window and (rows := next(source, None)) is not None:
                track.add(rows, last_only=True)
            if not len(track):
                return
            response = self._exchange(track)
            if response is not None:
                yield _taken(session, response)

    def end(self) -> None:
        """Ends the stream, if there is one."""
        if self._replies is not None:
            self._requests.put(None)
            self._replies.cancel()
            self._replies = None

    def _exchange(self, track: StepProtocol) -> pb.StepResponse | None:
        """Sends what may be sent and takes one answer; returns it if it is the application's."""
        try:
            while track.sendable:
                self._send(convert.step_request(track.footing.session_id, track.next()))
            response = self._receive()
        except grpc.RpcError as failure:
            track.broken(convert.from_rpc(failure, self._target))
        except ServerUnreachable as ended:
            track.broken(ended)
        else:
            if not response.HasField("error"):
                return None if track.answered(response.durable_t) is None else response
            track.refused(convert.from_status(response.error))
        time.sleep(track.rest())
        return None

    def _ask(self, request: pb.StepRequest) -> pb.StepResponse:
        self._send(request)
        response = self._receive()
        if response.HasField("error"):
            raise convert.from_status(response.error)
        return response

    def _send(self, request: pb.StepRequest) -> None:
        if self._replies is None:
            self._requests = queue.SimpleQueue()
            self._replies = self._connect(iter(self._requests.get, None))
        self._requests.put(request)

    def _receive(self) -> pb.StepResponse:
        try:
            response: pb.StepResponse | None = next(self._replies, None)
        except grpc.RpcError:
            self.end()
            raise
        if response is None:
            self.end()
            raise ServerUnreachable(self._target, "the stream ended early")
        return response


def _taken(session: BaseSession, response: pb.StepResponse) -> Floats:
    """The outputs [O] of the last row of an answer that the application takes."""
    y: Floats = convert.outputs(response, session.model)[0]
    session.arrived(response.t, **convert.stand_ins(response))
    return y
