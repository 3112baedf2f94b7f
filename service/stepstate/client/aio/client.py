"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self, TypeVar, overload

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._connection import (
    CONNECT_TIMEOUT,
    TIMEOUT,
    CallAttempts,
    Metadata,
    MetadataChannel,
    Options,
    ServerReach,
    channel_options,
)
from stepstate.client._protocol.forecasts import ForecastProtocol, Told, listed
from stepstate.client._protocol.replay import RESUME_ROWS
from stepstate.client._protocol.steps import WINDOW
from stepstate.client.aio.pack import AsyncPack
from stepstate.client.aio.session import AsyncSession
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client._protocol.history import History, Progress, start_of_async
from stepstate.client.aio.pipeline import MAX_ITEMS, Items, Pipeline
from stepstate.client.times import TimedRows
from stepstate.client.types import Durability, MissingPolicy, ModelInfo, Result, SessionInfo
from stepstate.errors import Cancelled, SessionExists, StepstateError, Unavailable
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

__all__ = ["WINDOW", "AsyncClient"]

R = TypeVar("R")


class AsyncClient:
    """A connection to a server; tasks may share it.

    Its sessions survive the end of the server: `AsyncSession` tells how.

    Args:
        target: host:port, or another name that gRPC resolves.
        timeout: seconds that a call may take with all its retries, and that a
            stream goes on without an answer. The default survives the restart
            of a server. `step`, `prime`, `forecast` and others take
            one of their own.
        connect_timeout: seconds until a server must have answered for the first
            time; a wrong address is told after them.
        resume_rows: most rows that each session keeps, to send them again to a
            server that was set back. What a server has saved is not kept.
        credentials: of the channel, for a server or proxy with TLS:
            `grpc.ssl_channel_credentials(...)`, also composed with call
            credentials. Left out: plain text.
        metadata: keys and values that go with every call, such as
            ("authorization", "Bearer ..."). Over plain text anyone on the way
            can read them.
        options: gRPC's channel options, such as
            ("grpc.ssl_target_name_override", "stepstate"); they take the place
            of the client's own of the same name.
    """

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
            self._channel = grpc.aio.insecure_channel(target, options=all_options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=all_options)
        self._stub = StepstateServiceStub(MetadataChannel(self._channel, metadata))
        self._reach = ServerReach(connect_timeout)
        self._disconnected = False
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

    def __repr__(self) -> str:
        return f"AsyncClient({self.target!r}{', disconnected' if self._disconnected else ''})"

    @property
    def stub(self) -> StepstateServiceStub:
        """The calls of the contract.

        Raises:
            Cancelled: the client was disconnected.
        """
        if self._disconnected:
            raise Cancelled(convert.DISCONNECTED)
        return self._stub

    async def disconnect(self) -> None:
        """Closes the connection; sessions stay open on the server."""
        self._disconnected = True
        await self._channel.close()

    async def open(
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
        history: History | AsyncIterable[ArrayLike | TimedRows] | None = None,
        progress: Progress | None = None,
    ) -> AsyncSession:
        """Opens a session with zero state.

        Args:
            model: its name; may be left out where the server has one model.
            version: empty for the newest.
            session_id: 1 to 128 of A-Z a-z 0-9 . _ : -; left out, one is made.
            start_time: time of the first row; without a zone it is read as UTC. Left
                out: that of the first row of `history`, if it has times.
            idle_timeout: the session expires when no step came for this long; left
                out: the server's own choice.
            durability: "async": steps are answered at once and saved a little
                later, and the session sends again what a server lost. "sync": a
                step is answered when it is saved. "none": the session is lost when
                its server ends unexpectedly. Left out: the
                server's own choice, async if it has a store that lasts.
            missing: what a NaN in a row means. "reject", the default: the row is
                refused. "impute": the model's own forecast of the value stands in,
                or the value of the row before where it makes none. "hold": that of
                the row before; before a column's first value, its level (the mean
                and profile that the model takes off it).
            interval_level: the share of truths that the session's intervals are to
                cover, for example 0.9; left out: the model's own.
            history: rows [T, D] that the session is brought up to date with: an
                array, a DataFrame, `TimedRows`, or an iterable of such chunks, also
                an asynchronous one. If it can't be, the session is closed again,
                unless the server was out of reach: it then stays open as far as it
                got.
            progress: called with the rows of the history that are done, and with
                how many there are, None where that is not known.

        Raises:
            SessionExists: the id is open already.
            ModelUnknown: no such model or version is loaded.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
            NonFiniteInput, NonFiniteResult: the history can't be applied; `row` is
                its place in the history.
        """
        if history is not None and start_time is None:
            start_time, history = await start_of_async(history)
        request = convert.opening(
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
            info = convert.session_info((await self.call(self.stub.OpenSession, request)).session)
        except SessionExists:
            if session_id is not None:
                raise
            info = await self.info(request.session_id)  # ours: a first try's reply was lost
        session = await self._session(info)
        if history is None:
            return session
        try:
            await session.prime(history, progress=progress)
        except Unavailable:
            raise
        except Exception:
            with suppress(StepstateError):
                await session.close()
            raise
        return session

    async def session(self, session_id: str, t: int | None = None) -> AsyncSession:
        """An open session, to go on from where it is, or from the application's own t.

        An application that was stopped and knows from its records that it has
        the outputs of t rows says so, and goes on with row t: of rows that
        were applied without its knowing it is given the same outputs again, as
        far as the server remembers them (by default the last 32 requests). If
        the server is before t, a step raises `RowsMissing`, which names
        the rows it needs: this object never had them.

        Args:
            session_id: the session's.
            t: rows whose outputs the application has; left out: as many as the server
                has applied.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """
        return await self._session(await self.info(session_id), t)

    async def info(self, session_id: str) -> SessionInfo:
        """Where a session is, by the server's word.

        Args:
            session_id: the session's.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """
        reply = await self.call(self.stub.GetSession, pb.GetSessionRequest(session_id=session_id))
        return convert.session_info(reply.session)

    async def sessions(
        self, model: str = "", *, show_expired: bool = False
    ) -> AsyncIterator[SessionInfo]:
        """All open sessions, page by page.

        Args:
            model: only those of this model; empty: of all.
            show_expired: also those that were idle for too long and are still kept.

        Raises:
            InvalidField: there can be no such model.
            Unavailable: no answer in time.
        """
        request = pb.ListSessionsRequest(model=model, page_size=1000, show_expired=show_expired)
        while True:
            reply = await self.call(self.stub.ListSessions, request)
            for session in reply.sessions:
                yield convert.session_info(session)
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    async def close(self, session_id: str) -> SessionInfo:
        """Closes a session and returns how it was.

        Args:
            session_id: the session's.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """
        request = pb.CloseSessionRequest(session_id=session_id)
        return convert.session_info((await self.call(self.stub.CloseSession, request)).session)

    async def reset_accuracy(self, session_id: str) -> SessionInfo:
        """Begins a session's accuracy and drift anew, after the steps accepted so far.

        Its state, t, forecasts and intervals go on as they were. It is saved, if the
        session's steps are, before this returns.

        Args:
            session_id: the session's.

        Returns:
            The session, as it is then.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """
        request = pb.ResetAccuracyRequest(session_id=session_id)
        return convert.session_info((await self.call(self.stub.ResetAccuracy, request)).session)

    async def fork(
        self,
        session: AsyncSession | str,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        """Opens a session that starts from a copy of another, and goes on apart from it.

        Args:
            session: what to copy, or its id. The fork of an `AsyncSession` is at
                its t, and keeps the same rows to send them again.
            new_id: the fork's, 1 to 128 of A-Z a-z 0-9 . _ : -; left out, one is made.
            idle_timeout: the session expires when no step came for this long; left
                out: that of the source.
            durability: "async": steps are answered at once and saved a little
                later, and the session sends again what a server lost. "sync": a
                step is answered when it is saved. "none": the session is lost when
                its server ends unexpectedly. Left out: as the source.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the source is
                gone.
            SessionExists: the new id is open already.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """
        source_id = session if isinstance(session, str) else session.session_id
        request = convert.forking(source_id, new_id, idle_timeout, durability)
        try:
            info = convert.session_info((await self.call(self.stub.ForkSession, request)).session)
        except SessionExists:
            if new_id is not None:
                raise
            info = await self.info(request.new_session_id)  # a first try's reply was lost
        forked = await self._session(info)
        if not isinstance(session, str):
            forked.follow(session, resume_rows=self.resume_rows)
        return forked

    async def export(self, session_id: str) -> bytes:
        """A session's snapshot: all that a server with the same model needs to go on with it.

        The session stays open; `restore` opens it elsewhere.

        Args:
            session_id: the session's.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

        async def parts(request: object, timeout: float | None = None) -> bytes:
            call = self.stub.StreamExport(request, timeout=timeout)
            return b"".join([reply.data async for reply in call])

        return await self.call(parts, pb.StreamExportRequest(session_id=session_id))

    async def restore_expired(self, session_id: str) -> AsyncSession:
        """Opens a session again that was idle for too long, as it was.

        Its state, its t and what it remembers of its replies are what they were, and its
        idle time begins anew.

        Args:
            session_id: the session's.

        Raises:
            SessionExists: it is open. If a first reply was lost, this call may have
                opened it: `session` tells its t.
            SessionExpired: it was kept until its `purge_time`, and is deleted.
            SessionUnknown, SessionClosed, SessionLost: there is nothing to open again.
            SessionLimit: the server has no room for one more session.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """
        request = pb.RestoreSessionRequest(session_id=session_id)
        reply = await self.call(self.stub.RestoreSession, request)
        return await self._session(convert.session_info(reply.session))

    async def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        """Opens a session from a snapshot that `export` made, here or elsewhere.

        Args:
            snapshot: its bytes.
            session_id: 1 to 128 of A-Z a-z 0-9 . _ : -; left out: that of the
                exported session.
            idle_timeout: the session expires when no step came for this long; left
                out: as exported.
            durability: "async": steps are answered at once and saved a little
                later, and the session sends again what a server lost. "sync": a
                step is answered when it is saved. "none": the session is lost when
                its server ends unexpectedly. Left out: as
                exported, or what this server can keep.

        Raises:
            SnapshotCorrupt, SnapshotModelMismatch: it is damaged, or of another model.
            SessionExists: the id is open. If a first reply was lost it may be this
                very snapshot that opened it: `session` tells its t.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """
        requests = convert.importing(snapshot, session_id, idle_timeout, durability)
        reply = await self.call(self.stub.StreamImport, requests)
        return await self._session(convert.session_info(reply.session))

    async def stream(
        self,
        items: Items[AsyncSession],
        *,
        max_items: int = MAX_ITEMS,
    ) -> AsyncIterator[Result[AsyncSession]]:
        """Steps many sessions on one connection, and yields a result for every item.

        >>> async def steps(client, readings):  # readings yields (session, x)
        ...     async for result in client.stream(readings):
        ...         print(result.session.session_id, result.session.t, result.y)

        Results of one session come in the order of its items, those of
        different sessions as they are ready. A session's t is that of its
        last result. An item may be one row [D] or many [T, D], with times or
        without; its result is that of the last one.

        Up to `WINDOW` items of a session are in flight. Beyond that its items
        wait in a queue of its own, and so do those of a session that is sent
        rows again, refused for now or slow: none holds up the others. When
        `max_items` of all sessions were taken and their results were not, or
        64 MiB of rows are waiting, no more is taken from the source until some
        results are.

        When the connection breaks it is made again, and what was not answered
        is sent again with the same t; a session that the server was set back
        in is sent what it lacks first. Each output is given once.

        An error that ends a session (a row that can't be applied, a session
        that is closed, `RowsMissing`) is the result of the item it came for,
        and of all later items of that session, none of which is applied; the
        others go on. `session.t` says how far it got: go on with it in another
        stream. After leaving the loop early go on from each session's t with
        the same rows, or call `refresh` first.

        Args:
            items: pairs (session, x), from an iterable or an async iterable.
            max_items: bound for items that wait.

        Raises:
            Unavailable: no connection for `timeout` seconds.
            InvalidField: two objects were given for one session.
            Exception: what `items` raised, after the results of the items before.
        """
        pipeline = Pipeline(
            items,
            self.stub.StreamSteps,
            target=self.target,
            timeout=self.timeout,
            most=max_items,
        )
        try:
            while (result := await pipeline.next()) is not None:
                yield result
        finally:
            await pipeline.end()

    def packed(self, sessions: Sequence[AsyncSession]) -> AsyncPack:
        """Many sessions of one model, to be stepped together by columns.

        >>> async def meters(client, sessions, readings):  # readings yields x [sessions, D]
        ...     async with client.packed(sessions) as pack:
        ...         async for x in readings:
        ...             result = await pack.step(x)
        ...             print(result.y.mean(), result.errors)

        For gateways: one message carries hundreds of rows, so a step costs a
        fraction of what it does in `stream`. The pack has a stream of its own,
        which ends with the block; the sessions stay open.

        Args:
            sessions: at least one; a session's place in the list stands for it.

        Raises:
            InvalidField: there are none, one comes twice, or they are of several models.
        """
        return AsyncPack(self, sessions)

    @overload
    async def forecast(
        self,
        sessions: Iterable[AsyncSession | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: None = None,
        timeout: float | None = None,
    ) -> list[Forecast | StepstateError]: ...

    @overload
    async def forecast(
        self,
        sessions: Iterable[AsyncSession | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios,
        timeout: float | None = None,
    ) -> list[dict[str, Forecast] | StepstateError]: ...

    @overload
    async def forecast(
        self,
        sessions: Iterable[AsyncSession | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None,
        timeout: float | None = None,
    ) -> Sequence[Told]: ...

    async def forecast(
        self,
        sessions: Iterable[AsyncSession | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Sequence[Told]:
        """Forecasts the rows to come, from where each of many sessions is.

        Sessions of one call share forwards on the server; very many take several
        calls. None advances, and none counts as used. Of a session that is given
        as an object the forecast is from its `t` on, and a server that lost rows
        is sent them first; of one given by its id it is from where the server is.

        Args:
            sessions: objects or ids, of any models.
            horizon: steps ahead; left out: the longest of each model.
            quantiles: levels, each more than 0 and less than 1; left out: the bounds
                of each session's interval and the median, or the median alone where
                the model knows no interval.
            scenarios: rows that might come, [P, D] by name, the same for all
                sessions. NaN is the model's own forecast of a value, and after the
                last row its own forecasts go on. A DataFrame may lack columns, and
                must have some that tell the model. Rows with times go on from each
                session's next row, and take sessions that are given as objects.
            timeout: seconds for all tries; left out: the client's own.

        Returns:
            For each session in order its forecast, or with scenarios its forecasts
            by scenario, or the error why it has none:
            `isinstance(one, StepstateError)` tells.

        Raises:
            InvalidField: what is asked for can be had of no session.
            Unavailable: no answer in time.
        """
        wanted = listed(sessions)
        asking = ForecastProtocol(
            wanted,
            horizon,
            quantiles=quantiles,
            scenarios=scenarios,
            models=await self.models() if any(isinstance(one, str) for one in wanted) else (),
            timeout=self.timeout if timeout is None else timeout,
        )
        while not asking.done:
            for some, request in asking.calls():
                try:
                    left = asking.backoff.left
                    asking.answered(some, await self.call(self.stub.Forecast, request, left))
                except StepstateError as error:
                    asking.refused(some, error)
            for one, session, t in asking.behind:
                try:
                    await session.catch_up(t, timeout=timeout)
                except StepstateError as error:
                    asking.brought_up(one, error)
                else:
                    asking.brought_up(one)
            await asyncio.sleep(asking.pause())
        return asking.told

    async def models(self) -> list[ModelInfo]:
        """The loaded models, every version.

        Raises:
            Unavailable: no answer in time.
        """
        request, found = pb.ListModelsRequest(), []
        while True:
            reply = await self.call(self.stub.ListModels, request)
            found += [convert.model_info(model) for model in reply.models]
            if not reply.next_page_token:
                return found
            request.page_token = reply.next_page_token

    async def model(self, name: str = "", version: str = "") -> ModelInfo:
        """One loaded model.

        Args:
            name: may be left out where the server has one model.
            version: empty for the newest.

        Raises:
            ModelUnknown: no such model or version is loaded.
            InvalidField: the name is left out, and there are several.
            Unavailable: no answer in time.
        """
        known = self._models.get((name, version))
        if known is None:
            request = pb.GetModelRequest(model=name, version=version)
            known = convert.model_info((await self.call(self.stub.GetModel, request)).model)
            if version:
                self._models[name, version] = known
        return known

    async def call(
        self, rpc: Callable[..., Awaitable[R]], request: object, timeout: float | None = None
    ) -> R:
        """Makes a unary call that may be repeated, until it is answered or time is up.

        Args:
            rpc: one of the calls of `stub`.
            request: its message.
            timeout: seconds for all tries; left out: the client's own.

        Raises:
            StepstateError: as the server answered.
            Unavailable: no answer in time; of a server that never answered, after
                the client's `connect_timeout`.
        """
        tries = CallAttempts(self._reach, self.timeout if timeout is None else timeout)
        while True:
            connected = await self._connected(tries.connecting)
            try:
                reply = await rpc(request, timeout=tries.left(connected=connected))
            except grpc.aio.AioRpcError as failure:
                error = convert.from_rpc(failure, self.target)
            else:
                self._reach.reached = True
                return reply
            await asyncio.sleep(tries.wait(error))

    async def _connected(self, seconds: float | None) -> bool:
        """Waits for a connection, where there never was one; whether it came in time."""
        if seconds is None:
            return True
        try:
            await asyncio.wait_for(self._channel.channel_ready(), seconds)
        except TimeoutError:
            return False
        except grpc.aio.UsageError:  # disconnected meanwhile
            raise Cancelled(convert.DISCONNECTED) from None
        return True

    async def _session(self, info: SessionInfo, t: int | None = None) -> AsyncSession:
        return AsyncSession(self, await self.model(info.model, info.version), info, t=t)
