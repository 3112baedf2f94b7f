"""Many sessions of the asyncio client, stepped together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Self

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._api import PackAPI
from stepstate.client._protocol.packed import (
    PackedProtocol,
    PackedResult,
    PackMembers,
    RowsInFlight,
)
from stepstate.client.aio.connection import AsyncConnection
from stepstate.client.aio.session import AsyncSession
from stepstate.client.times import RowsLike
from stepstate.errors import ServerUnreachable, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.StreamPackedRequest, pb.StreamPackedResponse]


class AsyncPack(PackAPI):
    """Sessions of one model whose rows travel together, as columns: for gateways.

    Args:
        client: connected to their server.
        sessions: at least one; a session is named by its place in this list.

    Raises:
        InvalidField: they are of several models, or one comes twice.
    """

    def __init__(self, client: AsyncConnection, sessions: Sequence[AsyncSession]) -> None:
        self._client = client
        self._members = PackMembers.of(sessions)
        self._stream: _Stream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def step(
        self, x: RowsLike, *, which: ArrayLike | None = None, timeout: float | None = None
    ) -> PackedResult:
        seconds = self._client.timeout if timeout is None else timeout
        protocol = PackedProtocol(self._members, x, which, timeout=seconds)
        try:
            while not protocol.done:
                await self._round(protocol)
                for session, t in protocol.settle():
                    try:
                        await session.catch_up(t, timeout=timeout)
                    except StepstateError as error:
                        protocol.ended(session, error)
                await asyncio.sleep(protocol.pause())
        except BaseException:
            protocol.given_up()
            raise
        return protocol.result()

    async def end(self) -> None:
        if self._stream is not None:
            await self._stream.end()
            self._stream = None

    async def _round(self, protocol: PackedProtocol[AsyncSession]) -> None:
        """Sends what is left, and takes the replies that come."""
        stream = self._stream
        if stream is None or stream.error is not None:
            stream = self._stream = _Stream(self._client, self._members.bindings())
        try:
            async with asyncio.timeout(protocol.left):
                in_flight = [(one, await stream.send(one)) for one in protocol.messages()]
                for message, reply in in_flight:
                    protocol.answered(message, await reply)
        except TimeoutError:
            await stream.end()
            protocol.broken(ServerUnreachable(self._client.target, "no reply in time"))
        except StepstateError as error:
            protocol.broken(error)


class _Stream:
    """One StreamPacked call, on which the sessions' handles are bound."""

    def __init__(self, client: AsyncConnection, bindings: Iterable[pb.StreamPackedRequest]) -> None:
        self.error: StepstateError | None = None
        self._target = client.target
        self._error_of = client.call_errors.begin()
        self._call: Call = client.stub.StreamPacked()
        self._first = iter(bindings)
        self._ids = count(1)
        self._replies: dict[int, asyncio.Future[pb.StreamPackedResponse]] = {}
        self._sending = asyncio.Lock()
        self._reading = asyncio.create_task(self._read())

    async def send(self, message: RowsInFlight) -> asyncio.Future[pb.StreamPackedResponse]:
        """Sends a message; its reply comes later.

        Raises:
            StepstateError: the stream is broken.
        """
        if self.error is not None:
            raise self.error
        message.request.id = next(self._ids)
        reply = asyncio.get_running_loop().create_future()
        self._replies[message.request.id] = reply
        try:
            async with self._sending:
                for bindings in self._first:
                    await self._call.write(bindings)
                await self._call.write(message.request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.wait([self._reading])  # it knows why
        return reply

    async def end(self) -> None:
        """Gives up what is in flight."""
        self._call.cancel()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        error: StepstateError = ServerUnreachable(self._target, "the stream ended early")
        try:
            async for reply in self._call:
                waiting = self._replies.pop(reply.id, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
                elif reply.HasField("error"):  # that of the bindings
                    error = convert.from_status(reply.error)
                    self._call.cancel()
        except grpc.aio.AioRpcError as failure:
            error = self._error_of(failure)
        except asyncio.CancelledError:  # by `end`, or with the client
            pass
        self.error = error
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # nobody may be left to take it
        self._replies.clear()
