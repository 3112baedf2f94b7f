"""Each session's queue of requests that can't use it at once: first come, first served.

Rule 1: a request takes its place when it arrives, before it waits for anything.
Rule 2: while anyone is in a session's queue, whoever comes joins it: `find` returns no session
        then, and packed rows lose their references.
Rule 3: from the moment when a session can be used until all who wait for it are served, the event
        loop does nothing else, so nobody comes between.
Rule 4: each place is given up: by its request, by a caller that gives up, or with an error.

A queue with someone in it is moved by exactly one of: a load, a hold at its head, a timer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import MemoryLimit, QueueFull, StepstateError, without_frames
from stepstate.identity import SessionKey, id_of
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import SessionContext
from stepstate.sessions.loader import SessionLoader
from stepstate.sessions.options import check_id
from stepstate.sessions.types import (
    OPEN,
    DeferredRows,
    ResidentSession,
    SessionBarrier,
    Step,
    unexpected,
)

RETRY_SECONDS = 0.02
"""How often the head of a queue is tried again while the server's queue is full."""

T = TypeVar("T")


class Waiter(Protocol):
    """A request that waits for its session."""

    deadline: float
    """In the event loop's time: until then it waits at the head of the queue for room."""

    def found(self, session: ResidentSession) -> None:
        """Uses the session, without a wait. What it raises is given to `failed`."""
        ...

    def failed(self, error: StepstateError) -> None:
        """Takes the reason why it can't be served."""
        ...


class WaitingCall(Generic[T]):
    """A `Waiter` that calls a function with the session.

    Args:
        act: called when its turn has come.
        deadline: see `Waiter`.
    """

    def __init__(self, act: Callable[[ResidentSession], T], deadline: float = 0.0) -> None:
        self.deadline = deadline
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        """What `act` returned; cancelled: nobody waits for it."""
        self._act = act

    def found(self, session: ResidentSession) -> None:
        """See `Waiter`."""
        if not self.result.done():
            self.result.set_result(self._act(session))

    def failed(self, error: StepstateError) -> None:
        """See `Waiter`."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # its caller may have given up: nothing is lost


class Hold:
    """A place in a queue for a request that needs the session alone: at its head until released.

    Made by `RequestQueues.hold`. As a context it waits for its turn, and is released at the end.
    """

    def __init__(self, leave: Callable[[Hold], None]) -> None:
        self._leave = leave
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._turn
        except BaseException:
            self.release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def grant(self) -> None:
        """Its turn has come."""
        if not self._turn.done():
            self._turn.set_result(None)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Does something to its end, even if the caller gives up: the queue waits for that."""
        self._work = task = asyncio.ensure_future(work)
        task.add_done_callback(_retrieve)
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._work = None
            del task  # its error's traceback leads here: no circle

    def release(self) -> None:
        """Gives the place up; once is enough."""
        if self._work is not None and not self._work.done():
            self._work.add_done_callback(lambda _: self._leave(self))
        else:
            self._leave(self)


class _Queue:
    """Those who wait for one session, in order."""

    __slots__ = ("idle", "mover", "waiters")

    def __init__(self) -> None:
        self.waiters: OrderedDict[Waiter | Hold, None] = OrderedDict()
        self.idle = True
        """Nobody has begun to make the session ready."""
        self.mover: asyncio.Task[None] | asyncio.TimerHandle | None = None
        """What moves it on, if not the hold at its head."""


class RequestQueues:
    """The queues of all sessions that have one, and the way for every request to its session.

    Args:
        context: the table and the clock.
        loader: makes sessions ready.
        admission: says whether the server drains.
    """

    def __init__(
        self, context: SessionContext, loader: SessionLoader, admission: Admission
    ) -> None:
        self._table = context.table
        self._admission = admission
        self._clock = context.clock
        self._loader = loader
        self._queues: dict[SessionKey, _Queue] = {}
        self._deferred: set[DeferredRows] = set()

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._queues

    def find(self, key: SessionKey) -> ResidentSession | None:
        """The resident session of this key if it takes steps now, and nobody waits for it."""
        table = self._table
        session = table.by_key.get(key)
        if session is None or session.state is not OPEN or key in self._queues:
            return None
        handle = session.handle
        if table.expires_at[handle] <= self._clock() and not table.busy[handle]:
            return None
        if table.deferred[handle]:
            self._flush(session)
        return session

    def submit(self, step: Step) -> None:
        """Accepts a step of a session that takes steps now; its outcome goes to its `reply_to`.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        self._admission.accept(1, step.rows, source=step.reply_to.source)
        step.session.scheduler.submit(step)

    def arrive(self, key: SessionKey, waiter: Waiter) -> None:
        """Serves a request at once, or lets it wait in its session's queue."""
        session = self.find(key)
        if session is None or not served(waiter, session):
            self.wait(key, waiter)

    def wait(self, key: SessionKey, waiter: Waiter, *, start: bool = True) -> None:
        """Queues a request for a session that `find` did not return.

        Args:
            key: of the session.
            waiter: gets the session, or why there is none, when its turn has come.
            start: makes the session resident; else that waits for `load`, or for others.
        """
        try:
            check_id(id_of(key))
            if key not in self._queues:
                self._admission.check_open()
        except StepstateError as error:
            waiter.failed(without_frames(error))
            return
        self._join(key, waiter)
        if start:
            self.load(key)

    def load(self, key: SessionKey) -> None:
        """Begins to make a session ready that somebody waits for, unless that has begun."""
        queue = self._queues.get(key)
        if queue is not None and queue.idle:
            queue.idle = False
            self._move(key)

    def drop(self, key: SessionKey, waiter: Waiter) -> None:
        """Takes a request out of its queue, if it is still there."""
        queue = self._queues.get(key)
        if queue is not None:
            queue.waiters.pop(waiter, None)
            if queue.idle and not queue.waiters:
                self._remove(key)

    def hold(self, key: SessionKey) -> Hold:
        """Takes a place in a session's queue that nobody comes past until it is released.

        Raises:
            InvalidField: no session can have that id.
        """
        check_id(id_of(key))
        hold = Hold(lambda hold: self._leave(key, hold))
        self._join(key, hold)
        self.load(key)
        return hold

    async def in_turn(
        self,
        key: SessionKey,
        act: Callable[[ResidentSession], T],
        *,
        patience_seconds: float = 0.0,
        hold: Hold | None = None,
    ) -> T:
        """Uses a session as soon as it can be used, after all who came before.

        Args:
            key: of the session, which is made resident if it is not.
            act: called with it, without a wait between; returns what is returned.
            patience_seconds: how long to wait for room, in its place in the queue.
            hold: the caller's place in the queue, if it has one.

        Raises:
            as `get`, and what `act` raises.
        """
        deadline = asyncio.get_running_loop().time() + patience_seconds
        if hold is not None:
            return await self._use_held(key, act, deadline, hold)
        if not patience_seconds and (session := self.find(key)) is not None:
            return act(session)
        call = WaitingCall(act, deadline)
        self.arrive(key, call)
        try:
            return await call.result
        finally:
            self.drop(key, call)
            del call  # its error's traceback leads here: no circle

    async def _use_held(
        self, key: SessionKey, act: Callable[[ResidentSession], T], deadline: float, hold: Hold
    ) -> T:
        """See `in_turn`; the session is looked up again after every wait, as it may have ended."""
        while True:
            session = await self.get(key, hold=hold)
            try:
                return act(session)
            except (QueueFull, MemoryLimit):
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def get(self, key: SessionKey, *, hold: Hold | None = None) -> ResidentSession:
        """The open session of this key, made resident if it is not.

        Only with a `hold` nobody else can use it before the caller does.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            SnapshotModelMismatch, SnapshotCorrupt, Draining, QueueFull, StoreUnavailable.
        """
        if hold is None:
            return await self.in_turn(key, lambda session: session)
        while (session := self._table.usable(key, self._clock())) is None:
            await hold.finish(self._loader.make_ready(key))
        return session

    @staticmethod
    def turn(session: ResidentSession, act: Callable[[], T]) -> SessionBarrier[T]:
        """Calls a function after the steps that a session has accepted, before those to come."""
        barrier = SessionBarrier(act)
        session.scheduler.enqueue_barrier(session, barrier)
        return barrier

    def enqueue(
        self, key: SessionKey, act: Callable[[ResidentSession], T]
    ) -> WaitingCall[SessionBarrier[T]]:
        """Takes a place in a session's queue, then one among its steps; `drop` it at the end."""
        call = WaitingCall(lambda session: self.turn(session, lambda: act(session)))
        self.arrive(key, call)
        return call

    async def after_steps(self, key: SessionKey, act: Callable[[ResidentSession], T]) -> T:
        """Calls a function with a session after the steps that it has accepted by now.

        Raises:
            as `get`, and what `act` raises.
        """
        call = self.enqueue(key, act)
        try:
            return await (await call.result).result()
        finally:
            self.drop(key, call)
            del call  # its error's traceback leads here: no circle

    async def wait_served(self) -> None:
        """Waits until all who are in a queue by now have had their turn."""

        async def passed(hold: Hold) -> None:
            async with hold:
                pass

        await asyncio.gather(*[passed(self.hold(key)) for key in list(self._queues)])

    def defer(self, rows: DeferredRows, handles: NDArray[np.int64]) -> None:
        """Notes that packed rows wait until their sessions [N] are no longer busy.

        `rows` is flushed for each session that something else arrives for, which goes after them.
        """
        self._table.deferred_array[handles] = True
        self._deferred.add(rows)

    def undefer(self, rows: DeferredRows, handles: NDArray[np.int64]) -> None:
        """None of the packed rows waits any more; their sessions were these [N]."""
        self._table.deferred_array[handles] = False
        self._deferred.discard(rows)

    def _flush(self, session: ResidentSession) -> None:
        """Submits deferred packed rows of a session before what arrives now."""
        self._table.deferred[session.handle] = False
        for rows in list(self._deferred):
            rows.flush(session.handle)

    def _join(self, key: SessionKey, waiter: Waiter | Hold) -> None:
        session = self._table.get(key)
        if session is not None:  # packed rows join the queue too
            self._table.revoke(session)
            if self._table.deferred[session.handle]:
                self._flush(session)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue()
            self._table.requested.add(key)
        queue.waiters[waiter] = None

    def _remove(self, key: SessionKey) -> None:
        del self._queues[key]
        self._table.requested.discard(key)

    def _leave(self, key: SessionKey, hold: Hold) -> None:
        queue = self._queues.get(key)
        if queue is None or hold not in queue.waiters:
            return
        at_head = next(iter(queue.waiters)) is hold
        del queue.waiters[hold]
        if at_head and queue.mover is None:
            self._move(key)

    def _move(self, key: SessionKey) -> None:
        """Serves a queue until it is empty, or something has to be waited for."""
        queue = self._queues[key]
        queue.mover = None
        while queue.waiters:
            head = next(iter(queue.waiters))
            if isinstance(head, Hold):
                head.grant()
                return
            session = self._table.usable(key, self._clock())
            if session is None:
                queue.mover = asyncio.ensure_future(self._load(key, queue))
                return
            if not served(head, session):
                loop = asyncio.get_running_loop()
                queue.mover = loop.call_later(RETRY_SECONDS, self._move, key)
                return
            queue.waiters.pop(head, None)
        self._remove(key)

    async def _load(self, key: SessionKey, queue: _Queue) -> None:
        """Makes a session ready for all who wait for it, or fails them with the reason."""
        try:
            await self._loader.make_ready(key)
        except Exception as error:  # noqa: BLE001 - it is logged
            _fail(queue, unexpected("a load failed", error, key))
        self._move(key)


def served(waiter: Waiter, session: ResidentSession) -> bool:
    """Whether a request has been served, with an error too; else it has to be tried again."""
    try:
        waiter.found(session)
    except (QueueFull, MemoryLimit) as full:
        if asyncio.get_running_loop().time() < waiter.deadline:
            return False
        waiter.failed(without_frames(full))
    except Exception as error:  # noqa: BLE001 - it is logged
        waiter.failed(unexpected("a request failed", error, session.key))
    return True


def _fail(queue: _Queue, error: StepstateError) -> None:
    """Fails those who wanted to use the session, up to the first hold: it may change that."""
    while queue.waiters:
        head = next(iter(queue.waiters))
        if isinstance(head, Hold):
            return
        del queue.waiters[head]
        head.failed(error)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Takes a task's error, as its caller may have given up; asyncio would log it as lost."""
    if not task.cancelled():
        task.exception()
