"""Both clients under one interface, so that one test holds for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from stepstate.client import (
    AsyncClient,
    AsyncSession,
    Client,
    Inspection,
    ModelInfo,
    Session,
    SessionInfo,
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

    async def step(self, x: ArrayLike, **options: float) -> np.ndarray:
        return await asyncio.to_thread(self.real.step, x, **options)

    async def inspect(self, x: ArrayLike) -> Inspection:
        return await asyncio.to_thread(self.real.inspect, x)

    async def refresh(self) -> SessionInfo:
        return await asyncio.to_thread(self.real.refresh)

    async def close(self) -> SessionInfo:
        return await asyncio.to_thread(self.real.close)

    async def stream(self, xs: Iterable[ArrayLike]) -> AsyncIterator[np.ndarray]:
        ys = self.real.stream(xs)
        try:
            while (y := await asyncio.to_thread(next, ys, None)) is not None:
                yield y
        finally:
            await asyncio.to_thread(ys.close)


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
    ) -> InThreadSession:
        session = await asyncio.to_thread(
            self.real.open,
            model,
            session_id=session_id,
            start_time=start_time,
            idle_timeout=idle_timeout,
        )
        return InThreadSession(session)

    async def session(self, session_id: str) -> InThreadSession:
        return InThreadSession(await asyncio.to_thread(self.real.session, session_id))

    async def info(self, session_id: str) -> SessionInfo:
        return await asyncio.to_thread(self.real.info, session_id)

    async def close(self, session_id: str) -> SessionInfo:
        return await asyncio.to_thread(self.real.close, session_id)

    async def models(self) -> list[ModelInfo]:
        return await asyncio.to_thread(self.real.models)

    async def model(self, name: str = "", version: str = "") -> ModelInfo:
        return await asyncio.to_thread(self.real.model, name, version)

    async def sessions(self, model: str = "") -> AsyncIterator[SessionInfo]:
        for info in await asyncio.to_thread(lambda: list(self.real.sessions(model))):
            yield info


@asynccontextmanager
async def in_thread(target: str, *, timeout: float = 10.0) -> AsyncIterator[InThreadClient]:  # noqa: ASYNC109
    """A synchronous client."""
    with Client(target, timeout=timeout) as client:
        yield InThreadClient(client)


AnyClient = AsyncClient | InThreadClient
AnySession = AsyncSession | InThreadSession


class Connect(Protocol):
    """Makes a client of a server."""

    def __call__(
        self, target: str, *, timeout: float = 10.0
    ) -> AbstractAsyncContextManager[AnyClient]: ...


KINDS: dict[str, Callable[..., AbstractAsyncContextManager[AnyClient]]] = {
    "async": AsyncClient,
    "sync": in_thread,
}
