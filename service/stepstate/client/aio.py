"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from numpy.typing import ArrayLike

from stepstate.client import wire
from stepstate.client.values import Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import (
    ServerUnreachable,
    SessionClosed,
    SessionExists,
    StepstateError,
    Unavailable,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

R = TypeVar("R")

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]

TIMEOUT = 10.0
"""Seconds a call may take with all its retries."""
WINDOW = 16
"""Rows of a stream in flight: half of what a server remembers for retries by default."""


class AsyncClient:
    """A connection to a server.

    Args:
        target: host:port.
        timeout: seconds that a call may take with all its retries.
    """

    def __init__(self, target: str, *, timeout: float = TIMEOUT) -> None:
        self.target = target
        self.timeout = timeout
        self._channel = grpc.aio.insecure_channel(target, options=list(wire.CHANNEL_OPTIONS))
        self.stub = StepstateServiceStub(self._channel)
        self._models: dict[tuple[str, str], ModelInfo] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.disconnect()

    async def disconnect(self) -> None:
        """Closes the connection; sessions stay open on the server."""
        await self._channel.close()

    async def open(
        self,
        model: str = "",
        *,
        version: str = "",
        session_id: str | None = None,
        start_time: datetime | None = None,
        idle_timeout: timedelta | None = None,
    ) -> AsyncSession:
        """Opens a session with zero state.

        Args:
            model: its name; may be left out where the server has one model.
            version: empty for the newest.
            session_id: 1 to 128 of A-Z a-z 0-9 . _ : -; left out, one is made.
            start_time: time of the first row; without a zone it is read as UTC.
            idle_timeout: the session expires when no step came for this long.

        Raises:
            SessionExists, ModelUnknown, InvalidField, SessionLimit, Unavailable.
        """
        request = wire.opening(model, version, session_id, start_time, idle_timeout)
        try:
            reply = await self.call(self.stub.OpenSession, request)
            info = wire.session_info(reply.session)
        except SessionExists:
            if session_id is not None:
                raise
            info = await self.info(request.session_id)  # ours: a first try's reply was lost
        return AsyncSession(self, await self.model(info.model, info.version), info)

    async def session(self, session_id: str) -> AsyncSession:
        """An open session, to go on from where it stands.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, InvalidField, Unavailable.
        """
        info = await self.info(session_id)
        return AsyncSession(self, await self.model(info.model, info.version), info)

    async def info(self, session_id: str) -> SessionInfo:
        """Where a session stands. Raises as `session`."""
        reply = await self.call(self.stub.GetSession, pb.GetSessionRequest(session_id=session_id))
        return wire.session_info(reply.session)

    async def sessions(self, model: str = "") -> AsyncIterator[SessionInfo]:
        """All open sessions, page by page."""
        request = pb.ListSessionsRequest(model=model, page_size=1000)
        while True:
            reply = await self.call(self.stub.ListSessions, request)
            for session in reply.sessions:
                yield wire.session_info(session)
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    async def close(self, session_id: str) -> SessionInfo:
        """Closes a session and returns how it stood. Raises as `session`."""
        request = pb.CloseSessionRequest(session_id=session_id)
        return wire.session_info((await self.call(self.stub.CloseSession, request)).session)

    async def models(self) -> list[ModelInfo]:
        """The loaded models."""
        reply = await self.call(self.stub.ListModels, pb.ListModelsRequest())
        return [wire.model_info(model) for model in reply.models]

    async def model(self, name: str = "", version: str = "") -> ModelInfo:
        """One loaded model; an empty version means the newest.

        Raises:
            ModelUnknown, Unavailable.
        """
        known = self._models.get((name, version))
        if known is None:
            request = pb.GetModelRequest(model=name, version=version)
            known = wire.model_info((await self.call(self.stub.GetModel, request)).model)
            if version:
                self._models[name, version] = known
        return known

    async def call(
        self, rpc: Callable[..., Awaitable[R]], request: object, timeout: float | None = None
    ) -> R:
        """Makes a unary call that may be repeated, until it is answered or time is up.

        Raises:
            StepstateError: as the server answered.
        """
        backoff = wire.Backoff(self.timeout if timeout is None else timeout)
        while True:
            try:
                return await rpc(request, timeout=max(backoff.left, 0.001))
            except grpc.aio.AioRpcError as failure:
                error = wire.from_rpc(failure, self.target)
            if not isinstance(error, Unavailable):
                raise error
            await asyncio.sleep(backoff.wait(error))


class AsyncSession:
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows applied. One task at a time may step a session.
    """

    def __init__(self, client: AsyncClient, model: ModelInfo, info: SessionInfo) -> None:
        self.session_id = info.session_id
        self.model = model
        self.t = info.t
        self.client = client
        self._info = info

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def step(
        self, x: ArrayLike, *, last_only: bool = False, timeout: float | None = None
    ) -> Floats:
        """Applies one row or many, all or none of them, and returns their outputs.

        A lost reply is asked for again with the same t, which applies nothing
        twice. If the task is cancelled meanwhile, call again with the same x.

        Args:
            x: one row [D], or many [T, D], in raw units; finite.
            last_only: return the outputs of the last row only.
            timeout: seconds for all tries.

        Returns:
            y [O] for one row or with last_only, else [T, O], in raw units.

        Raises:
            InvalidField, NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed: the session is gone.
            StepAhead, StepMismatch, StepTooOld: someone else steps it too.
            Unavailable: no answer in time.
        """
        rows, alone = self.model.rows(x)
        request = wire.step_request(self.session_id, self.t, rows, last_only=last_only)
        response = await self.client.call(self.client.stub.Step, request, timeout)
        y = wire.outputs(response, self.model)
        self.t = response.t
        return y[0] if alone or last_only else y

    async def inspect(self, x: ArrayLike, *, timeout: float | None = None) -> Inspection:
        """Applies rows like `step`, and also returns the gates and states of every layer."""
        rows, _ = self.model.rows(x)
        request = wire.step_request(self.session_id, self.t, rows, inspect=True)
        response = await self.client.call(self.client.stub.Step, request, timeout)
        found = wire.inspection(response, self.model)
        self.t = response.t
        return found

    async def stream(
        self, xs: Iterable[ArrayLike] | AsyncIterable[ArrayLike]
    ) -> AsyncIterator[Floats]:
        """Applies rows as they come and yields the outputs [O] of each, in order.

        Up to `WINDOW` items are in flight; an item may also be many rows [T, D],
        whose last outputs are then yielded. When the connection breaks it is made
        again, and what was not answered is sent again with the same t. Ends
        with the error if a row can't be applied; `t` says how far it got. After
        leaving the loop early, call `refresh` before the next step: rows in
        flight may have been applied.

        Args:
            xs: rows [D], from an iterable or an async iterable.

        Raises:
            As `step`.
        """
        pipeline = _Pipeline(self, xs)
        feeding = asyncio.create_task(pipeline.feed())
        try:
            async for response in pipeline.replies():
                y = wire.outputs(response, self.model)
                self.t = response.t
                yield y[0]
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def refresh(self) -> SessionInfo:
        """Asks the server where the session stands, and takes its t."""
        info = await self.client.info(self.session_id)
        self.t = info.t
        return info

    async def close(self) -> SessionInfo:
        """Closes the session on the server; that it is closed already is no error."""
        try:
            return await self.client.close(self.session_id)
        except SessionClosed as closed:  # perhaps by a first try, whose reply was lost
            return replace(self._info, t=closed.t)


class _Pipeline:
    """Rows on their way over StreamSteps, and the requests that are not answered yet."""

    def __init__(
        self, session: AsyncSession, xs: Iterable[ArrayLike] | AsyncIterable[ArrayLike]
    ) -> None:
        self._session = session
        self._xs = xs
        self._unanswered: deque[pb.StepRequest] = deque()
        self._room = asyncio.Semaphore(WINDOW)
        self._writing = asyncio.Lock()
        self._call: Call | None = None
        self._fed = False
        self._failure: Exception | None = None

    async def feed(self) -> None:
        """Sends the rows as they come; an error of theirs is raised when all sent is answered."""
        try:
            await self._feed_rows()
        except Exception as error:  # noqa: BLE001 - whatever the application's iterator raises
            self._failure = error
        async with self._writing:
            self._fed = True
            await self._send(None)

    async def _feed_rows(self) -> None:
        t = self._session.t
        async for x in _each(self._xs):
            rows, _ = self._session.model.rows(x)
            request = wire.step_request(self._session.session_id, t, rows, last_only=True)
            t += len(rows)
            await self._room.acquire()
            async with self._writing:
                self._unanswered.append(request)
                await self._send(request)

    async def replies(self) -> AsyncIterator[pb.StepResponse]:
        """The replies in order, over as many connections as it takes."""
        client = self._session.client
        backoff: wire.Backoff | None = None
        while not (self._fed and not self._unanswered):
            try:
                await self._connect()
                async for response in self._read():
                    backoff = None
                    yield response
                continue
            except grpc.aio.AioRpcError as failure:
                error = wire.from_rpc(failure, client.target)
            except StepstateError as refused:
                error = refused
            if not isinstance(error, Unavailable):
                raise error
            backoff = backoff or wire.Backoff(client.timeout)  # from the first failure in a row on
            await asyncio.sleep(backoff.wait(error))
        if self._failure is not None:
            raise self._failure

    async def _connect(self) -> None:
        """Opens a stream and sends on it what is not answered."""
        async with self._writing:
            self._call = self._session.client.stub.StreamSteps()
            for request in list(self._unanswered):
                await self._send(request)
            if self._fed:
                await self._send(None)

    async def _read(self) -> AsyncIterator[pb.StepResponse]:
        """The replies of one stream; a refusal ends it and is raised."""
        call = self._call
        assert call is not None
        try:
            async for response in call:
                if response.HasField("error"):
                    raise wire.from_status(response.error)
                self._unanswered.popleft()
                self._room.release()
                yield response
            if self._unanswered:
                raise ServerUnreachable(self._session.client.target, "the stream ended early")
        finally:
            call.cancel()
            self._call = None

    async def _send(self, request: pb.StepRequest | None) -> None:
        """Writes a request, or the end; a broken stream is the reader's to notice."""
        if self._call is None:
            return
        try:
            if request is None:
                await self._call.done_writing()
            else:
                await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        except asyncio.CancelledError:  # of the call, by the reader, or else of this task
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise


async def _each(xs: Iterable[ArrayLike] | AsyncIterable[ArrayLike]) -> AsyncIterator[ArrayLike]:
    if isinstance(xs, AsyncIterable):
        async for x in xs:
            yield x
    else:
        for x in xs:
            yield x
