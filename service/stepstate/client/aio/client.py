"""The asyncio client, in the order of `sync/client.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import overload

from stepstate.client._api import ClientAPI
from stepstate.client._protocol import calls
from stepstate.client._protocol.forecasts import ForecastResult
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
            calls.NewSessionOptions(idle_timeout, durability),
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
        options = calls.NewSessionOptions(idle_timeout, durability)
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
        options = calls.NewSessionOptions(idle_timeout, durability)
        call = calls.import_session(snapshot, session_id, options)
        return await session_of(self, await ask(self, call))

    async def stream(
        self, items: Items[AsyncSession], *, max_items: int = MAX_ITEMS
    ) -> AsyncIterator[Result[AsyncSession]]:
        """Steps many sessions on one connection, and yields a result for every item.

        >>> async def steps(client, readings):  # readings yields (session, x)
        ...     async for result in client.stream(readings):
        ...         print(result.session.session_id, result.session.t, result.y)

        Results of one session come in the order of its items, those of different sessions when they
        are ready. An item may be one row [D] or many [T, D], with times or without; its result is
        that of its last row.

        Up to `WINDOW` items of each session are in flight. Its other items wait in a queue of its
        own, so that a session that is slow, refused for now or sent rows again does not delay the
        others. No more items are taken from the source while `max_items` of all sessions have no
        result that was taken, or 64 MiB of rows wait.

        When the connection breaks it is made again, and what was not answered is sent again with
        the same t; a session whose server was rolled back first sends what the server lacks. Each
        output is yielded once.

        An error that ends a session (a row that can't be applied, a closed session, `RowsMissing`)
        is the result of its item and of all later items of that session, none of which is applied;
        the other sessions go on. A session's t is that of its last result: continue with it in
        another stream. After leaving the loop early, continue from each session's t with the same
        rows, or call `refresh` first.

        Args:
            items: pairs (session, x), from an iterable or an async iterable.
            max_items: limit of items that wait.

        Raises:
            Unavailable: no connection for `timeout` seconds.
            InvalidField: two objects were given for one session.
            Exception: what `items` raised, after the results of the items before.
        """
        pipeline = Pipeline(items, self, max_items=max_items)
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
        return await forecast(
            self, sessions, horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )


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
