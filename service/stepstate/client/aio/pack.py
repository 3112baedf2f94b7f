"""Many sessions of the asyncio client, stepped together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._protocol.packed import (
    PackedProtocol,
    PackedResult,
    PackMembers,
    RowsInFlight,
)
from stepstate.client.aio.session import AsyncSession
from stepstate.client.times import TimedRows
from stepstate.errors import ServerUnreachable, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.client.aio.client import AsyncClient

    Call = grpc.aio.StreamStreamCall[pb.StreamPackedRequest, pb.StreamPackedResponse]


class AsyncPack:
    """Sessions of one model whose rows travel together, as columns: for gateways.

    Args:
        client: connected to their server.
        sessions: at least one; a session's place in the list stands for it.

    Raises:
        InvalidField: they are of several models, or one comes twice.
    """

    def __init__(self, client: AsyncClient, sessions: Sequence[AsyncSession]) -> None:
        self._client = client
        self._members = PackMembers.of(sessions)
        self._stream: _Stream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.end()

    async def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        which: ArrayLike | None = None,
        timeout: float | None = None,
    ) -> PackedResult:
        """Applies one row to each session, or rows to some of them, each row exactly once.

        A row that can't be applied is refused alone, and so are the rows of its
        session behind it: look at the result's `errors`. What is lost on the way
        is sent again with the same t, and a server that was set back is brought
        up. If the task is cancelled, call again with the same rows.

        Several calls may be under way, for different sessions.

        Args:
            x: rows [N, D] in raw units; NaN is a missing value. Rows with times, in
                an index of pandas or in `TimedRows`, must each be their session's
                next one.
            which: whose row each is [N], as a place in the pack; a session may
                come several times. Left out: one row for each session in order.
            timeout: seconds for all tries that do not bring a row on; left out: the
                client's own.

        Returns:
            What became of each row.

        Raises:
            InvalidField: x or `which` has another shape, or a row has another time.
            Cancelled: the client was disconnected.
        """
        seconds = self._client.timeout if timeout is None else timeout
        call = PackedProtocol(self._members, x, which, timeout=seconds)
        try:
            while not call.done:
                await self._round(call)
                for session, t in call.settle():
                    try:
                        await session.catch_up(t, timeout=timeout)
                    except StepstateError as error:
                        call.ended(session, error)
                await asyncio.sleep(call.pause())
        except BaseException:
            call.given_up()
            raise
        return call.result()

    async def end(self) -> None:
        """Ends the stream; the sessions stay open."""
        if self._stream is not None:
            await self._stream.end()
            self._stream = None

    async def _round(self, call: PackedProtocol[AsyncSession]) -> None:
        """Sends what is left, and takes the replies that come."""
        stream = self._stream
        if stream is None or stream.error is not None:
            stream = self._stream = _Stream(self._client, self._members.bindings())
        try:
            async with asyncio.timeout(call.left):
                on_their_way = [(one, await stream.send(one)) for one in call.messages()]
                for message, reply in on_their_way:
                    call.answered(message, await reply)
        except TimeoutError:
            await stream.end()
            call.broken(ServerUnreachable(self._client.target, "no reply in time"))
        except StepstateError as error:
            call.broken(error)


class _Stream:
    """One StreamPacked call, on which all handles are bound."""

    def __init__(self, client: AsyncClient, bindings: pb.StreamPackedRequest) -> None:
        self.error: StepstateError | None = None
        self._target = client.target
        self._call: Call = client.stub.StreamPacked()
        self._first: pb.StreamPackedRequest | None = bindings
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
                if self._first is not None:
                    bindings, self._first = self._first, None
                    await self._call.write(bindings)
                await self._call.write(message.request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.wait([self._reading])  # it knows why
        return reply

    async def end(self) -> None:
        """Gives up what is on its way."""
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
            error = convert.from_rpc(failure, self._target)
        except asyncio.CancelledError:  # by `end`, or with the client
            pass
        self.error = error
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # nobody may be left to take it
        self._replies.clear()
