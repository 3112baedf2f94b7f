"""Items of many sessions on their way over StreamSteps; a broken connection is made again.

Rule 1: every item has one result; those of a session come in the order of its items.
Rule 2: a session has at most `WINDOW` items that were sent and not yet taken by the application, so
        that a server remembers all replies that the application may not have.
Rule 3: sessions take turns at sending. The items of one that recovers, waits or is full wait in a
        queue of its own; no item is taken from the source while `max_items`, or `MAX_BYTES`, wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc

from stepstate.client import convert
from stepstate.client._protocol.replay import SentRequest
from stepstate.client._protocol.retry import Backoff
from stepstate.client._protocol.session import BaseSession, result_of
from stepstate.client._protocol.steps import WINDOW, StepProtocol
from stepstate.client.aio.connection import AsyncConnection
from stepstate.client.times import RowsLike
from stepstate.client.types import Result
from stepstate.errors import InvalidField, ServerUnreachable, StepstateError, Unavailable
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]

S = TypeVar("S", bound=BaseSession)
Items = Iterable[tuple[S, RowsLike]] | AsyncIterable[tuple[S, RowsLike]]

MAX_ITEMS = 10_000
"""Of all sessions together: for a hundred sessions a hundred each."""
MAX_BYTES = 64 * 2**20
"""Four of the longest requests."""
_AT_ONCE = 64  # items of a source that never waits, before other tasks get a turn


class _SessionQueue(StepProtocol[S]):
    """The items of one session in a pipeline."""

    def __init__(self, session: S, timeout: float) -> None:
        super().__init__(session, timeout=timeout, window=WINDOW)
        self.ready = False  # is among those that take turns at sending
        self.unsent = 0  # items that came after the one that ended it


class Pipeline(Generic[S]):
    """Items from a source to their results.

    Args:
        items: pairs of a session and its rows.
        client: connected to the server.
        timeout: seconds without an answer until it gives up; None: the client's.
        max_items: most items taken from the source whose results were not taken yet.
    """

    def __init__(
        self,
        items: Items[S],
        client: AsyncConnection,
        *,
        max_items: int,
        timeout: float | None = None,
    ) -> None:
        self._client = client
        self._connect: Callable[[], Call] = client.stub.StreamSteps
        self._timeout = client.timeout if timeout is None else timeout
        self._max_items = max_items
        self._queues: dict[str, _SessionQueue[S]] = {}
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
        # Who waits for one of them looks first, clears it, and waits.
        self._to_send, self._to_take, self._to_feed = (asyncio.Event() for _ in range(3))
        self._feeding = asyncio.create_task(self._feed(items))
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(lambda _: self._to_take.set())

    async def next(self) -> Result[S] | None:
        """The next result; None after the last one.

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
            self._to_take.clear()
            await self._to_take.wait()
        return self._take(*self._results.popleft())

    async def end(self) -> None:
        """Gives up what is in flight."""
        self._feeding.cancel()
        self._running.cancel()
        await asyncio.gather(self._feeding, self._running, return_exceptions=True)

    def _take(
        self, queue: _SessionQueue[S], sent: SentRequest | None, response: pb.StepResponse | None
    ) -> Result[S]:
        """Makes a result of an answer, which lets the source give another item."""
        self._inside -= 1
        y = None
        if sent is not None and response is not None:
            queue.undelivered -= 1
            self._inside_bytes -= len(sent.data)
            self._line_up(queue)
            y = queue.session.item_result(response)
        self._to_feed.set()
        return result_of(queue.session, y, queue.error)

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
                while self._inside >= self._max_items or self._inside_bytes >= MAX_BYTES:
                    self._to_feed.clear()
                    await self._to_feed.wait()
        except Exception as error:  # noqa: BLE001 - whatever the application's iterator raises
            self._failure = error
        self._fed = True
        self._to_send.set()

    def _enter(self, session: S, x: RowsLike) -> None:
        queue = self._queue(session)
        self._inside += 1
        if queue.ending:
            queue.unsent += 1
            self._settle(queue)
            return
        try:
            self._inside_bytes += queue.add(queue.place(x), last_only=True)
        except InvalidField as error:
            queue.unsent += 1
            queue.end(error)
            self._settle(queue)
            return
        self._unanswered += 1
        self._line_up(queue)

    def _queue(self, session: S) -> _SessionQueue[S]:
        queue = self._queues.get(session.session_id)
        if queue is None:
            queue = self._queues[session.session_id] = _SessionQueue(session, self._timeout)
        elif queue.session is not session:
            raise InvalidField(
                "items",
                f"two objects stand for session {session.session_id!r}, each with a t of its own: "
                "give the same one every time",
            )
        return queue

    def _line_up(self, queue: _SessionQueue[S]) -> None:
        if not queue.ready and queue.sendable:
            queue.ready = True
            self._ready.append(queue)
            self._to_send.set()

    # To the server and back.

    async def _run(self) -> None:
        """Sends and reads, on a new stream when one breaks, until all is answered."""
        while self._unanswered or not self._fed:
            if not self._unanswered:  # no server is needed yet
                self._backoff = None
                self._to_send.clear()
                await self._to_send.wait()
                continue
            error: StepstateError | None = None
            error_of = self._client.call_errors.begin()
            try:
                await self._converse()
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
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
        for queue in self._queues.values():
            queue.lost()
            queue.ready = False
            self._line_up(queue)
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
            raise ServerUnreachable(self._client.target, "the stream ended early")

    async def _write(self, call: Call) -> None:
        """Sends the sessions' requests in turn; the reader reports a broken stream."""
        ready = self._ready
        try:
            while True:
                while ready:
                    queue = ready.popleft()
                    queue.ready = False
                    if queue.sendable:
                        request = queue.next_request()
                        self._line_up(queue)
                        await call.write(request)
                if self._fed and not self._unanswered:
                    await call.done_writing()
                    return
                self._to_send.clear()
                await self._to_send.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass

    def _answer(self, response: pb.StepResponse) -> None:
        self._backoff = None
        queue = self._queues.get(response.session_id)
        if queue is None:
            raise convert.from_status(response.error)
        if response.HasField("error"):
            queue.refused(convert.from_status(response.error))
        else:
            sent = queue.answered(response.durable_t)
            if sent is not None:
                queue.undelivered += 1
                self._answered(1)
                self._results.append((queue, sent, response))
                self._to_take.set()
                if queue.error is None:
                    return  # it may send no more than before
        if queue.pause:
            asyncio.get_running_loop().call_later(queue.pause, self._resume, queue)
        self._settle(queue)
        self._line_up(queue)

    def _resume(self, queue: _SessionQueue[S]) -> None:
        queue.resume()
        self._line_up(queue)

    def _settle(self, queue: _SessionQueue[S]) -> None:
        """Makes results of the items of a session that can't go on."""
        if queue.error is None:
            return
        unsent = queue.unsent + len(queue)
        self._answered(len(queue))
        self._inside_bytes -= queue.drop()
        queue.unsent = 0
        self._results.extend([(queue, None, None)] * unsent)
        self._to_take.set()

    def _answered(self, count: int) -> None:
        self._unanswered -= count
        if self._fed and not self._unanswered:
            self._to_send.set()


async def _each(items: Iterable[tuple[S, RowsLike]]) -> AsyncIterator[tuple[S, RowsLike]]:
    for item in items:
        yield item
