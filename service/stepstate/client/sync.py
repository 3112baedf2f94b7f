"""The synchronous client: the same as `AsyncClient`, for code without an event loop."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from numpy.typing import ArrayLike

from stepstate.client import wire
from stepstate.client.aio import TIMEOUT
from stepstate.client.values import Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import ServerUnreachable, SessionClosed, SessionExists, Unavailable
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

R = TypeVar("R")


class Client:
    """A connection to a server; threads may share it. See `AsyncClient`."""

    def __init__(self, target: str, *, timeout: float = TIMEOUT) -> None:
        self.target = target
        self.timeout = timeout
        self._channel = grpc.insecure_channel(target, options=list(wire.CHANNEL_OPTIONS))
        self.stub = StepstateServiceStub(self._channel)
        self._models: dict[tuple[str, str], ModelInfo] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Closes the connection; sessions stay open on the server."""
        self._channel.close()

    def open(
        self,
        model: str = "",
        *,
        version: str = "",
        session_id: str | None = None,
        start_time: datetime | None = None,
        idle_timeout: timedelta | None = None,
    ) -> Session:
        """Opens a session with zero state. See `AsyncClient.open`."""
        request = wire.opening(model, version, session_id, start_time, idle_timeout)
        try:
            info = wire.session_info(self.call(self.stub.OpenSession, request).session)
        except SessionExists:
            if session_id is not None:
                raise
            info = self.info(request.session_id)  # ours: a first try's reply was lost
        return Session(self, self.model(info.model, info.version), info)

    def session(self, session_id: str) -> Session:
        """An open session, to go on from where it stands. See `AsyncClient.session`."""
        info = self.info(session_id)
        return Session(self, self.model(info.model, info.version), info)

    def info(self, session_id: str) -> SessionInfo:
        """Where a session stands."""
        request = pb.GetSessionRequest(session_id=session_id)
        return wire.session_info(self.call(self.stub.GetSession, request).session)

    def sessions(self, model: str = "") -> Iterator[SessionInfo]:
        """All open sessions, page by page."""
        request = pb.ListSessionsRequest(model=model, page_size=1000)
        while True:
            reply = self.call(self.stub.ListSessions, request)
            yield from map(wire.session_info, reply.sessions)
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    def close(self, session_id: str) -> SessionInfo:
        """Closes a session and returns how it stood."""
        request = pb.CloseSessionRequest(session_id=session_id)
        return wire.session_info(self.call(self.stub.CloseSession, request).session)

    def models(self) -> list[ModelInfo]:
        """The loaded models."""
        reply = self.call(self.stub.ListModels, pb.ListModelsRequest())
        return [wire.model_info(model) for model in reply.models]

    def model(self, name: str = "", version: str = "") -> ModelInfo:
        """One loaded model; an empty version means the newest."""
        known = self._models.get((name, version))
        if known is None:
            request = pb.GetModelRequest(model=name, version=version)
            known = wire.model_info(self.call(self.stub.GetModel, request).model)
            if version:
                self._models[name, version] = known
        return known

    def call(self, rpc: Callable[..., R], request: object, timeout: float | None = None) -> R:
        """Makes a unary call that may be repeated, until it is answered or time is up."""
        backoff = wire.Backoff(self.timeout if timeout is None else timeout)
        while True:
            try:
                return rpc(request, timeout=max(backoff.left, 0.001))
            except grpc.RpcError as failure:
                error = wire.from_rpc(failure, self.target)
            if not isinstance(error, Unavailable):
                raise error
            time.sleep(backoff.wait(error))


class Session:
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows applied. One thread at a time may step a session. Every
    method raises what the same one of `AsyncSession` does.
    """

    def __init__(self, client: Client, model: ModelInfo, info: SessionInfo) -> None:
        self.session_id = info.session_id
        self.model = model
        self.t = info.t
        self.client = client
        self._info = info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def step(
        self, x: ArrayLike, *, last_only: bool = False, timeout: float | None = None
    ) -> Floats:
        """Applies one row or many, and returns their outputs. See `AsyncSession.step`."""
        rows, alone = self.model.rows(x)
        request = wire.step_request(self.session_id, self.t, rows, last_only=last_only)
        response = self.client.call(self.client.stub.Step, request, timeout)
        y = wire.outputs(response, self.model)
        self.t = response.t
        return y[0] if alone or last_only else y

    def inspect(self, x: ArrayLike, *, timeout: float | None = None) -> Inspection:
        """Applies rows like `step`, and also returns the gates and states of every layer."""
        rows, _ = self.model.rows(x)
        request = wire.step_request(self.session_id, self.t, rows, inspect=True)
        response = self.client.call(self.client.stub.Step, request, timeout)
        found = wire.inspection(response, self.model)
        self.t = response.t
        return found

    def stream(self, xs: Iterable[ArrayLike]) -> Iterator[Floats]:
        """Applies rows as they come and yields the outputs [O] of each.

        One row is in flight at a time, so that each output is there before the
        next row is asked for. For speed over many rows that are known already,
        give them to `step` at once, or use `AsyncSession.stream`.
        """
        turns = _Turns(self.client)
        try:
            for x in xs:
                rows, _ = self.model.rows(x)
                request = wire.step_request(self.session_id, self.t, rows, last_only=True)
                response = turns.ask(request)
                y = wire.outputs(response, self.model)
                self.t = response.t
                yield y[0]
        finally:
            turns.end()

    def refresh(self) -> SessionInfo:
        """Asks the server where the session stands, and takes its t."""
        info = self.client.info(self.session_id)
        self.t = info.t
        return info

    def close(self) -> SessionInfo:
        """Closes the session on the server; that it is closed already is no error."""
        try:
            return self.client.close(self.session_id)
        except SessionClosed as closed:  # perhaps by a first try, whose reply was lost
            return replace(self._info, t=closed.t)


class _Turns:
    """Requests and replies in turn over StreamSteps, on a new stream when one breaks."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._requests: queue.SimpleQueue[pb.StepRequest | None] = queue.SimpleQueue()
        self._replies: Any = None  # what grpc gives for a call has no name

    def ask(self, request: pb.StepRequest) -> pb.StepResponse:
        backoff = wire.Backoff(self._client.timeout)
        while True:
            try:
                return self._try(request)
            except grpc.RpcError as failure:
                error = wire.from_rpc(failure, self._client.target)
            except Unavailable as refused:
                error = refused
            self.end()
            if not isinstance(error, Unavailable):
                raise error
            time.sleep(backoff.wait(error))

    def end(self) -> None:
        """Ends the stream, if there is one."""
        if self._replies is not None:
            self._requests.put(None)
            self._replies.cancel()
            self._replies = None

    def _try(self, request: pb.StepRequest) -> pb.StepResponse:
        if self._replies is None:
            self._requests = queue.SimpleQueue()
            self._replies = self._client.stub.StreamSteps(iter(self._requests.get, None))
        self._requests.put(request)
        response: pb.StepResponse | None = next(self._replies, None)
        if response is None:
            raise ServerUnreachable(self._client.target, "the stream ended early")
        if response.HasField("error"):
            raise wire.from_status(response.error)
        return response
