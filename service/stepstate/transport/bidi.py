"""One bidirectional call: requests in, replies out as they are ready, both bounded.

Rule 1: at most `MAX_UNANSWERED` requests of a call are accepted and unanswered, and
        replies of at most about `MAX_BYTES`; beyond that the call is not read, and
        HTTP/2 holds the client back.
Rule 2: when the call ends, what it has waiting and not yet taken did not happen.

What a request means is the front door's: a subclass of `BidiStream`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import grpc

from stepstate.errors import Draining, StepstateError
from stepstate.sessions import SessionService, Step
from stepstate.transport.malformed import DecodeFailure
from stepstate.transport.reply_budget import ReplyBudget

log = logging.getLogger(__name__)

MAX_UNANSWERED = 1024
"""Enough to fill a forward from one stream."""
MAX_BYTES = 8 * 2**20
"""Two of the longest replies."""

Q = TypeVar("Q")
A = TypeVar("A")
D = TypeVar("D")


class MessageChannel(Protocol):
    """The two sides of a call."""

    async def read(self) -> Any:
        """The next request, `DecodeFailure` for bytes that are none, or `grpc.aio.EOF`."""
        ...

    async def write(self, message: Any) -> None:
        """Sends a reply."""
        ...


class BidiStream(ABC, Generic[Q, A, D]):
    """Requests Q and replies A of one call; D is a request that is done.

    Args:
        sessions: take the steps.
        messages: the two sides of the call.
        outgoing: the bytes of replies that are on their way, of all calls.
        refused: told the reason of each refusal.
    """

    def __init__(
        self,
        sessions: SessionService,
        messages: MessageChannel,
        *,
        outgoing: ReplyBudget,
        refused: Callable[[str], None],
    ) -> None:
        self.cancelled = False
        self._refused = refused
        self._sessions = sessions
        self._messages = messages
        self._outgoing = outgoing
        self._unanswered = 0
        self._reply_bytes = 0
        self._held_bytes = 0
        self._ready: deque[tuple[A, None] | tuple[None, D]] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._writer_waits: asyncio.Future[None] | None = None
        self._reader_waits: asyncio.Future[None] | None = None
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    def _take(self, request: Q) -> None:
        """Accepts or refuses a request, or lets it wait; raises nothing."""

    @abstractmethod
    def _unreadable(self, error: StepstateError) -> A:
        """The reply to bytes that are no message."""

    @abstractmethod
    def _encoded(self, outcome: D) -> A:
        """The reply to a request that has its outcome."""

    @abstractmethod
    def _size(self, outcome: D) -> int:
        """Bytes of that reply, as they were reserved when the request was accepted."""

    async def run(self) -> None:
        """Serves the call until its client has sent all and been answered.

        Raises:
            Draining: the server stops; everything accepted was answered.
        """
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: _wake(self._writer_waits))
        try:
            # A task too: each reply wakes it, and through every coroutine that awaits it.
            await asyncio.create_task(self._write(self._reader))
        finally:
            self.cancelled = True
            self._reader.cancel()
            for task in self._tasks:
                task.cancel()
            # An exception's traceback leads here in a circle: let no reply hang on it.
            self._ready.clear()
            self._outgoing.release(self._reply_bytes)
        if self._draining:
            raise Draining
        self._reader.result()

    def drain(self) -> None:
        """Reads no more; `run` ends when everything accepted is answered."""
        self._draining = True
        if self._reader is not None:
            self._reader.cancel()

    def deliver(self, outcome: D) -> None:
        """Answers a request that was accepted."""
        if not self.cancelled:
            self._ready.append((None, outcome))
            _wake(self._writer_waits)

    def _reply(self, reply: A) -> None:
        """Sends a reply after those before it."""
        self._ready.append((reply, None))
        _wake(self._writer_waits)

    def _reserve(self, size: int) -> None:
        """Makes room for a reply.

        Raises:
            QueueFull.
        """
        self._outgoing.reserve(size)
        self._reply_bytes += size

    def _release(self, size: int) -> None:
        """Gives that room back."""
        self._outgoing.release(size)
        self._reply_bytes -= size

    def _submit(self, step: Step) -> None:
        """Accepts a step whose `reply_to` leads here.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        self._reserve(step.reply_bytes)
        try:
            self._sessions.submit(step)
        except StepstateError:
            self._release(step.reply_bytes)
            raise

    def _hold(self, size: int) -> None:
        """Counts the bytes of a request that waits; less than 0: it waits no more."""
        self._held_bytes += size
        if size < 0:
            _wake(self._reader_waits)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something beside the reading, at most as long as the call."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def _full(self) -> bool:
        unanswered_bytes = self._reply_bytes + self._held_bytes
        return self._unanswered >= MAX_UNANSWERED or unanswered_bytes > MAX_BYTES

    async def _read(self) -> None:
        """Takes requests until there are no more."""
        read = self._messages.read
        while (request := await read()) is not grpc.aio.EOF:
            if isinstance(request, DecodeFailure):
                self._reply(self._unreadable(request.error))
            else:
                self._take(request)
            self._unanswered += 1
            while self._full:
                self._reader_waits = asyncio.get_running_loop().create_future()
                await self._reader_waits

    async def _write(self, reader: asyncio.Task[None]) -> None:
        """Sends replies until the last request has its own."""
        ready, write = self._ready, self._messages.write
        while True:
            while ready:
                reply, outcome = ready.popleft()
                if outcome is None:
                    await write(reply)
                else:
                    await write(self._encoded(outcome))
                    self._release(self._size(outcome))
                self._unanswered -= 1
                _wake(self._reader_waits)
            if reader.done() and not self._unanswered:
                return
            self._writer_waits = asyncio.get_running_loop().create_future()
            await self._writer_waits


class StreamRegistry:
    """The open streaming calls of a front door, from their start to their end or the drain.

    Args:
        refused: told the reason of each refusal within a call.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        self._refused = refused
        self.open: set[BidiStream[Any, Any, Any]] = set()
        """The calls that have not ended."""
        self.draining = False
        self._all_ended = asyncio.Event()

    async def serve(
        self, make: Callable[[Callable[[str], None]], BidiStream[Any, Any, Any]]
    ) -> None:
        """Serves a call; `make` is given what counts its refusals.

        Raises:
            Draining: the server stops; everything accepted was answered.
        """
        refusals: Counter[str] = Counter()

        def refused(reason: str) -> None:
            refusals[reason] += 1
            self._refused(reason)

        if self.draining:
            raise Draining
        stream = make(refused)
        self.open.add(stream)
        try:
            await stream.run()
        finally:
            self.open.discard(stream)
            if not self.open:
                self._all_ended.set()
            if refusals:
                log.info("a stream had refused steps", extra={"refused": dict(refusals)})

    async def drain(self) -> None:
        """Ends every stream as soon as what it had accepted is answered, and waits for that."""
        self.draining = True
        self._all_ended.clear()
        for stream in self.open:
            stream.drain()
        if self.open:
            await self._all_ended.wait()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
