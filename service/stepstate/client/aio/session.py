"""A session of the asyncio client, in the order of `sync/session.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from datetime import timedelta
from typing import Literal, Self, overload

import grpc

from stepstate.client._api import SessionAPI
from stepstate.client._protocol import calls
from stepstate.client._protocol.forecasts import ForecastProtocol, ForecastResult, listed
from stepstate.client._protocol.history import (
    IN_FLIGHT,
    PIECE_ROWS,
    AsyncHistory,
    HistoryReader,
    Progress,
    missing_pieces,
    missing_rows,
)
from stepstate.client._protocol.session import BaseSession, PlacedRows
from stepstate.client._protocol.steps import WINDOW, StepProtocol
from stepstate.client.aio.connection import AsyncConnection, ask
from stepstate.client.aio.pipeline import Pipeline
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.outputs import Outputs
from stepstate.client.times import RowsLike, each_row
from stepstate.client.types import Durability, Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import NonFiniteInput, SessionClosed, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

Rows = Iterable[RowsLike] | AsyncIterable[RowsLike]


class AsyncSession(BaseSession, SessionAPI):
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows whose outputs were returned; `durable_t` those of them that survive the end
    of the server. One task at a time may step a session.

    With durability async or sync a session survives the end of its server. It keeps the rows after
    `durable_t`, up to the client's `resume_rows`. When the server comes back, or another one takes
    over, with an older state, the next step first sends it what it lacks, exactly once and in
    order. The outputs of these rows are dropped: the application has them already. This may take as
    long as there is progress; `timeout` counts from the last answer that made some.
    """

    def __init__(
        self, client: AsyncConnection, model: ModelInfo, info: SessionInfo, *, t: int | None = None
    ) -> None:
        super().__init__(model, info, t=t, resume_rows=client.resume_rows)
        self.client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: Literal[False] = False,
        timeout: float | None = None,
    ) -> Floats: ...

    @overload
    async def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: Literal[True],
        timeout: float | None = None,
    ) -> Outputs: ...

    async def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: bool = False,
        timeout: float | None = None,
    ) -> Floats | Outputs:
        placed = self.place(x, self.t)
        response = await self._apply(placed, last_only=last_only, timeout=timeout)
        return self.step_result(response, placed, last_only=last_only, named=named)

    async def inspect(self, x: RowsLike, *, timeout: float | None = None) -> Inspection:
        placed = self.place(x, self.t)
        response = await self._apply(placed, inspect=True, timeout=timeout)
        return self.inspect_result(response, placed)

    async def prime(
        self,
        history: AsyncHistory,
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Floats:
        reader = HistoryReader(self, history, progress)
        pipeline = Pipeline(reader.items(), self.client, max_items=IN_FLIGHT, timeout=timeout)
        try:
            while (result := await pipeline.next()) is not None:
                reader.take(result.y)
        except StepstateError as error:
            raise reader.error_in_history(error) from None
        finally:
            await pipeline.end()
        return reader.finish()

    async def advance(self, n: int, *, timeout: float | None = None) -> Floats:
        if n > PIECE_ROWS:
            return await self.prime(missing_pieces(self.model, n), timeout=timeout)
        return await self.step(missing_rows(self.model, n), last_only=True, timeout=timeout)

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
        (result,) = await forecast(
            self.client, [self], horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )
        if isinstance(result, StepstateError):
            raise result
        return result

    async def catch_up(self, t: int, *, timeout: float | None = None) -> None:
        if t < self.t:
            protocol = self._protocol(timeout)
            protocol.repeat(t)
            await self._complete(protocol)

    @overload
    def stream(self, xs: Rows, *, named: Literal[False] = False) -> AsyncIterator[Floats]: ...

    @overload
    def stream(self, xs: Rows, *, named: Literal[True]) -> AsyncIterator[Outputs]: ...

    async def stream(self, xs: Rows, *, named: bool = False) -> AsyncIterator[Floats | Outputs]:
        pipeline = Pipeline(self._items(each_row(xs)), self.client, max_items=WINDOW)
        try:
            while (result := await pipeline.next()) is not None:
                yield self.named(result.y) if named else result.y
        finally:
            await pipeline.end()

    async def refresh(self) -> SessionInfo:
        info = await ask(self.client, calls.get_session(self.session_id))
        self.update(info)
        return info

    async def fork(
        self,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        options = calls.NewSessionOptions(idle_timeout, durability)
        info = await ask(self.client, calls.fork_session(self.session_id, new_id, options))
        forked = await session_of(self.client, info)
        forked.continue_from(self, resume_rows=self.client.resume_rows)
        return forked

    async def reset_accuracy(self) -> SessionInfo:
        return await ask(self.client, calls.reset_accuracy(self.session_id))

    async def close(self) -> SessionInfo:
        try:
            info = await ask(self.client, calls.close_session(self.session_id))
        except SessionClosed as closed:
            info = self.close_result(closed)
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
        protocol = self._protocol(timeout)
        protocol.add(placed.rows, inspect=inspect, last_only=last_only)
        try:
            return await self._complete(protocol)
        except NonFiniteInput as error:
            raise placed.error_of_given(error) from None

    def _protocol(self, timeout: float | None) -> StepProtocol[Self]:
        return StepProtocol(self, timeout=self.client.timeout if timeout is None else timeout)

    async def _complete(self, protocol: StepProtocol[Self]) -> pb.StepResponse:
        """Sends a protocol's one request until it is answered."""
        while True:
            request, error_of = protocol.next_request(), self.client.call_errors.begin()
            try:
                response: pb.StepResponse = await self.client.stub.Step(
                    request, timeout=protocol.left
                )
            except grpc.aio.AioRpcError as failure:
                protocol.refused(error_of(failure))
                await asyncio.sleep(protocol.rest())
            else:
                if protocol.answered(response.durable_t) is not None:
                    return response

    async def _items(self, xs: Rows) -> AsyncIterator[tuple[Self, RowsLike]]:
        if isinstance(xs, AsyncIterable):
            async for x in xs:
                yield self, x
        else:
            for x in xs:
                yield self, x


async def session_of(
    client: AsyncConnection, info: SessionInfo, t: int | None = None
) -> AsyncSession:
    """The session with this status; `t`: rows whose outputs the application has."""
    return AsyncSession(client, await client.model(info.model, info.version), info, t=t)


async def forecast(
    client: AsyncConnection,
    sessions: Iterable[AsyncSession | str],
    horizon: int | None,
    *,
    quantiles: Levels | None,
    scenarios: Scenarios | None,
    timeout: float | None,
) -> Sequence[ForecastResult]:
    """The forecasts of many sessions; `timeout` also counts for each that has to catch up."""
    wanted = listed(sessions)
    protocol = ForecastProtocol(
        wanted,
        horizon,
        quantiles=quantiles,
        scenarios=scenarios,
        models=await client.models() if any(isinstance(one, str) for one in wanted) else (),
        timeout=client.timeout if timeout is None else timeout,
    )
    while not protocol.done:
        for some, request in protocol.calls():
            try:
                left = protocol.backoff.left
                protocol.answered(some, await client.call(client.stub.Forecast, request, left))
            except StepstateError as error:
                protocol.refused(some, error)
        for one, session, t in protocol.behind:
            try:
                await session.catch_up(t, timeout=timeout)
            except StepstateError as error:
                protocol.caught_up(one, error)
            else:
                protocol.caught_up(one)
        await asyncio.sleep(protocol.pause())
    return protocol.results
