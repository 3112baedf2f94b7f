"""The lines of sessions that can't take a request at once: what arrived first goes first.

Rule 1: a request takes its place when it arrives, before it waits for anything.
Rule 2: while anyone stands in a session's line, whoever comes stands behind: `Sessions.find` sees
        to that, and what goes past it (see `packed`) is turned back.
Rule 3: from the moment when a session can be used to the acceptance of all who wait for it, the
        event loop does nothing else, so nobody comes between.
Rule 4: each place is given up: by its request, by a caller that gives up, or with an error.

A line with someone in it is moved by exactly one of: a load, a hold at its head, a timer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, Self, TypeVar

from stepstate.errors import QueueFull, StepstateError
from stepstate.sessions.surprise import surprise
from stepstate.sessions.types import ResidentSession

RETRY_SECONDS = 0.02
"""How often one at the head of its line asks again for room in the queue."""

T = TypeVar("T")


class Waiter(Protocol):
    """A request that waits for its session."""

    deadline: float
    """In the event loop's time: until then it waits at the head of the line for a full queue."""

    def found(self, session: ResidentSession) -> None:
        """Uses the session, without a wait. What it raises is given to `failed`."""
        ...

    def failed(self, error: StepstateError) -> None:
        """Takes the reason why it can't be served."""
        ...


class Call(Generic[T]):
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
            self.result.exception()  # its caller may have given up: no loss


class Hold:
    """A place in a line for a request that nobody may come between: at its head until released.

    Made by `Arrivals.hold`. Entered as a context it waits for its turn, and is released at the end.
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
        """Does something to its end, even if the caller gives up: the line waits for that."""
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


class _Line:
    """Those who wait for one session, in order."""

    __slots__ = ("mover", "still", "waiters")

    def __init__(self) -> None:
        self.waiters: OrderedDict[Waiter | Hold, None] = OrderedDict()
        self.still = True
        """Nothing was begun for it yet."""
        self.mover: asyncio.Task[None] | asyncio.TimerHandle | None = None
        """What moves it on, if not the hold at its head."""


class Arrivals:
    """The lines of all sessions that have one.

    Args:
        find: the session of an id if it can be used now.
        make_ready: waits until it can be used; raises why it never will be.
    """

    def __init__(
        self,
        find: Callable[[str], ResidentSession | None],
        make_ready: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        self.lines: dict[str, _Line] = {}
        """By id; an id without a line has no entry."""
        self._find = find
        self._make_ready = make_ready

    def wait(self, session_id: str, waiter: Waiter, *, start: bool = True) -> None:
        """Puts a request at the end of a line.

        Args:
            session_id: a valid one.
            waiter: the request.
            start: makes the session ready; else that waits for `start`, or for others in the line.
        """
        self._join(session_id, waiter)
        if start:
            self.start(session_id)

    def start(self, session_id: str) -> None:
        """Begins to make a session ready if anyone waits for it and nobody does so yet."""
        line = self.lines.get(session_id)
        if line is not None and line.still:
            line.still = False
            self._move(session_id)

    def hold(self, session_id: str) -> Hold:
        """Takes a place at the end of a line, for a request that nobody may come between."""
        hold = Hold(lambda hold: self._leave(session_id, hold))
        self._join(session_id, hold)
        self.start(session_id)
        return hold

    def drop(self, session_id: str, waiter: Waiter) -> None:
        """Takes a request out of its line, if it still stands there."""
        line = self.lines.get(session_id)
        if line is not None:
            line.waiters.pop(waiter, None)
            if line.still and not line.waiters:
                del self.lines[session_id]

    async def wait_served(self) -> None:
        """Waits until all who stand in a line by now have had their turn."""

        async def passed(hold: Hold) -> None:
            async with hold:
                pass

        await asyncio.gather(*[passed(self.hold(session_id)) for session_id in list(self.lines)])

    def _join(self, session_id: str, waiter: Waiter | Hold) -> None:
        line = self.lines.get(session_id)
        if line is None:
            line = self.lines[session_id] = _Line()
        line.waiters[waiter] = None

    def _leave(self, session_id: str, hold: Hold) -> None:
        line = self.lines.get(session_id)
        if line is None or hold not in line.waiters:
            return
        at_head = next(iter(line.waiters)) is hold
        del line.waiters[hold]
        if at_head and line.mover is None:
            self._move(session_id)

    def _move(self, session_id: str) -> None:
        """Serves a line until it is empty, or something has to be waited for."""
        line = self.lines[session_id]
        line.mover = None
        while line.waiters:
            head = next(iter(line.waiters))
            if isinstance(head, Hold):
                head.grant()
                return
            session = self._find(session_id)
            if session is None:
                line.mover = asyncio.ensure_future(self._load(session_id, line))
                return
            if not served(head, session):
                loop = asyncio.get_running_loop()
                line.mover = loop.call_later(RETRY_SECONDS, self._move, session_id)
                return
            line.waiters.pop(head, None)
        del self.lines[session_id]

    async def _load(self, session_id: str, line: _Line) -> None:
        """Makes a session ready for all who wait for it, or tells them why that can't be."""
        try:
            await self._make_ready(session_id)
        except Exception as error:  # noqa: BLE001 - a surprise is logged
            _fail(line, surprise("a load failed", error, session_id))
        self._move(session_id)


def served(waiter: Waiter, session: ResidentSession) -> bool:
    """Whether a request has been served, with an error too; else it has to be asked again."""
    try:
        waiter.found(session)
    except QueueFull as full:
        if asyncio.get_running_loop().time() < waiter.deadline:
            return False
        waiter.failed(full.with_traceback(None))
    except Exception as error:  # noqa: BLE001 - a surprise is logged
        waiter.failed(surprise("a request failed", error, session.session_id))
    return True


def _fail(line: _Line, error: StepstateError) -> None:
    """Fails those who wanted to use the session, up to the first whose turn may change that."""
    while line.waiters:
        head = next(iter(line.waiters))
        if isinstance(head, Hold):
            return
        del line.waiters[head]
        head.failed(error)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Looks at a task's error, as its caller may have given up; asyncio would log it as lost."""
    if not task.cancelled():
        task.exception()
