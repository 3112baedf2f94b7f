"""Triton's sequences as sessions: start opens one, end closes it, and each request is a step.

Rule 1: a start on an id that is open restarts the sequence, as Triton's clients expect; it is
        counted and logged. With `step_t`, a start equal to the first request is a retry of it.
Rule 2: a request without start on an id that is not open is refused with the reason.
Rule 3: if a queue is full a request waits: Triton's clients take any error for the end.
Rule 4: a request that starts or ends a sequence holds the queue of its session until it is done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from functools import partial

from stepstate.errors import NotFound, SequenceNotStarted, SessionExists, StepMismatch
from stepstate.sessions import Hold, ResidentSession, Step
from stepstate.transport.bidi import Backend
from stepstate.transport.steps import apply_step
from stepstate.transport.triton.call import InferCall

log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0
"""For a full queue; then the error says that it is full."""
RETRY_SECONDS = 0.02
MAX_ENDED, MAX_ENDED_BYTES = 1024, 16_384
"""Last steps that are kept after the end of their session, and the longest such reply."""


class SequenceService:
    """Starts, steps and ends sequences."""

    def __init__(self, backend: Backend) -> None:
        self._sessions = backend.sessions
        self._metrics = backend.metrics
        self._apply = partial(apply_step, backend, patience_seconds=MAX_WAIT_SECONDS)
        self._ended: OrderedDict[str, tuple[InferCall, Step]] = OrderedDict()

    async def step(self, infer: InferCall) -> Step:
        """Applies the rows of a request that neither starts nor ends its sequence.

        Raises:
            SequenceNotStarted, and StepstateError: why not; then nothing was applied.
        """
        try:
            step = await self._apply(infer.session_id, infer.step)
        except NotFound as gone:
            raise not_started(infer, gone) from None
        if step.error is not None:
            raise step.error
        return step

    async def apply(self, infer: InferCall, hold: Hold) -> Step:
        """Starts the sequence if it is to start, applies the rows, and ends it if it is to end.

        Args:
            infer: the request.
            hold: its place in the queue of its session.

        Raises:
            StepstateError: why not; then nothing was applied, but if only ending it failed.
        """
        if (again := self._retry_of_end(infer)) is not None:
            return again
        if infer.start:
            step = await self._start(infer, hold)
        else:
            try:
                step = await self._apply(infer.session_id, infer.step, hold=hold)
            except NotFound as gone:
                raise not_started(infer, gone) from None
        if step.error is not None:
            if infer.start and step.session.open and not self._sessions.t(step.session):
                await self._sessions.close(infer.session_id, hold=hold)
            raise step.error
        if infer.end:
            await self._sessions.close(infer.session_id, hold=hold)
            self._remember_ended(infer, step)
        return step

    async def _start(self, infer: InferCall, hold: Hold) -> Step:
        await self._open(infer, hold, restart=infer.t is None)
        step = await self._apply(infer.session_id, infer.step, hold=hold)
        if isinstance(step.error, StepMismatch):  # no retry of the first request
            await self._open(infer, hold, restart=True)
            step = await self._apply(infer.session_id, infer.step, hold=hold)
        return step

    async def _open(self, infer: InferCall, hold: Hold, *, restart: bool) -> None:
        """Opens the session of a sequence; `restart`: closes it first if it is open.

        Raises:
            InvalidField: the id is that of a session of another model; as `SessionService.open`.
        """
        request = infer.request
        model = self._sessions.catalog.find(request.model_name, request.model_version)
        opening = infer.opening(model, time.time())
        deadline = asyncio.get_running_loop().time() + MAX_WAIT_SECONDS
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
                if not restart:
                    return
                await self._end_early(session, hold)
            except NotFound:  # it has ended meanwhile
                await asyncio.sleep(RETRY_SECONDS)

    async def _end_early(self, session: ResidentSession, hold: Hold) -> None:
        t = await self._sessions.close(session.session_id, hold=hold)
        record = session.record
        self._metrics.restarted(record.model, record.version)
        log.info(
            "a sequence was restarted before it had ended",
            extra={"session": session.session_id, "model": record.model, "t": t},
        )

    def _retry_of_end(self, infer: InferCall) -> Step | None:
        """The step that ended the sequence, if this is a retry of its request."""
        before, step = self._ended.get(infer.session_id, (None, None))
        if before is None or step is None or infer.t is None or before.t != infer.t:
            return None
        manifest = step.session.model.manifest
        if infer.payload(manifest) != before.payload(manifest):
            return None
        step.replayed = True
        return step

    def _remember_ended(self, infer: InferCall, step: Step) -> None:
        if infer.t is None or len(step.y) > MAX_ENDED_BYTES:
            return
        self._ended[infer.session_id] = (infer, step)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)


def not_started(infer: InferCall, gone: NotFound) -> SequenceNotStarted:
    """The refusal of a request that has no session."""
    return SequenceNotStarted(infer.session_id[:64], infer.request.model_name[:64], str(gone))
