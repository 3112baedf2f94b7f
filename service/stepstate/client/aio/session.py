"""A session of the asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._protocol.steps import WINDOW, StepProtocol
from stepstate.client._protocol.session import BaseSession, PlacedRows
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client._protocol.history import (
    IN_FLIGHT,
    PIECE_ROWS,
    History,
    HistoryReader,
    Progress,
    nothing,
    nothings,
)
from stepstate.client.outputs import Outputs
from stepstate.client.aio.pipeline import Pipeline
from stepstate.client.times import TimedRows, each_row
from stepstate.client.types import Durability, Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import NonFiniteInput, SessionClosed, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.client.aio.client import AsyncClient

Rows = Iterable[ArrayLike | TimedRows] | AsyncIterable[ArrayLike | TimedRows]


class AsyncSession(BaseSession):
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows whose outputs were returned; `durable_t` those of them
    that survive the end of the server. One task at a time may step a session.

    With durability async or sync a session survives the end of its server. The
    session keeps the rows after `durable_t`, up to the client's `resume_rows`.
    When the server comes back, or another one takes over, with an older state,
    the next step sends it what it lacks, exactly once and in order, before it
    is applied itself. The outputs of rows that are sent again are dropped: the
    application has had them. All this may take as long as it brings the
    session on; `timeout` counts from the last answer that did.
    """

    def __init__(
        self, client: AsyncClient, model: ModelInfo, info: SessionInfo, *, t: int | None = None
    ) -> None:
        super().__init__(model, info, t=t, resume_rows=client.resume_rows)
        self.client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @overload
    async def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: Literal[False] = False,
        timeout: float | None = None,
    ) -> Floats: ...

    @overload
    async def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: Literal[True],
        timeout: float | None = None,
    ) -> Outputs: ...

    async def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: bool = False,
        timeout: float | None = None,
    ) -> Floats | Outputs:
        """Applies one row or many, all or none of them, and returns their outputs.

        A lost reply is asked for again with the same t, which applies nothing
        twice. If the task is cancelled
        meanwhile, call again with the same x, also when the server was restarted
        in between.

        Rows that have times, in an index of pandas or in `TimedRows`, must go on
        with the session's next row: their times are held against the session's
        start and the model's interval. Where rows are missing between them, these
        are missing values if the session takes those. Nothing is sorted.

        Args:
            x: one row [D], or many [T, D], in raw units; or a pandas Series or
                DataFrame, or `TimedRows`. NaN is a missing value, which a session
                takes that was opened with `missing`; `imputed_rows` tells
                afterwards in how many rows something stood in.
            last_only: return the outputs of the last row only.
            named: return them by name, with their times.
            timeout: seconds for all tries that do not bring the session on; left out:
                the client's own.

        Returns:
            y [O] for one row or with last_only, else [T, O], in raw units; with
            `named`, `Outputs`.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not
                go on from the session's last row; it names the first row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            StepMismatch, StepTooOld: someone else steps it too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are
                not kept here (any more). Set `t` to `first` and go on from there
                with rows of your own records; their outputs, too, come again.
            Unavailable, StaleOwner: no answer in time.
        """
        placed = self.place(x, self.t)
        response = await self._apply(placed, last_only=last_only, timeout=timeout)
        y = convert.outputs(response, self.model)
        self.arrived(response.t, **convert.stand_ins(response))
        y = y[-1] if placed.alone or last_only else placed.of_given(y)
        return self.named(y, placed) if named else y

    async def inspect(
        self, x: ArrayLike | TimedRows, *, timeout: float | None = None
    ) -> Inspection:
        """Applies rows like `step`, and also returns the gates and states of every layer.

        Rows that have times, in an index of pandas or in `TimedRows`, must go on
        with the session's next row: their times are held against the session's
        start and the model's interval. Where rows are missing between them, these
        are missing values if the session takes those. Nothing is sorted.

        Args:
            x: one row [D], or many [T, D], in raw units; or a pandas Series or
                DataFrame, or `TimedRows`. NaN is a missing value, which a session
                takes that was opened with `missing`; `imputed_rows` tells
                afterwards in how many rows something stood in.
            timeout: seconds for all tries that do not bring the session on; left out:
                the client's own.

        Returns:
            The outputs [T, O] of the rows, and what each layer computed.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not
                go on from the session's last row; it names the first row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            StepMismatch, StepTooOld: someone else steps it too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are
                not kept here (any more). Set `t` to `first` and go on from there
                with rows of your own records; their outputs, too, come again.
            Unavailable, StaleOwner: no answer in time.
        """
        placed = self.place(x, self.t)
        response = await self._apply(placed, inspect=True, timeout=timeout)
        found = convert.inspection(response, self.model, placed.of_given)
        self.arrived(response.t, **convert.stand_ins(response))
        return found

    async def prime(
        self,
        history: History | AsyncIterable[ArrayLike | TimedRows],
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Floats:
        """Applies many rows at once, to bring the session up to date, and returns the last outputs.

        The rows go some thousand to a request, a few requests in flight, each
        row exactly once. `t` says how far it got. After an error,
        or when the task was cancelled, call `refresh`, and go on with the rows
        from `t` on.

        Rows that have times, in an index of pandas or in `TimedRows`, must go on
        with the session's next row: their times are held against the session's
        start and the model's interval. Where rows are missing between them, these
        are missing values if the session takes those. Nothing is sorted.

        Args:
            history: rows [T, D], a DataFrame, `TimedRows`, or an iterable of such
                chunks, also
                an asynchronous one, which needs not be in memory as a whole.
            progress: called with the rows that are done, and with how many there
                are, None where that is not known.
            timeout: seconds for all tries that do not bring the session on; left out:
                the client's own.

        Returns:
            y [O] of the last row, in raw units.

        Raises:
            InvalidField: the history has no rows, or rows of another shape or
                with times that do not go on from the session's last row.
            NonFiniteInput, NonFiniteResult: a row can't be applied; `row` is its
                place in the history.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            StepMismatch, StepTooOld: someone else steps it too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are
                not kept here (any more). Set `t` to `first` and go on from there
                with rows of your own records; their outputs, too, come again.
            Unavailable, StaleOwner: no answer in time.
            Exception: what an iterable raised.
        """
        feed = HistoryReader(self, history, progress)
        pipeline = Pipeline(
            feed.items(self),
            self.client.stub.StreamSteps,
            target=self.client.target,
            timeout=self.client.timeout if timeout is None else timeout,
            most=IN_FLIGHT,
        )
        try:
            while (result := await pipeline.next()) is not None:
                feed.take(result.y)
        except StepstateError as error:
            raise feed.placed(error) from None
        finally:
            await pipeline.end()
        return feed.finish()

    async def advance(self, n: int, *, timeout: float | None = None) -> Floats:
        """Applies n rows in which every value is missing, and returns the outputs of the last one.

        What stands in is what the session's missing policy says: with impute its
        own forecasts, so that it goes on by itself.

        Args:
            n: how many, 1 or more.
            timeout: seconds for all tries that do not bring the session on; left out:
                the client's own.

        Returns:
            y [O], in raw units.

        Raises:
            NonFiniteInput: the session was opened without `missing`.
            InvalidField: n is less than 1.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            StepMismatch, StepTooOld: someone else steps it too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are
                not kept here (any more). Set `t` to `first` and go on from there
                with rows of your own records; their outputs, too, come again.
            Unavailable, StaleOwner: no answer in time.
        """
        if n > PIECE_ROWS:
            return await self.prime(nothings(self.model, n), timeout=timeout)
        return await self.step(nothing(self.model, n), last_only=True, timeout=timeout)

    @overload
    async def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: None = None,
        timeout: float | None = None,
    ) -> Forecast: ...

    @overload
    async def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios,
        timeout: float | None = None,
    ) -> dict[str, Forecast]: ...

    async def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Forecast | dict[str, Forecast]:
        """Forecasts the rows to come, from where the session is; it does not advance.

        Where the server was set back, it is first sent the rows that it lacks,
        as a step would, so that a forecast is never from before `t`. It is from
        after `t`, as its own `t` says, where rows were applied whose outputs
        were not taken, those of a stream in flight for example.

        Args:
            horizon: steps ahead; left out: the model's longest.
            quantiles: levels, each more than 0 and less than 1; left out: the
                bounds of the session's interval and the median, or the median
                alone where the model knows no interval.
            scenarios: rows that might come, [P, D] by name: one forecast for
                each. NaN is the model's own forecast of a value, and after the
                last row its own forecasts go on. A DataFrame may lack columns,
                which are then all NaN. Rows with times must not begin before the
                session's next row; where they lack rows the model's own forecasts
                stand in.
            timeout: seconds for all tries; left out: the client's own.

        Returns:
            A forecast, or with scenarios one for each by its name.

        Raises:
            ForecastImpossible: the session has no rows yet, or the model can't
                look so far ahead.
            InvalidField: an argument can't be accepted.
            RowsMissing: the server was set back, and the rows are not kept here.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            Unavailable: no answer in time.
        """
        (told,) = await self.client.forecast(
            [self], horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )
        if isinstance(told, StepstateError):
            raise told
        return told

    async def catch_up(self, t: int, *, timeout: float | None = None) -> None:
        """Sends a server that is at t the rows that it lacks; their outputs are dropped.

        `step` and `forecast` do so by themselves.

        Args:
            t: rows that the server has.
            timeout: seconds for all tries that do not bring the session on; left out:
                the client's own.

        Raises:
            RowsMissing: they are not kept here.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            Unavailable: no answer in time.
        """
        if t < self.t:
            track = self._track(timeout)
            track.repeat(t)
            await self._bring(track)

    @overload
    def stream(self, xs: Rows, *, named: Literal[False] = False) -> AsyncIterator[Floats]: ...

    @overload
    def stream(self, xs: Rows, *, named: Literal[True]) -> AsyncIterator[Outputs]: ...

    async def stream(self, xs: Rows, *, named: bool = False) -> AsyncIterator[Floats | Outputs]:
        """Applies rows as they come and yields the outputs [O] of each, in order.

        Up to `WINDOW` items are in flight; an item may also be many rows [T, D],
        whose last outputs are then yielded. When the connection breaks it is made
        again, and what was not answered is sent again with the same t; a server
        that was set back is sent what it lacks first. Ends with the error if a
        row can't be applied; `t` says how far it got. After leaving the loop
        early, go on from `t` with the same rows, or call `refresh` first: rows
        in flight may have been applied.

        Rows that have times, in an index of pandas or in `TimedRows`, must go on
        with the session's next row: their times are held against the session's
        start and the model's interval. Where rows are missing between them, these
        are missing values if the session takes those. Nothing is sorted.

        Args:
            xs: rows [D], from an iterable or an async iterable; with times or without.
            named: yield the outputs by name, with their times.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not
                go on from the session's last row; it names the first row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            StepMismatch, StepTooOld: someone else steps it too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are
                not kept here (any more). Set `t` to `first` and go on from there
                with rows of your own records; their outputs, too, come again.
            Unavailable, StaleOwner: no answer in time.
            Exception: what `xs` raised, after the outputs of the rows before.
        """
        pipeline = Pipeline(
            self._items(each_row(xs)),
            self.client.stub.StreamSteps,
            target=self.client.target,
            timeout=self.client.timeout,
            most=WINDOW,
        )
        try:
            while (result := await pipeline.next()) is not None:
                yield self.named(result.y) if named else result.y
        finally:
            await pipeline.end()

    async def refresh(self) -> SessionInfo:
        """Asks the server where the session is, and takes its t.

        Where the server was set back and all the rows it lacks are kept here, t
        stays: the next step sends them.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            Unavailable: no answer in time.
        """
        info = await self.client.info(self.session_id)
        self.placed(info)
        return info

    async def fork(
        self,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        """Opens a session that starts from a copy of this one, and goes on apart from it.

        The fork is at this session's t, and keeps the same rows to send them again.

        Args:
            new_id: the fork's, 1 to 128 of A-Z a-z 0-9 . _ : -; left out, one is made.
            idle_timeout: the session expires when no step came for this long; left
                out: that of this one.
            durability: "async": steps are answered at once and saved a little
                later, and the session sends again what a server lost. "sync": a
                step is answered when it is saved. "none": the session is lost when
                its server ends unexpectedly. Left out: as this one.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            SessionExists: the new id is open already.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """
        return await self.client.fork(
            self, new_id, idle_timeout=idle_timeout, durability=durability
        )

    async def reset_accuracy(self) -> SessionInfo:
        """Begins a session's accuracy and drift anew, after the steps accepted so far.

        Its state, t, forecasts and intervals go on as they were. It is saved, if the
        session's steps are, before this returns.

        Returns:
            The session, as it is then.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session
                is gone.
            Unavailable: no answer in time.
        """
        return await self.client.reset_accuracy(self.session_id)

    async def close(self) -> SessionInfo:
        """Closes the session on the server; that it is closed already is no error.

        Returns:
            How it was when it was closed.

        Raises:
            SessionUnknown, SessionExpired, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """
        try:
            info = await self.client.close(self.session_id)
        except SessionClosed as closed:  # perhaps by a first try, whose reply was lost
            info = replace(self.info, t=closed.t)
        self.closed = True
        return info

    async def _apply(
        self,
        placed: PlacedRows,
        *,
        inspect: bool = False,
        last_only: bool = False,
        timeout: float | None,
    ) -> pb.StepResponse:
        track = self._track(timeout)
        track.add(placed.rows, inspect=inspect, last_only=last_only)
        try:
            return await self._bring(track)
        except NonFiniteInput as error:
            raise placed.named(error) from None

    def _track(self, timeout: float | None) -> StepProtocol:
        return StepProtocol(self, timeout=self.client.timeout if timeout is None else timeout)

    async def _bring(self, track: StepProtocol) -> pb.StepResponse:
        """Brings a track with one request to its answer."""
        while True:
            request = convert.step_request(self.session_id, track.next())
            try:
                response: pb.StepResponse = await self.client.stub.Step(request, timeout=track.left)
            except grpc.aio.AioRpcError as failure:
                track.refused(convert.from_rpc(failure, self.client.target))
                await asyncio.sleep(track.rest())
            else:
                if track.answered(response.durable_t) is not None:
                    return response

    async def _items(self, xs: Rows) -> AsyncIterator[tuple[Self, ArrayLike | TimedRows]]:
        if isinstance(xs, AsyncIterable):
            async for x in xs:
                yield self, x
        else:
            for x in xs:
                yield self, x
