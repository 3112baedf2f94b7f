"""Rows of many sessions on their way over StreamSteps, on as many connections as it takes.

Rule 1: every item has one result; those of a session come in the order of its items.
Rule 2: a session has at most `WINDOW` items sent and not yet taken by the application, so
        that a server remembers all whose outputs the application may not have.
Rule 3: sessions take turns at sending. One that recovers, waits or is full lets its items
        queue here; only when `most` items, or `MAX_BYTES`, are here does the source wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc
from numpy.typing import ArrayLike

from stepstate.client import convert
from stepstate.client._protocol.retry import Backoff
from stepstate.client._protocol.replay import SentRequest
from stepstate.client._protocol.steps import WINDOW, StepProtocol
from stepstate.client._protocol.session import BaseSession
from stepstate.client.times import TimedRows
from stepstate.client.types import Result
from stepstate.errors import InvalidField, ServerUnreachable, StepstateError, Unavailable
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]

S = TypeVar("S", bound=BaseSession)
Items = Iterable[tuple[S, ArrayLike | TimedRows]] | AsyncIterable[tuple[S, ArrayLike | TimedRows]]

MAX_ITEMS = 10_000
"""Of all sessions together: some hundred a session for as many sessions."""
MAX_BYTES = 64 * 2**20
"""Four of the longest requests."""
_AT_ONCE = 64  # items of a source that never waits, between two turns of the loop


class _Bell:
    """Wakes the one task that waits for something; who waits looks first."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class _SessionQueue(StepProtocol, Generic[S]):
    """A session's track in a pipeline."""

    def __init__(self, session: S, timeout: float) -> None:
        super().__init__(session, timeout=timeout, window=WINDOW)
        self.session = session
        self.ready = False  # is among those that take turns at sending
        self.unsent = 0  # items that came after the one that ended it


class Pipeline(Generic[S]):
    """Items from a source to their results.

    Args:
        items: pairs of a session and its rows.
        connect: opens a stream.
        target: the server, for errors.
        timeout: seconds without an answer after which one gives up.
        most: items taken from the source whose results were not taken yet.
    """

    def __init__(
        self,
        items: Items[S],
        connect: Callable[[], Call],
        *,
        target: str,
        timeout: float,
        most: int = MAX_ITEMS,
    ) -> None:
        self._connect = connect
        self._target = target
        self._timeout = timeout
        self._most = most
        self._ways: dict[str, _SessionQueue[S]] = {}
        self._ready: deque[_SessionQueue[S]] = deque()
        self._results: deque[
            tuple[_SessionQueue[S], SentRequest | None, pb.StepResponse | None]
        ] = deque()
        self._inside = 0  # items without a result that was taken
        self._inside_bytes = 0
        self._unanswered = 0
        self._fed = False
        self._failure: Exception | None = None
        self._backoff: Backoff | None = None
        self._to_send, self._to_take, self._room = (_Bell() for _ in range(3))
        self._feeding = asyncio.create_task(self._feed(items))
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(lambda _: self._to_take.ring())

    async def next(self) -> Result[S] | None:
        """The next result; None when there are no more.

        Raises:
            Unavailable: no connection for as long as the timeout.
            Exception: what the source raised, after the results of what it gave before.
        """
        while not self._results:
            if self._running.done():
                self._running.result()
                if self._failure is not None:
                    raise self._failure
                return None
            await self._to_take.wait()
        return self._take(*self._results.popleft())

    async def end(self) -> None:
        """Gives up what is on its way."""
        self._feeding.cancel()
        self._running.cancel()
        await asyncio.gather(self._feeding, self._running, return_exceptions=True)

    def _take(
        self, way: _SessionQueue[S], sent: SentRequest | None, response: pb.StepResponse | None
    ) -> Result[S]:
        """Makes a result of an answer, and room for another item."""
        self._inside -= 1
        if sent is None or response is None:
            result = Result(way.session, None, way.error)
        else:
            way.missing_reason -= 1
            self._inside_bytes -= len(sent.data)
            self._line_up(way)
            y = convert.outputs(response, way.session.model)
            told = convert.stand_ins(response)
            way.session.arrived(sent.end, **told)
            moment = way.session.time()
            result = Result(way.session, y[0], None, **told, t=sent.end, time=moment)
        self._room.ring()
        return result

    # From the source.

    async def _feed(self, items: Items[S]) -> None:
        """Takes the items as they come; an error of the source is raised after the results."""
        count = 0
        try:
            async for session, x in items if isinstance(items, AsyncIterable) else _each(items):
                self._enter(session, x)
                count += 1
                if count % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                while self._inside >= self._most or self._inside_bytes >= MAX_BYTES:
                    await self._room.wait()
        except Exception as error:  # noqa: BLE001 - whatever the application's iterator raises
            self._failure = error
        self._fed = True
        self._to_send.ring()

    def _enter(self, session: S, x: ArrayLike | TimedRows) -> None:
        way = self._way(session)
        self._inside += 1
        if way.ending:
            way.unsent += 1
            self._settle(way)
            return
        try:
            self._inside_bytes += way.add(way.place(x), last_only=True)
        except InvalidField as error:
            way.unsent += 1
            way.end(error)
            self._settle(way)
            return
        self._unanswered += 1
        self._line_up(way)

    def _way(self, session: S) -> _SessionQueue[S]:
        way = self._ways.get(session.session_id)
        if way is None:
            way = self._ways[session.session_id] = _SessionQueue(session, self._timeout)
        elif way.session is not session:
            raise InvalidField(
                "items",
                f"two objects stand for session {session.session_id!r}, each with a t of its own: "
                "give the same one every time",
            )
        return way

    def _line_up(self, way: _SessionQueue[S]) -> None:
        if not way.ready and way.sendable:
            way.ready = True
            self._ready.append(way)
            self._to_send.ring()

    # To the server and back.

    async def _run(self) -> None:
        """Sends and reads, on a new stream when one breaks, until all is answered."""
        while self._unanswered or not self._fed:
            if not self._unanswered:  # no server is needed yet
                self._backoff = None
                await self._to_send.wait()
                continue
            error: StepstateError | None = None
            try:
                await self._converse()
            except grpc.aio.AioRpcError as failure:
                error = convert.from_rpc(failure, self._target)
            except Unavailable as ended:
                error = ended
            if error is None or not self._unanswered:
                continue
            if not isinstance(error, Unavailable):
                raise error
            self._backoff = self._backoff or Backoff(self._timeout)  # from the first failure on
            await asyncio.sleep(self._backoff.wait(error))

    async def _converse(self) -> None:
        """One stream, until it ends."""
        self._ready.clear()
        for way in self._ways.values():
            way.lost()
            way.ready = False
            self._line_up(way)
        call = self._connect()
        writing = asyncio.create_task(self._write(call))
        try:
            async for response in call:
                self._answer(response)
        finally:
            call.cancel()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        if self._unanswered or not self._fed:
            raise ServerUnreachable(self._target, "the stream ended early")

    async def _write(self, call: Call) -> None:
        """Sends what sessions have to send, in turn; a broken stream is the reader's to notice."""
        ready = self._ready
        try:
            while True:
                while ready:
                    way = ready.popleft()
                    way.ready = False
                    if way.sendable:
                        request = convert.step_request(way.session.session_id, way.next())
                        self._line_up(way)
                        await call.write(request)
                if self._fed and not self._unanswered:
                    await call.done_writing()
                    return
                await self._to_send.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass

    def _answer(self, response: pb.StepResponse) -> None:
        self._backoff = None
        way = self._ways.get(response.session_id)
        if way is None:
            raise convert.from_status(response.error)
        if response.HasField("error"):
            way.refused(convert.from_status(response.error))
        else:
            sent = way.answered(response.durable_t)
            if sent is not None:
                way.missing_reason += 1
                self._answered(1)
                self._results.append((way, sent, response))
                self._to_take.ring()
                if way.error is None:
                    return  # it may send no more than before
        if way.pause:
            asyncio.get_running_loop().call_later(way.pause, self._resume, way)
        self._settle(way)
        self._line_up(way)

    def _resume(self, way: _SessionQueue[S]) -> None:
        way.resume()
        self._line_up(way)

    def _settle(self, way: _SessionQueue[S]) -> None:
        """Gives the items of a session that can't go on their results."""
        if way.error is None:
            return
        unsent = way.unsent + len(way)
        self._answered(len(way))
        self._inside_bytes -= way.drop()
        way.unsent = 0
        self._results.extend([(way, None, None)] * unsent)
        self._to_take.ring()

    def _answered(self, count: int) -> None:
        self._unanswered -= count
        if self._fed and not self._unanswered:
            self._to_send.ring()


async def _each(
    items: Iterable[tuple[S, ArrayLike | TimedRows]],
) -> AsyncIterator[tuple[S, ArrayLike | TimedRows]]:
    for item in items:
        yield item
