"""Bidirectional calls: requests in, replies out as they are ready, both bounded.

Rule 1: a call has at most `MAX_UNANSWERED` accepted requests without a reply, and about `MAX_ROWS`
        packed rows and `MAX_BYTES` of requests and replies; all of it is part of what its peer may
        hold, and of the requests that its peer may have in the engine (`Source`). Beyond that it
        is not read, and HTTP/2 flow control holds the client back.
Rule 2: when a call ends, what it has waiting and did not start is never applied.
Rule 3: a request whose session has to be loaded first waits in the queue of that session. It holds
        up no other session: the call is read on.

What a request means is up to the subclasses of `BidiStream`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from stepstate.budget import MemoryUse, call_memory
from stepstate.errors import Draining, MemoryLimit, StepstateError, TenantLimitReached
from stepstate.identity import SessionKey
from stepstate.metrics import Metrics
from stepstate.sessions import (
    MAX_SOURCE_RUNNING,
    ReplyTo,
    ResidentSession,
    SessionService,
    Step,
)
from stepstate.transport.admission import CallAdmission
from stepstate.transport.authentication import current_principal
from stepstate.transport.expected_rows import ExpectedRows
from stepstate.transport.interceptor import DecodeFailure, MessageChannel
from stepstate.transport.open_calls import current_call
from stepstate.transport.peers import current_peer
from stepstate.transport.shares import REFUSAL_COST, cost_of

log = logging.getLogger(__name__)

MAX_UNANSWERED = 1024
"""Enough to fill a forward from one stream."""
MAX_ROWS = 16_384
"""Of packed messages: 64 of the largest forwards."""
MAX_BYTES = 8 * 2**20
"""Two of the longest replies."""
STEP_BYTES = 1024
"""What a step takes, beside its values."""
REFUSAL_BYTES = 2048
"""Of a reply that says why a request was refused, with what it takes to keep it."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What the calls of every API are served with."""

    sessions: SessionService
    metrics: Metrics
    admission: CallAdmission
    expected: ExpectedRows


class Outcome(Protocol):
    """A request that is done."""

    @property
    def held_bytes(self) -> int:
        """Bytes reserved when it was accepted: for itself and its reply."""
        ...


Q = TypeVar("Q")
A = TypeVar("A")
D = TypeVar("D", bound=Outcome)
W = TypeVar("W")


class BidiStream(ABC, Generic[Q, A, D, W]):
    """One call.

    Requests Q, replies A; D: a request that is done, W: a request that waits for its session.

    Args:
        backend: serves the requests.
        messages: the two directions of the call.
        patience_seconds: how long a request waits for a full queue, in its place in the queue of
            its session.
    """

    def __init__(
        self, backend: Backend, messages: MessageChannel, *, patience_seconds: float = 0.0
    ) -> None:
        self.cancelled = False
        self._peer = current_peer.get()
        self._principal = current_principal.get()
        self.source = self._peer.source
        self.refusals: Counter[str] = Counter()
        """Refused requests, by reason."""
        self._sessions = backend.sessions
        self._metrics = backend.metrics
        self._shares = backend.admission.shares
        self._memory = call_memory.get()
        self._messages = messages
        self._patience_seconds = patience_seconds
        self._context = contextvars.copy_context()  # of the call, for its tasks
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unanswered = 0
        self._unanswered_rows = 0  # of packed messages
        self._held_bytes = 0  # of requests that wait, and of replies
        self._ready: deque[tuple[A | bytes, None, int] | tuple[None, D, int]] = deque()
        self._waiting_loads: set[_PendingLoad[W]] = set()
        self._leaving: int | None = None  # what was reserved for the reply that waits to leave
        self._inbox: deque[bytes] = deque()  # requests that came while it was paused
        self._turn: asyncio.Future[None] | None = None  # of the request that waits for it
        self._paused = False
        self._stalled = False  # until there is memory
        self._goes_on = False  # soon
        self._flushing = False
        self._ended = False  # the client has sent its last request
        self._ending: StepstateError | None = None  # no more is read, and the call ends with it
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    def _take(self, request: Q) -> None:
        """Accepts or refuses a request, or lets it wait.

        Raises:
            MemoryLimit: there is no room for it; nothing was done, and it will be called again.
        """

    @abstractmethod
    def _accept(self, waiting: W, session: ResidentSession) -> None:
        """Accepts a request that has waited for its session. What it raises goes to `_refuse`."""

    @abstractmethod
    def _refuse(self, waiting: W, error: StepstateError) -> None:
        """Refuses a request that has waited for its session."""

    @abstractmethod
    def _encode_failure(self, error: StepstateError) -> A:
        """The reply to bytes that are no message."""

    @abstractmethod
    def _encode(self, outcome: D) -> A:
        """The reply to a request that is done."""

    async def run(self) -> None:
        """Serves the call until its client has sent all and been answered.

        Raises:
            StepstateError: what `end` was given; everything accepted was answered.
        """
        try:
            self._messages.attach(self)
            await self._done
        finally:
            self.cancelled = True
            self._messages.detach()
            if self._turn is not None:
                self._turn.cancel()
            for task in self._tasks:
                task.cancel()
            # A traceback that leads here is part of a reference cycle: no reply may be in it.
            self._ready.clear()
            self._inbox.clear()
            self._drop_waiting()
        if self._ending is not None:
            raise self._ending

    def end(self, error: StepstateError) -> None:
        """Reads no more; `run` raises the error when everything accepted is answered."""
        self._ending = self._ending or error
        self._ended = True
        self._pause()
        self._inbox.clear()
        self._end_if_answered()

    def deliver(self, outcome: D) -> None:
        """Answers a request that was accepted."""
        if not self.cancelled:
            self._ready.append((None, outcome, outcome.held_bytes))
            self._flush()

    # Requests

    def received(self, payload: bytes) -> None:
        """See `MessageSink`: takes a request, or keeps it while the call is paused."""
        if self._ending is not None:
            return  # it may still send what its window allows
        if self._paused:
            self._charge(MemoryUse.REQUESTS, len(payload))
            self._inbox.append(payload)
        else:
            self._take_in_turn(payload)

    def half_closed(self) -> None:
        """See `MessageSink`."""
        self._ended = True
        self._end_if_answered()

    def failed(self, error: Exception) -> None:
        """See `MessageSink`."""
        self._fail(error)

    def _take_in_turn(self, data: bytes) -> None:
        """Takes a request, now or when its peer may have it handled."""
        turn = self._shares.take(self._peer, cost_of(data))
        if turn is None:
            self._take_bytes(data)
            return
        self._turn = turn
        self._stalled = True
        self._pause()
        turn.add_done_callback(functools.partial(self._take_now, data))

    def _take_now(self, data: bytes, turn: asyncio.Future[None]) -> None:
        """Its turn has come; or the call has ended."""
        if not turn.cancelled():
            self._stalled = False
            self._take_bytes(data)
            self._go_on()

    def _take_bytes(self, data: bytes) -> None:
        try:
            request = self._messages.decode(data)
            if isinstance(request, DecodeFailure):
                self._reply(self._encode_failure(request.error))
            else:
                self._take(request)
        except MemoryLimit as full:
            self._stall(self._take_when_it_fits(request, full.size))
        except Exception as error:  # noqa: BLE001 (the call ends with it)
            self._fail(error)
        else:
            self._unanswered += 1
            self._stop_if_full()

    def _stop_if_full(self) -> None:
        """Reads no more while so much is under way that one more would only wait."""
        if self._is_full():
            self._pause()
        elif not self._memory.fits(0):
            self._stall(self._memory.wait_for(0))
        elif self.source.running >= MAX_SOURCE_RUNNING:
            self._stall(self.source.wait_for_room())

    def _is_full(self) -> bool:
        """Whether it has as much under way as one call may have."""
        return (
            self._unanswered >= MAX_UNANSWERED
            or self._unanswered_rows >= MAX_ROWS
            or self._held_bytes > MAX_BYTES
        )

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._messages.pause()

    def _stall(self, until: Coroutine[Any, Any, None]) -> None:
        """Reads no more until something is done."""
        self._stalled = True
        self._pause()
        self._start(self._go_on_after(until))

    async def _go_on_after(self, until: Coroutine[Any, Any, None]) -> None:
        try:
            await until
        except Exception as error:  # noqa: BLE001 (the call ends with it)
            self._fail(error)
        else:
            self._stalled = False
            self._go_on()

    async def _take_when_it_fits(self, request: Q, missing: int) -> None:
        while missing:
            await self._memory.wait_for(missing)
            try:
                self._take(request)
                missing = 0
            except MemoryLimit as full:
                missing = full.size
        self._unanswered += 1

    def _go_on_soon(self) -> None:
        """Takes requests again, once what is being done is done: it may deliver others first."""
        if not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """Takes requests again, if it was paused and need not be."""
        self._goes_on = False
        if self._ending is not None:  # it may have waited for this alone
            self._end_if_answered()
            return
        if self.cancelled or not self._paused or self._stalled or self._is_full():
            return
        self._paused = False
        while self._inbox and not self._paused:
            data = self._inbox.popleft()
            self._memory.release(MemoryUse.REQUESTS, len(data))
            self._held_bytes -= len(data)
            self._take_in_turn(data)
        if not self._paused:
            self._messages.resume()
            self._end_if_answered()

    def _end_if_answered(self) -> None:
        finished = self._ended and not self._unanswered and not self._inbox and not self._stalled
        if finished and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Ends the call: an error that nobody expects."""
        if not self._done.done():
            self._done.set_exception(error)

    # Replies

    def writable(self) -> None:
        """See `MessageSink`: the reply that waited has left."""
        if self._leaving is not None:
            size, self._leaving = self._leaving, None
            self._answered(size)
            self._flush()

    def _flush(self) -> None:
        """Sends the replies that are ready, as far as the client takes them."""
        if self._flushing:
            return
        self._flushing = True
        send, ready = self._messages.send, self._ready
        try:
            while ready and self._leaving is None:
                data, size = self._next_reply()
                if send(data):
                    self._answered(size)
                else:
                    self._leaving = size
        except Exception as error:  # noqa: BLE001 (the call ends with it)
            self._fail(error)
        finally:
            self._flushing = False

    def _next_reply(self) -> tuple[bytes, int]:
        """The bytes of the next reply, and what was reserved: all else of it is dropped."""
        reply, outcome, size = self._ready.popleft()
        data = reply if outcome is None else self._encode(outcome)
        return self._messages.encode(data), size

    def _answered(self, size: int) -> None:
        """A reply has left."""
        self._unanswered -= 1
        self._release(MemoryUse.REPLIES, size)
        self._end_if_answered()

    # What waits

    def resume(self, load: _PendingLoad[W], session: ResidentSession) -> None:
        """The session of a waiting request is loaded; on QueueFull it is called again."""
        if load in self._waiting_loads:
            self._accept(load.request, session)
            self._waiting_loads.discard(load)
            self._release(MemoryUse.REQUESTS, load.size)

    def fail(self, load: _PendingLoad[W], error: StepstateError) -> None:
        """A waiting request can't be served."""
        if load in self._waiting_loads:
            self._waiting_loads.discard(load)
            self._release(MemoryUse.REQUESTS, load.size)
            self._refuse(load.request, error)

    def _wait(self, key: SessionKey, request: W, size: int) -> None:
        """Queues a request of `size` bytes for its session, which `find` did not give.

        It is refused if its tenant may not have so many: they may never fit.

        Raises:
            MemoryLimit.
        """
        try:
            self._reserve(MemoryUse.REQUESTS, size)
        except TenantLimitReached as error:
            self._refuse(request, error)
            return
        deadline = asyncio.get_running_loop().time() + self._patience_seconds
        load = _PendingLoad(self, key, request, size, deadline)
        self._waiting_loads.add(load)
        self._sessions.wait(key, load)

    def _drop_waiting(self) -> int:
        """Takes all waiting requests out of their queues; returns how many."""
        dropped, self._waiting_loads = self._waiting_loads, set()
        for load in dropped:
            self._sessions.drop(load.key, load)
        return len(dropped)

    def _refuse_in_order(self, key: SessionKey, error: StepstateError, reply_to: ReplyTo) -> bool:
        """Delivers a refusal after the session's steps; False: there are none to wait for."""
        refused = self._sessions.refuse(key, error, reply_to, held_bytes=REFUSAL_BYTES)
        if refused:
            self._charge(MemoryUse.REPLIES, REFUSAL_BYTES)
        return refused

    def _count_refusal(self, error: StepstateError) -> None:
        self.refusals[error.reason] += 1
        self._metrics.refused(error.reason)
        self._shares.charge(self._peer, REFUSAL_COST)

    def _send(self, reply: bytes) -> None:
        """Sends a reply for which nothing was reserved: that is made up for if it has to wait."""
        if self._ready or self._leaving is not None:
            self._charge(MemoryUse.REPLIES, len(reply))
            self._ready.append((reply, None, len(reply)))
        elif self._messages.send(reply):
            self._unanswered -= 1
            if self._paused:
                self._go_on_soon()
            elif self._ended:
                self._end_if_answered()
        else:
            self._charge(MemoryUse.REPLIES, len(reply))
            self._leaving = len(reply)

    def _reply(self, reply: A, size: int = REFUSAL_BYTES) -> None:
        """Sends a reply, which takes `size` bytes, after those before it."""
        self._charge(MemoryUse.REPLIES, size)
        self._ready.append((reply, None, size))
        self._flush()

    def _reserve(self, use: MemoryUse, size: int) -> None:
        """Reserves bytes of the call.

        Raises:
            MemoryLimit, TenantLimitReached.
        """
        self._memory.reserve(use, size)
        self._held_bytes += size

    def _charge(self, use: MemoryUse, size: int) -> None:
        """Counts bytes that are here already, whether there is room or not."""
        self._memory.charge(use, size)
        self._held_bytes += size

    def _release(self, use: MemoryUse, size: int) -> None:
        """Releases bytes of the call."""
        self._memory.release(use, size)
        self._held_bytes -= size
        if self._paused:
            self._go_on_soon()

    def _submit(self, step: Step) -> None:
        """Submits a step whose `reply_to` leads here.

        Raises:
            Draining, QueueFull, MemoryLimit, TenantLimitReached: nothing was accepted.
        """
        self._reserve(MemoryUse.REPLIES, step.held_bytes)
        try:
            self._sessions.submit(step)
        except StepstateError:
            self._release(MemoryUse.REPLIES, step.held_bytes)
            raise

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something concurrently, until it ends or the call does."""
        task = asyncio.get_running_loop().create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(slots=True, eq=False)
class _PendingLoad(Generic[W]):
    """A request of a stream in the queue of its session; a `Waiter`."""

    stream: BidiStream[Any, Any, Any, W]
    key: SessionKey
    request: W
    size: int
    deadline: float

    def found(self, session: ResidentSession) -> None:
        """See `Waiter`."""
        self.stream.resume(self, session)

    def failed(self, error: StepstateError) -> None:
        """See `Waiter`."""
        self.stream.fail(self, error)


AnyStream = BidiStream[Any, Any, Any, Any]


class StreamRegistry:
    """The open streaming calls of an API, from their start to their end or the drain."""

    def __init__(self) -> None:
        self.open: set[AnyStream] = set()
        """The calls that have not ended."""
        self.draining = False
        self._all_ended = asyncio.Event()

    async def serve(self, stream: AnyStream) -> None:
        """Serves a call.

        Raises:
            Draining: the server stops; everything accepted was answered.
            Unauthenticated: its credential has ended; the same.
        """
        if self.draining:
            raise Draining
        self.open.add(stream)
        call = current_call.get()
        if call is not None:
            call.finish_with(stream.end)
        try:
            await stream.run()
        finally:
            self.open.discard(stream)
            if not self.open:
                self._all_ended.set()
            if stream.refusals:
                refused = ", ".join(f"{why}: {count}" for why, count in stream.refusals.items())
                log.info("a stream had refused steps", extra={"refused": refused})

    async def drain(self) -> None:
        """Ends every stream as soon as what it had accepted is answered, and waits for that."""
        self.draining = True
        self._all_ended.clear()
        for stream in self.open:
            stream.end(Draining())
        if self.open:
            await self._all_ended.wait()
