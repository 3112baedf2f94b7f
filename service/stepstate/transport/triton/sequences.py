"""Triton's sequences as sessions: start opens one, end closes it, and each request is a step.

Rule 1: a start on an id that is open begins anew, as Triton's clients expect; it is counted and
        logged. With `step_t` a start that repeats the first request is that request sent again.
Rule 2: a request without start on an id that is not open is an error that says why.
Rule 3: a full queue makes a request wait: Triton's clients take any error for the end.
Rule 4: a request that starts or ends a sequence holds the line of its session until it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from stepstate.errors import (
    NotFound,
    SequenceNotStarted,
    SessionExists,
    StepMismatch,
)
from stepstate.sessions import Hold, ResidentSession, SessionService, Step
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.triton.call import InferCall
from stepstate.transport.unary import apply_step

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 10.0
"""For room in the queue; then the error says that it is full."""
RETRY_SECONDS = 0.02
MAX_ENDED, MAX_ENDED_BYTES = 1024, 16_384
"""Last steps that are remembered beyond their session, and the longest such reply."""


class SequenceService:
    """Carries out requests.

    Args:
        sessions: the table.
        outgoing: the bytes of replies that are on their way.
        wall: Unix seconds.
        restarted: told the model, name and version, of each sequence that began anew.
    """

    def __init__(
        self,
        sessions: SessionService,
        outgoing: ReplyBudget,
        *,
        unix_time: Callable[[], float],
        restarted: Callable[[str, str], None],
    ) -> None:
        self._sessions = sessions
        self._outgoing = outgoing
        self._unix_time = unix_time
        self._restarted = restarted
        self._ended: OrderedDict[str, tuple[InferCall, Step]] = OrderedDict()

    async def step(self, infer: InferCall) -> Step:
        """Applies the rows of a request that neither starts nor ends its sequence.

        Raises:
            SequenceNotStarted, and StepstateError: why not; then nothing was applied.
        """
        try:
            step = await self._step(infer)
        except NotFound as gone:
            raise unstarted(infer, gone) from None
        if step.error is not None:
            raise step.error
        return step

    async def apply(self, infer: InferCall, hold: Hold) -> Step:
        """Starts the sequence if it is to start, applies the rows, and ends it if it is to end.

        Args:
            infer: the request.
            hold: its place in the line of its session.

        Raises:
            StepstateError: why not; then nothing was applied, but if only ending it failed.
        """
        if (again := self._ended_by(infer)) is not None:
            return again
        if infer.start:
            step = await self._start(infer, hold)
        else:
            try:
                step = await self._step(infer, hold)
            except NotFound as gone:
                raise unstarted(infer, gone) from None
        if step.error is not None:
            if infer.start and step.session.open and not self._sessions.t(step.session):
                await self._sessions.close(infer.session_id, hold=hold)
            raise step.error
        if infer.end:
            await self._sessions.close(infer.session_id, hold=hold)
            self._remember_ended(infer, step)
        return step

    async def _start(self, infer: InferCall, hold: Hold) -> Step:
        await self._begin(infer, hold, anew=infer.t is None)
        step = await self._step(infer, hold)
        if isinstance(step.error, StepMismatch):  # not that request sent again
            await self._begin(infer, hold, anew=True)
            step = await self._step(infer, hold)
        return step

    async def _step(self, infer: InferCall, hold: Hold | None = None) -> Step:
        return await apply_step(
            self._sessions,
            self._outgoing,
            infer.session_id,
            infer.step,
            patience_seconds=LONGEST_WAIT_SECONDS,
            hold=hold,
        )

    async def _begin(self, infer: InferCall, hold: Hold, *, anew: bool) -> None:
        """Opens the session of a sequence; `anew`: even if it is open already.

        Raises:
            InvalidField: the id is that of a session of another model; as `SessionService.open`.
        """
        request = infer.request
        model = self._sessions.catalog.find(request.model_name, request.model_version)
        opening = infer.opening(model, self._unix_time())
        deadline = asyncio.get_running_loop().time() + LONGEST_WAIT_SECONDS
        while True:
            try:
                await self._sessions.open(opening, hold=hold)
            except SessionExists:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            else:
                self._ended.pop(infer.session_id, None)
                return
            try:
                session = await self._sessions.get(infer.session_id, hold=hold)
                infer.check(session)
                if not anew:
                    return
                await self._end_early(session, hold)
            except NotFound:  # it has ended meanwhile
                await asyncio.sleep(RETRY_SECONDS)

    async def _end_early(self, session: ResidentSession, hold: Hold) -> None:
        t = await self._sessions.close(session.session_id, hold=hold)
        record = session.record
        self._restarted(record.model, record.version)
        log.info(
            "a sequence began anew before it had ended",
            extra={"session": session.session_id, "model": record.model, "t": t},
        )

    def _ended_by(self, infer: InferCall) -> Step | None:
        """The step that ended the sequence, if this is its request once more."""
        before, step = self._ended.get(infer.session_id, (None, None))
        if before is None or step is None or infer.t is None or before.t != infer.t:
            return None
        manifest = step.session.model.manifest
        if infer.payload(manifest) != before.payload(manifest):
            return None
        step.replayed = True
        return step

    def _remember_ended(self, infer: InferCall, step: Step) -> None:
        if infer.t is None or step.reply_bytes > MAX_ENDED_BYTES:
            return
        self._ended[infer.session_id] = (infer, step)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)


def unstarted(infer: InferCall, gone: NotFound) -> SequenceNotStarted:
    """Why a request has no sequence."""
    return SequenceNotStarted(infer.session_id[:64], infer.request.model_name[:64], str(gone))
