"""The synchronous client: the same as `AsyncClient`, for code without an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self, TypeVar, overload

import grpc
from numpy.typing import ArrayLike

from stepstate.client import wire
from stepstate.client.asking import Asking, Told, listed
from stepstate.client.backlog import RESUME_ROWS
from stepstate.client.channel import (
    CONNECT_TIMEOUT,
    TIMEOUT,
    Metadata,
    MetadataChannel,
    Options,
    Reach,
    Tries,
    channel_options,
)
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.history import History, Progress, start_of
from stepstate.client.sync_pack import Pack
from stepstate.client.sync_session import Session
from stepstate.client.times import TimedRows
from stepstate.client.turns import Turns
from stepstate.client.values import (
    Durability,
    Floats,
    MissingPolicy,
    ModelInfo,
    Result,
    SessionInfo,
)
from stepstate.errors import (
    Cancelled,
    Draining,
    ServerUnreachable,
    SessionExists,
    StepstateError,
    Unavailable,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

R = TypeVar("R")


class Client:
    """A connection to a server; threads may share it. See `AsyncClient`."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float = TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        resume_rows: int = RESUME_ROWS,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        options: Options = (),
    ) -> None:
        self.target = target
        self.timeout = timeout
        self.resume_rows = resume_rows
        all_options = channel_options(options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=all_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=all_options)
        self._stub = StepstateServiceStub(MetadataChannel(self._channel, metadata))
        self._reach = Reach(connect_timeout)
        self._disconnected = False
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

    def __repr__(self) -> str:
        return f"Client({self.target!r}{', disconnected' if self._disconnected else ''})"

    @property
    def stub(self) -> StepstateServiceStub:
        """The calls of the contract. Raises `Cancelled` after `disconnect`."""
        if self._disconnected:
            raise Cancelled(wire.DISCONNECTED)
        return self._stub

    def disconnect(self) -> None:
        """Closes the connection; sessions stay open on the server."""
        self._disconnected = True
        self._channel.close()

    def open(
        self,
        model: str = "",
        *,
        version: str = "",
        session_id: str | None = None,
        start_time: datetime | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
        missing: MissingPolicy | None = None,
        interval_level: float | None = None,
        history: History | None = None,
        progress: Progress | None = None,
    ) -> Session:
        """Opens a session with zero state. See `AsyncClient.open`."""
        if history is not None and start_time is None:
            start_time, history = start_of(history)
        request = wire.opening(
            model,
            version,
            session_id,
            start_time=start_time,
            idle_timeout=idle_timeout,
            durability=durability,
            missing=missing,
            interval_level=interval_level,
        )
        try:
            info = wire.session_info(self.call(self.stub.OpenSession, request).session)
        except SessionExists:
            if session_id is not None:
                raise
            info = self.info(request.session_id)  # ours: a first try's reply was lost
        session = self._session(info)
        if history is None:
            return session
        try:
            session.prime(history, progress=progress)
        except Unavailable:
            raise
        except Exception:
            with suppress(StepstateError):
                session.close()
            raise
        return session

    def session(self, session_id: str, t: int | None = None) -> Session:
        """An open session, to go on from its t, or from one's own. See `AsyncClient.session`."""
        return self._session(self.info(session_id), t)

    def info(self, session_id: str) -> SessionInfo:
        """Where a session stands."""
        request = pb.GetSessionRequest(session_id=session_id)
        return wire.session_info(self.call(self.stub.GetSession, request).session)

    def sessions(self, model: str = "", *, show_expired: bool = False) -> Iterator[SessionInfo]:
        """All open sessions, page by page.

        Args:
            model: only those of this model; empty: of all.
            show_expired: also those that were idle for too long and are still kept.
        """
        request = pb.ListSessionsRequest(model=model, page_size=1000, show_expired=show_expired)
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

    def reset_accuracy(self, session_id: str) -> SessionInfo:
        """Begins a session's accuracy and drift anew. See `AsyncClient.reset_accuracy`."""
        request = pb.ResetAccuracyRequest(session_id=session_id)
        return wire.session_info(self.call(self.stub.ResetAccuracy, request).session)

    def fork(
        self,
        session: Session | str,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        """Opens a session that starts from a copy of another. See `AsyncClient.fork`."""
        source_id = session if isinstance(session, str) else session.session_id
        request = wire.forking(source_id, new_id, idle_timeout, durability)
        try:
            info = wire.session_info(self.call(self.stub.ForkSession, request).session)
        except SessionExists:
            if new_id is not None:
                raise
            info = self.info(request.new_session_id)  # ours: a first try's reply was lost
        forked = self._session(info)
        if not isinstance(session, str):
            forked.follow(session, resume_rows=self.resume_rows)
        return forked

    def export(self, session_id: str) -> bytes:
        """A session's snapshot. See `AsyncClient.export`."""
        request = pb.ExportSessionRequest(session_id=session_id)
        snapshot: bytes = self.call(self.stub.ExportSession, request).snapshot
        return snapshot

    def restore_expired(self, session_id: str) -> Session:
        """Opens a session again that was idle for too long, as it was.

        Its state, its t and what it remembers of its replies are what they were, and its
        idle time begins anew.

        Raises:
            SessionExists: it is open. If a first reply was lost, this call may have
                opened it: `session` tells its t.
            SessionExpired: it was kept until its `purge_time`, and is deleted.
            SessionUnknown, SessionClosed, SessionLost: there is nothing to open again.
            As `open`.
        """
        request = pb.RestoreSessionRequest(session_id=session_id)
        reply = self.call(self.stub.RestoreSession, request)
        return self._session(wire.session_info(reply.session))

    def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        """Opens a session from a snapshot. See `AsyncClient.restore`."""
        request = wire.importing(snapshot, session_id, idle_timeout, durability)
        return self._session(wire.session_info(self.call(self.stub.ImportSession, request).session))

    def stream(
        self, items: Iterable[tuple[Session, ArrayLike | TimedRows]]
    ) -> Iterator[Result[Session]]:
        """Steps many sessions on one connection, and yields a result for every item.

        Results come in the order of the items: one is in flight at a time, so
        that each output is there before the next item is asked for. An error
        that ends a session is the result of the item it came for, and of all
        later items of that session, none of which is applied; the others go on.
        `AsyncClient.stream` has many items in flight.

        Raises:
            ServerUnreachable, Draining: no connection for `timeout` seconds.
        """
        turns, ended = Turns(self.stub.StreamSteps, self.target), dict[str, StepstateError]()
        try:
            for session, x in items:
                y: Floats | None = None
                if session.session_id not in ended:
                    try:
                        y = turns.step(session, x, self.timeout)
                    except (ServerUnreachable, Draining):
                        raise
                    except StepstateError as error:
                        ended[session.session_id] = error
                if y is None:
                    yield Result(session, None, ended[session.session_id])
                else:
                    told = {
                        "imputed_rows": session.imputed_rows,
                        "fallback_rows": session.fallback_rows,
                    }
                    yield Result(session, y, None, **told, t=session.t, time=session.time())
        finally:
            turns.end()

    def packed(self, sessions: Sequence[Session]) -> Pack:
        """Many sessions of one model, to be stepped together by columns. See `Pack`.

        >>> def meters(client, sessions, readings):  # readings yields x [sessions, D]
        ...     with client.packed(sessions) as pack:
        ...         for x in readings:
        ...             result = pack.step(x)
        ...             print(result.y.mean(), result.errors)
        """
        return Pack(self, sessions)

    @overload
    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: None = None,
        timeout: float | None = None,
    ) -> list[Forecast | StepstateError]: ...

    @overload
    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios,
        timeout: float | None = None,
    ) -> list[dict[str, Forecast] | StepstateError]: ...

    @overload
    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None,
        timeout: float | None = None,
    ) -> Sequence[Told]: ...

    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Sequence[Told]:
        """Forecasts from where each of many sessions stands. See `AsyncClient.forecast`."""
        wanted = listed(sessions)
        asking = Asking(
            wanted,
            horizon,
            quantiles=quantiles,
            scenarios=scenarios,
            models=self.models() if any(isinstance(one, str) for one in wanted) else (),
            timeout=self.timeout if timeout is None else timeout,
        )
        while not asking.done:
            for some, request in asking.calls():
                try:
                    left = asking.backoff.left
                    asking.answered(some, self.call(self.stub.Forecast, request, left))
                except StepstateError as error:
                    asking.refused(some, error)
            for one, session, t in asking.behind:
                try:
                    session.catch_up(t, timeout=timeout)
                except StepstateError as error:
                    asking.brought_up(one, error)
                else:
                    asking.brought_up(one)
            time.sleep(asking.pause())
        return asking.told

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
        tries = Tries(self._reach, self.timeout if timeout is None else timeout)
        while True:
            connected = self._connected(tries.connecting)
            try:
                reply = rpc(request, timeout=tries.left(connected=connected))
            except grpc.RpcError as failure:
                error = wire.from_rpc(failure, self.target)
            else:
                self._reach.reached = True
                return reply
            time.sleep(tries.wait(error))

    def _connected(self, seconds: float | None) -> bool:
        """Waits for a connection, where there never was one; whether it came in time."""
        if seconds is None:
            return True
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=seconds)
        except grpc.FutureTimeoutError:
            return False
        finally:
            ready.cancel()
        return True

    def _session(self, info: SessionInfo, t: int | None = None) -> Session:
        return Session(self, self.model(info.model, info.version), info, t=t)
