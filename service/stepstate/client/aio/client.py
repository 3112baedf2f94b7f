"""The asyncio client, in the order of `sync/client.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import overload

from stepstate.client._api import ClientAPI
from stepstate.client._protocol import calls
from stepstate.client._protocol.forecasts import ForecastProtocol, ForecastResult, listed
from stepstate.client._protocol.history import AsyncHistory, Progress, start_of_async
from stepstate.client.aio.connection import AsyncConnection, ask
from stepstate.client.aio.pack import AsyncPack
from stepstate.client.aio.pipeline import MAX_ITEMS, Items, Pipeline
from stepstate.client.aio.session import AsyncSession, forecast, session_of
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.types import Durability, MissingPolicy, Result
from stepstate.errors import StepstateError, Unavailable


class AsyncClient(AsyncConnection, ClientAPI):
    """A connection to a server; tasks may share it.

    Its sessions survive the end of the server: the text of `AsyncSession` says how.
    """

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
        history: AsyncHistory | None = None,
        progress: Progress | None = None,
    ) -> AsyncSession:
        if history is not None and start_time is None:
            start_time, history = await start_of_async(history)
        call = calls.open_session(
            model,
            version,
            session_id,
            calls.OpenOptions(idle_timeout, durability),
            start_time=start_time,
            missing=missing,
            interval_level=interval_level,
        )
        session = await session_of(self, await ask(self, call))
        if history is not None:
            await _prime(session, history, progress)
        return session

    async def session(self, session_id: str, t: int | None = None) -> AsyncSession:
        return await session_of(self, await self.info(session_id), t)

    async def fork(
        self,
        session: AsyncSession | str,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        if not isinstance(session, str):
            return await session.fork(new_id, idle_timeout=idle_timeout, durability=durability)
        options = calls.OpenOptions(idle_timeout, durability)
        return await session_of(self, await ask(self, calls.fork_session(session, new_id, options)))

    async def restore_expired(self, session_id: str) -> AsyncSession:
        return await session_of(self, await ask(self, calls.restore_session(session_id)))

    async def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> AsyncSession:
        options = calls.OpenOptions(idle_timeout, durability)
        call = calls.import_session(snapshot, session_id, options)
        return await session_of(self, await ask(self, call))

    async def stream(
        self, items: Items[AsyncSession], *, max_items: int = MAX_ITEMS
    ) -> AsyncIterator[Result[AsyncSession]]:
        pipeline = Pipeline(
            items,
            self.stub.StreamSteps,
            target=self.target,
            timeout=self.timeout,
            max_items=max_items,
        )
        try:
            while (result := await pipeline.next()) is not None:
                yield result
        finally:
            await pipeline.end()

    def packed(self, sessions: Sequence[AsyncSession]) -> AsyncPack:
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

    async def forecast(
        self,
        sessions: Iterable[AsyncSession | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Sequence[ForecastResult]:
        wanted = listed(sessions)
        protocol = ForecastProtocol(
            wanted,
            horizon,
            quantiles=quantiles,
            scenarios=scenarios,
            models=await self.models() if any(isinstance(one, str) for one in wanted) else (),
            timeout=self.timeout if timeout is None else timeout,
        )
        return await forecast(self, protocol, timeout)


async def _prime(session: AsyncSession, history: AsyncHistory, progress: Progress | None) -> None:
    """Applies a new session's history; if that can't be done, the session is closed again."""
    try:
        await session.prime(history, progress=progress)
    except Unavailable:
        raise  # the session can go on when the server is there again
    except Exception:
        with suppress(StepstateError):
            await session.close()
        raise
