"""Triton's sequences as sessions: start opens one, end closes it, and each request is a step.

Rule 1: a start on an id that is open begins anew, as Triton's clients expect; it is counted and
        logged. With `step_t` a start that repeats the first request is that request sent again.
Rule 2: a request without start on an id that is not open is an error that says why.
Rule 3: a full queue makes a request wait: Triton's clients take any error for the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from stepstate.errors import (
    NotFound,
    QueueFull,
    SequenceUnstarted,
    SessionExists,
    StepMismatch,
    StepstateError,
)
from stepstate.sessions import Session, Sessions, Step
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.triton.infer import Infer
from stepstate.transport.waiting import WaitingCall

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 10.0
"""For room in the queue; then the error says that it is full."""
RETRY_SECONDS = 0.02
MOST_ENDED, MOST_ENDED_BYTES = 1024, 16_384
"""Last steps that are remembered beyond their session, and the longest such reply."""


class Sequences:
    """Carries out requests.

    Args:
        sessions: the table.
        outgoing: the bytes of replies that are on their way.
        wall: Unix seconds.
        restarted: told the model, name and version, of each sequence that began anew.
    """

    def __init__(
        self,
        sessions: Sessions,
        outgoing: Outgoing,
        *,
        wall: Callable[[], float],
        restarted: Callable[[str, str], None],
    ) -> None:
        self._sessions = sessions
        self._outgoing = outgoing
        self._wall = wall
        self._restarted = restarted
        self._ended: OrderedDict[str, tuple[Infer, Step]] = OrderedDict()

    async def apply(self, infer: Infer) -> Step:
        """Starts the sequence if it is to start, applies the rows, and ends it if it is to end.

        Raises:
            StepstateError: why not; then nothing was applied, but if only ending it failed.
        """
        if (again := self._ended_by(infer)) is not None:
            return again
        step = await self._step(infer, await self.session_of(infer))
        if infer.start and isinstance(step.error, StepMismatch):  # not that request sent again
            step = await self._step(infer, await self._begin(infer, anew=True))
        if step.error is not None:
            if infer.start and not step.session.barred and not self._sessions.t(step.session):
                await self._sessions.close(infer.session_id)
            raise step.error
        if infer.end:
            await self._sessions.close(infer.session_id)
            self._remember_ended(infer, step)
        return step

    async def session_of(self, infer: Infer) -> Session:
        """The session of a request, opened if the request starts it.

        Raises:
            SequenceUnstarted, and as `Sessions.get` and `Sessions.open`.
        """
        if infer.start:
            return await self._begin(infer, anew=infer.t is None)
        return await self._open_session(infer)

    async def submit(
        self, infer: Infer, session: Session, accept: Callable[[Session], Step]
    ) -> Step:
        """Lets a step be accepted as soon as there is room.

        Args:
            infer: its request.
            session: of the request; it is looked up again after every wait, as it may have ended.
            accept: makes the step of the session and submits it, without a wait between.

        Raises:
            QueueFull: there was no room for too long.
            As `session_of`, and what `accept` raises.
        """
        deadline = asyncio.get_running_loop().time() + LONGEST_WAIT_SECONDS
        while True:
            try:
                return accept(session)
            except QueueFull:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)
            session = await self._open_session(infer)

    async def _open_session(self, infer: Infer) -> Session:
        try:
            return await self._sessions.get(infer.session_id)
        except NotFound as gone:
            model = infer.request.model_name[:64]
            raise SequenceUnstarted(infer.session_id[:64], model, str(gone)) from None

    async def _step(self, infer: Infer, session: Session) -> Step:
        call = WaitingCall()
        step = await self.submit(
            infer, session, lambda session: self._accepted(infer, session, call)
        )
        try:
            return await call.outcome()
        finally:
            self._outgoing.release(step.reply_bytes)

    def _accepted(self, infer: Infer, session: Session, call: WaitingCall) -> Step:
        step = infer.step(session, call)
        self._outgoing.reserve(step.reply_bytes)
        try:
            self._sessions.submit(step)
        except StepstateError:
            self._outgoing.release(step.reply_bytes)
            raise
        return step

    async def _begin(self, infer: Infer, *, anew: bool) -> Session:
        """Opens the session of a sequence; `anew`: even if it is open already.

        Raises:
            InvalidField: the id is that of a session of another model; and as `Sessions.open`.
        """
        request = infer.request
        model = self._sessions.catalog.find(request.model_name, request.model_version)
        deadline = asyncio.get_running_loop().time() + LONGEST_WAIT_SECONDS
        while True:
            try:
                session = await self._sessions.open(infer.opening(model, self._wall()))
            except SessionExists:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            else:
                self._ended.pop(infer.session_id, None)
                return session
            try:
                session = await self._sessions.get(infer.session_id)
                infer.check(session)
                if not anew:
                    return session
                await self._end_early(session)
            except NotFound:  # it has ended meanwhile, or is about to
                await asyncio.sleep(RETRY_SECONDS)

    async def _end_early(self, session: Session) -> None:
        t = await self._sessions.close(session.session_id)
        record = session.record
        self._restarted(record.model, record.version)
        log.info(
            "a sequence began anew before it had ended",
            extra={"session": session.session_id, "model": record.model, "t": t},
        )

    def _ended_by(self, infer: Infer) -> Step | None:
        """The step that ended the sequence, if this is its request once more."""
        before, step = self._ended.get(infer.session_id, (None, None))
        if before is None or step is None or infer.t is None or before.t != infer.t:
            return None
        manifest = step.session.lane.model.manifest
        if infer.payload(manifest) != before.payload(manifest):
            return None
        step.replayed = True
        return step

    def _remember_ended(self, infer: Infer, step: Step) -> None:
        if infer.t is None or step.reply_bytes > MOST_ENDED_BYTES:
            return
        self._ended[infer.session_id] = (infer, step)
        if len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)
