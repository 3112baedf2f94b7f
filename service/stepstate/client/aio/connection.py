"""The asyncio client's connection: unary calls with retries, and what needs no session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import ModuleType
from typing import ClassVar, Self, TypeVar

import grpc

from stepstate.client import convert
from stepstate.client._connection import BaseConnection
from stepstate.client._protocol import calls
from stepstate.client.types import ModelInfo, SessionInfo, TenantUsage
from stepstate.errors import Cancelled, ServerUnreachable, SessionExists
from stepstate.v1 import stepstate_pb2 as pb

R = TypeVar("R")


class AsyncConnection(BaseConnection):
    """A connection to a server; tasks may share it."""

    _grpc: ClassVar[ModuleType] = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    async def disconnect(self) -> None:
        self._disconnected = True
        await self._channel.close()

    async def call(
        self, rpc: Callable[..., Awaitable[R]], request: object, timeout: float | None = None
    ) -> R:
        attempts = self._attempts(timeout)
        while True:
            connected = await self._connected(attempts.connect_seconds)
            error_of = self.call_errors.begin()
            try:
                reply = await rpc(request, timeout=attempts.left(connected=connected))
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
            else:
                attempts.answered()
                return reply
            try:
                delay = attempts.wait(error)
            except ServerUnreachable as last:
                raise await asyncio.to_thread(self._explained, last) from None
            await asyncio.sleep(delay)

    async def info(self, session_id: str) -> SessionInfo:
        return await ask(self, calls.get_session(session_id))

    def sessions(
        self, model: str = "", *, show_expired: bool = False
    ) -> AsyncIterator[SessionInfo]:
        return self._all(calls.list_sessions(model, show_expired=show_expired))

    async def close(self, session_id: str) -> SessionInfo:
        return await ask(self, calls.close_session(session_id))

    async def reset_accuracy(self, session_id: str) -> SessionInfo:
        return await ask(self, calls.reset_accuracy(session_id))

    async def export(self, session_id: str) -> bytes:
        async def joined(request: object, timeout: float) -> bytes:
            replies = self.stub.StreamExport(request, timeout=timeout)
            return b"".join([reply.data async for reply in replies])

        return await self.call(joined, pb.StreamExportRequest(session_id=session_id))

    async def models(self) -> list[ModelInfo]:
        return [one async for one in self._all(calls.list_models())]

    async def tenants(self) -> list[TenantUsage]:
        return [one async for one in self._all(calls.list_tenants())]

    async def model(self, name: str = "", version: str = "") -> ModelInfo:
        known = self._models.get((name, version))
        if known is None:
            known = await ask(self, calls.get_model(name, version))
            if version:  # without one it is the newest, which may change
                self._models[name, version] = known
        return known

    async def _all(self, first: calls.UnaryCall[calls.ListPage[R]]) -> AsyncIterator[R]:
        """What a list has, page by page."""
        call: calls.UnaryCall[calls.ListPage[R]] | None = first
        while call is not None:
            page = await ask(self, call)
            for one in page.items:
                yield one
            call = page.next

    async def _connected(self, seconds: float | None) -> bool:
        """Waits for the first connection; returns whether it came in time."""
        if seconds is None:
            return True
        try:
            await asyncio.wait_for(self._channel.channel_ready(), seconds)
        except TimeoutError:
            return False
        except grpc.aio.UsageError:  # disconnected meanwhile
            raise Cancelled(convert.DISCONNECTED) from None
        return True


async def ask(
    connection: AsyncConnection, call: calls.UnaryCall[R], timeout: float | None = None
) -> R:
    """Makes a call, and reads its reply.

    Raises:
        StepstateError: as the server answered.
        Unavailable: no answer in time.
    """
    rpc: Callable[..., Awaitable[object]] = getattr(connection.stub, call.rpc)
    try:
        return call.read(await connection.call(rpc, call.request, timeout))
    except SessionExists:
        if call.if_exists is None:
            raise
        return await ask(connection, call.if_exists, timeout)
