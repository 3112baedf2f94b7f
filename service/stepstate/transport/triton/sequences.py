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
from functools import partial

from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import NotFound, SequenceNotStarted, SessionExists, StepMismatch
from stepstate.logging.audit import AuditEvent, audit
from stepstate.models import Model
from stepstate.sessions import Hold, ResidentSession, Step
from stepstate.transport.auditing import audit_failures, record_of_call
from stepstate.transport.bidi import Backend
from stepstate.transport.peers import current_peer
from stepstate.transport.steps import apply_step
from stepstate.transport.triton.call import InferCall
from stepstate.transport.triton.ended import EndedSequence, EndedSequences

log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0
"""For a full queue; then the error says that it is full."""
RETRY_SECONDS = 0.02
METHOD = "ModelInfer"
"""Of the acts on record, also for requests of streams."""


class SequenceService:
    """Starts, steps and ends sequences.

    Args:
        backend: serves the requests.
        ended: remembers ended ones.
    """

    def __init__(self, backend: Backend, ended: EndedSequences) -> None:
        self._sessions = backend.sessions
        self._metrics = backend.metrics
        self._apply = partial(apply_step, backend, patience_seconds=MAX_WAIT_SECONDS)
        self._ended = ended

    async def step(self, infer: InferCall) -> Step:
        """Applies the rows of a request that neither starts nor ends its sequence.

        Raises:
            SequenceNotStarted, and StepstateError: why not; then nothing was applied.
        """
        try:
            step = await self._apply(infer.key, infer.step)
        except NotFound as gone:
            raise not_started(infer, gone) from None
        if step.error is not None:
            raise step.error
        return step

    async def apply(self, infer: InferCall, hold: Hold) -> pb.ModelInferResponse:
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
                step = await self._apply(infer.key, infer.step, hold=hold)
            except NotFound as gone:
                raise not_started(infer, gone) from None
        if step.error is not None:
            if infer.start and step.session.open and not self._sessions.t(step.session):
                await self._close(step.session, hold)
            raise step.error
        reply = infer.reply(step)
        if infer.end:
            await self._close(step.session, hold)
            self._remember_ended(infer, step, reply)
        return reply

    async def _start(self, infer: InferCall, hold: Hold) -> Step:
        await self._open(infer, hold, restart=infer.t is None)
        step = await self._apply(infer.key, infer.step, hold=hold)
        if isinstance(step.error, StepMismatch):  # no retry of the first request
            await self._open(infer, hold, restart=True)
            step = await self._apply(infer.key, infer.step, hold=hold)
        return step

    async def _open(self, infer: InferCall, hold: Hold, *, restart: bool) -> None:
        """Opens the session of a sequence; `restart`: closes it first if it is open.

        Raises:
            InvalidField: the id is that of a session of another model; as `SessionService.open`.
        """
        model = self._sessions.catalog.of(infer.tenant).find(infer.head.model, infer.head.version)
        record = record_of_call(AuditEvent.SESSION_OPENED, METHOD, infer.session_id, model.key)
        with audit_failures(record):
            opened = await self._open_new(infer, model, hold, restart=restart)
        if opened:
            audit(record)

    async def _open_new(self, infer: InferCall, model: Model, hold: Hold, *, restart: bool) -> bool:
        """See `_open`; False: it is open already."""
        opening = infer.opening(model, time.time())
        deadline = asyncio.get_running_loop().time() + MAX_WAIT_SECONDS
        while True:
            try:
                await self._sessions.open(opening, hold=hold)
            except SessionExists:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            else:
                self._ended.discard(infer.key)
                return True
            try:
                session = await self._sessions.get(infer.key, hold=hold)
                infer.check(session)
                if not restart:
                    return False
                await self._end_early(session, hold)
            except NotFound:  # it has ended meanwhile
                await asyncio.sleep(RETRY_SECONDS)

    async def _end_early(self, session: ResidentSession, hold: Hold) -> None:
        t = await self._close(session, hold)
        record = session.record
        self._metrics.restarted(record.model, record.version)
        log.info(
            "a sequence was restarted before it had ended",
            extra={
                "tenant": record.tenant,
                "session": session.session_id,
                "model": record.model,
                "t": t,
            },
        )

    async def _close(self, session: ResidentSession, hold: Hold) -> int:
        """Closes a session; returns its last t."""
        record = record_of_call(
            AuditEvent.SESSION_CLOSED, METHOD, session.session_id, session.model.key
        )
        with audit_failures(record):
            t = await self._sessions.close(session.key, hold=hold)
        audit(record)
        return t

    def _retry_of_end(self, infer: InferCall) -> pb.ModelInferResponse | None:
        """The reply that ended the sequence, if this is a retry of its request."""
        ended = self._ended.get(infer.key)
        if ended is None or infer.t is None or ended.t != infer.t:
            return None
        reply = pb.ModelInferResponse.FromString(ended.reply)
        model = self._sessions.catalog.of(infer.tenant).find(reply.model_name, reply.model_version)
        if infer.head.model not in ("", reply.model_name):
            return None
        if infer.digest(model.manifest) != ended.digest:
            return None
        reply.id = infer.head.request_id
        reply.parameters["replayed"].bool_param = True
        return reply

    def _remember_ended(self, infer: InferCall, step: Step, reply: pb.ModelInferResponse) -> None:
        if infer.t is None:
            return
        digest = infer.digest(step.session.model.manifest)
        group = current_peer.get().group.key
        ended = EndedSequence(group, infer.t, digest, reply.SerializeToString())
        self._ended.add(infer.key, ended)


def not_started(infer: InferCall, gone: NotFound) -> SequenceNotStarted:
    """The refusal of a request that has no session."""
    return SequenceNotStarted(infer.session_id, infer.head.model[:64], str(gone))
