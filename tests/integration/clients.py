"""Both clients under one interface, so that one test holds for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from stepstate.client import (
    AsyncClient,
    AsyncSession,
    Client,
    Durability,
    Inspection,
    ModelInfo,
    Pack,
    PackedResult,
    Result,
    Session,
    SessionInfo,
)
from tests.integration.wire import (
    HANG,
)


class InThreadSession:
    """A `Session` whose calls run in a thread."""

    def __init__(self, real: Session) -> None:
        self.real = real
        self.session_id = real.session_id
        self.model = real.model

    @property
    def t(self) -> int:
        return self.real.t

    @t.setter
    def t(self, t: int) -> None:
        self.real.t = t

    @property
    def durable_t(self) -> int:
        return self.real.durable_t

    @property
    def info(self) -> SessionInfo:
        return self.real.info

    @property
    def imputed_rows(self) -> int:
        return self.real.imputed_rows

    @property
    def fallback_rows(self) -> int:
        return self.real.fallback_rows

    def time(self, t: int | None = None) -> datetime | None:
        return self.real.time(t)

    async def step(self, x: ArrayLike, **options: Any) -> Any:
        """A thread can't be cancelled: a cancelled call ends when its thread has."""
        call = asyncio.ensure_future(asyncio.to_thread(self.real.step, x, **options))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait([call])
            raise

    async def inspect(self, x: ArrayLike) -> Inspection:
        return await asyncio.to_thread(self.real.inspect, x)

    async def prime(self, history: Any, **options: Any) -> np.ndarray:
        return await asyncio.to_thread(self.real.prime, history, **options)

    async def advance(self, n: int) -> np.ndarray:
        return await asyncio.to_thread(self.real.advance, n)

    async def forecast(self, horizon: int | None = None, **options: Any) -> Any:
        return await asyncio.to_thread(self.real.forecast, horizon, **options)

    async def refresh(self) -> SessionInfo:
        return await asyncio.to_thread(self.real.refresh)

    async def close(self) -> SessionInfo:
        return await asyncio.to_thread(self.real.close)

    async def reset_accuracy(self) -> SessionInfo:
        return await asyncio.to_thread(self.real.reset_accuracy)

    async def fork(self, new_id: str | None = None, **options: Any) -> InThreadSession:
        return InThreadSession(await asyncio.to_thread(self.real.fork, new_id, **options))

    async def stream(self, xs: Iterable[ArrayLike], **options: Any) -> AsyncIterator[Any]:
        ys = self.real.stream(xs, **options)
        try:
            while (y := await asyncio.to_thread(next, ys, None)) is not None:
                yield y
        finally:
            await asyncio.to_thread(ys.close)


class InThreadPack:
    """A `Pack` whose calls run in a thread."""

    def __init__(self, real: Pack) -> None:
        self.real = real

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.real.end()

    async def step(self, x: ArrayLike, **options: Any) -> PackedResult:
        return await asyncio.to_thread(self.real.step, x, **options)


class InThreadClient:
    """A `Client` whose calls run in a thread."""

    def __init__(self, real: Client) -> None:
        self.real = real

    async def open(
        self,
        model: str = "",
        *,
        session_id: str | None = None,
        start_time: datetime | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
        **options: Any,
    ) -> InThreadSession:
        session = await asyncio.to_thread(
            self.real.open,
            model,
            session_id=session_id,
            start_time=start_time,
            idle_timeout=idle_timeout,
            durability=durability,
            **options,
        )
        return InThreadSession(session)

    async def session(self, session_id: str, t: int | None = None) -> InThreadSession:
        return InThreadSession(await asyncio.to_thread(self.real.session, session_id, t))

    async def fork(
        self, session: InThreadSession | str, new_id: str | None = None, **options: Any
    ) -> InThreadSession:
        source = session if isinstance(session, str) else session.real
        return InThreadSession(await asyncio.to_thread(self.real.fork, source, new_id, **options))

    async def export(self, session_id: str) -> bytes:
        return await asyncio.to_thread(self.real.export, session_id)

    async def restore(self, snapshot: bytes, **options: Any) -> InThreadSession:
        return InThreadSession(await asyncio.to_thread(self.real.restore, snapshot, **options))

    async def stream(
        self, items: Iterable[tuple[InThreadSession, ArrayLike]]
    ) -> AsyncIterator[Result[InThreadSession]]:
        known: dict[str, InThreadSession] = {}

        def real() -> Iterator[tuple[Session, ArrayLike]]:
            for session, x in items:
                known[session.session_id] = session
                yield session.real, x

        results = self.real.stream(real())
        try:
            while (result := await asyncio.to_thread(next, results, None)) is not None:
                yield replace(result, session=known[result.session.session_id])
        finally:
            await asyncio.to_thread(results.close)

    def packed(self, sessions: Iterable[InThreadSession]) -> InThreadPack:
        return InThreadPack(self.real.packed([one.real for one in sessions]))

    async def forecast(
        self, sessions: Iterable[InThreadSession | str], *wish: Any, **options: Any
    ) -> Any:
        real = [one if isinstance(one, str) else one.real for one in sessions]
        return await asyncio.to_thread(self.real.forecast, real, *wish, **options)

    async def info(self, session_id: str) -> SessionInfo:
        return await asyncio.to_thread(self.real.info, session_id)

    async def reset_accuracy(self, session_id: str) -> SessionInfo:
        return await asyncio.to_thread(self.real.reset_accuracy, session_id)

    async def close(self, session_id: str) -> SessionInfo:
        return await asyncio.to_thread(self.real.close, session_id)

    async def models(self) -> list[ModelInfo]:
        return await asyncio.to_thread(self.real.models)

    async def model(self, name: str = "", version: str = "") -> ModelInfo:
        return await asyncio.to_thread(self.real.model, name, version)

    async def sessions(self, model: str = "", **options: Any) -> AsyncIterator[SessionInfo]:
        for info in await asyncio.to_thread(lambda: list(self.real.sessions(model, **options))):
            yield info

    async def restore_expired(self, session_id: str) -> InThreadSession:
        return InThreadSession(await asyncio.to_thread(self.real.restore_expired, session_id))


@asynccontextmanager
async def in_thread(target: str, **options: Any) -> AsyncIterator[InThreadClient]:
    """A synchronous client."""
    with Client(target, **options) as client:
        yield InThreadClient(client)


AnyClient = AsyncClient | InThreadClient
AnySession = AsyncSession | InThreadSession


class Connect(Protocol):
    """Makes a client of a server, with the options of both clients."""

    def __call__(self, target: str, **options: Any) -> AbstractAsyncContextManager[AnyClient]: ...


KINDS: dict[str, Callable[..., AbstractAsyncContextManager[AnyClient]]] = {
    "async": AsyncClient,
    "sync": in_thread,
}


async def collect(session: AnySession, xs) -> np.ndarray:
    async with asyncio.timeout(HANG):
        return np.array([y async for y in session.stream(xs)])
