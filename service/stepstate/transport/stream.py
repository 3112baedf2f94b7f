"""One StreamSteps call: many sessions' steps in, replies out as they are ready.

Rule 1: replies of one session leave in the order of its requests, errors too.
Rule 2: at most `MOST_UNANSWERED` requests of a stream are accepted and unanswered, and
        replies of at most about `MOST_BYTES`; beyond that the stream is not read, and
        HTTP/2 holds the client back.
Rule 3: a session that has to be loaded first holds up nobody else: its requests wait for it
        in their order, and the stream is read on.
Rule 4: when the call ends, what it has waiting and not yet taken did not happen.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from stepstate.errors import Draining, Internal, StepstateError
from stepstate.sessions import ID_LENGTH, Session, Sessions, Step
from stepstate.transport.codec import decode_step, encode_step
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb

log = logging.getLogger(__name__)

MOST_UNANSWERED = 1024
"""Enough to fill a forward from one stream."""
MOST_BYTES = 8 * 2**20
"""Two of the longest replies."""


class Messages(Protocol):
    """The two sides of a call."""

    async def read(self) -> Any:
        """The next `StepRequest`, or `grpc.aio.EOF`."""
        ...

    async def write(self, message: pb.StepResponse) -> None:
        """Sends a reply."""
        ...


class StepStream:
    """A `ReplyTo` for all steps of one call.

    Args:
        sessions: take the steps.
        messages: the two sides of the call.
        outgoing: the bytes of replies that are on their way, of all calls.
        refused: told the reason of each refusal.
    """

    def __init__(
        self,
        sessions: Sessions,
        messages: Messages,
        *,
        outgoing: Outgoing,
        refused: Callable[[str], None],
    ) -> None:
        self.cancelled = False
        self._sessions = sessions
        self._messages = messages
        self._outgoing = outgoing
        self._unanswered_bytes = 0
        self._refused = refused
        self._unanswered = 0
        self._ready: deque[Step | pb.StepResponse] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._writer_waits: asyncio.Future[None] | None = None
        self._reader_waits: asyncio.Future[None] | None = None
        self._draining = False
        self._away: dict[str, deque[pb.StepRequest]] = {}
        self._fetches: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves the call until its client has sent all and been answered.

        Raises:
            Draining: the server stops; everything accepted was answered.
        """
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: _wake(self._writer_waits))
        try:
            await self._write(self._reader)
        finally:
            self.cancelled = True
            self._reader.cancel()
            for fetch in self._fetches:
                fetch.cancel()
            # An exception's traceback leads here in a circle: let no reply hang on it.
            self._ready.clear()
            self._outgoing.release(self._unanswered_bytes)
        if self._draining:
            raise Draining
        self._reader.result()

    def drain(self) -> None:
        """Reads no more; `run` ends when everything accepted is answered."""
        self._draining = True
        if self._reader is not None:
            self._reader.cancel()

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self.cancelled:
            self._ready.append(step)
            _wake(self._writer_waits)

    async def _read(self) -> None:
        while await self._read_one():
            while self._unanswered >= MOST_UNANSWERED or self._unanswered_bytes > MOST_BYTES:
                self._reader_waits = asyncio.get_running_loop().create_future()
                await self._reader_waits

    async def _read_one(self) -> bool:
        """Accepts or refuses one request, or lets it wait; False if there are no more."""
        try:
            request = await self._messages.read()
        except StepstateError as error:  # it can't be decoded
            self._refuse("", error)
        else:
            if request is grpc.aio.EOF:
                return False
            session_id = request.session_id
            session = None if session_id in self._away else self._sessions.find(session_id)
            if session is None:
                self._wait(request)
            else:
                self._accept(request, session)
        self._unanswered += 1
        return True

    def _accept(self, request: pb.StepRequest, session: Session) -> None:
        try:
            step = decode_step(request, session, self)
            self._outgoing.reserve(step.reply_bytes)
            try:
                self._sessions.submit(step)
            except StepstateError:
                self._outgoing.release(step.reply_bytes)
                raise
            self._unanswered_bytes += step.reply_bytes
        except StepstateError as error:
            self._refuse(request.session_id, error)

    def _wait(self, request: pb.StepRequest) -> None:
        """Lets a request wait until its session is resident, or known not to exist."""
        session_id = request.session_id
        self._unanswered_bytes += _held_bytes(request)
        if session_id in self._away:
            self._away[session_id].append(request)
            return
        self._away[session_id] = deque((request,))
        fetch = asyncio.create_task(self._fetch(session_id))
        self._fetches.add(fetch)
        fetch.add_done_callback(self._fetches.discard)

    async def _fetch(self, session_id: str) -> None:
        """Makes a session resident, and takes up the requests that waited for it."""
        found: Session | StepstateError
        try:
            found = await self._sessions.get(session_id)
        except StepstateError as error:
            # Its traceback would lead back here, in a circle that keeps the requests.
            found = error.with_traceback(None)
        except Exception:
            found = Internal(secrets.token_hex(8))
            log.exception("a load failed", extra={"error_id": found.error_id})
        for request in self._away.pop(session_id):
            self._unanswered_bytes -= _held_bytes(request)
            if isinstance(found, StepstateError):
                self._refuse(session_id, found)
            else:
                self._accept(request, found)
        _wake(self._reader_waits)

    async def _write(self, reader: asyncio.Task[None]) -> None:
        ready = self._ready
        while True:
            while ready:
                outcome = ready.popleft()
                await self._messages.write(self._encoded(outcome))
                self._answered(outcome)
                _wake(self._reader_waits)
            if reader.done() and not self._unanswered:
                return
            self._writer_waits = asyncio.get_running_loop().create_future()
            await self._writer_waits

    def _answered(self, outcome: Step | pb.StepResponse) -> None:
        self._unanswered -= 1
        if isinstance(outcome, Step):
            self._unanswered_bytes -= outcome.reply_bytes
            self._outgoing.release(outcome.reply_bytes)

    def _encoded(self, outcome: Step | pb.StepResponse) -> pb.StepResponse:
        if isinstance(outcome, pb.StepResponse):
            return outcome
        if outcome.error is not None:
            return self._error(outcome.session.session_id, outcome.error)
        return encode_step(outcome)

    def _refuse(self, session_id: str, error: StepstateError) -> None:
        if not self._sessions.refuse(session_id, error, self):
            self._ready.append(self._error(session_id[:ID_LENGTH], error))
            _wake(self._writer_waits)

    def _error(self, session_id: str, error: StepstateError) -> pb.StepResponse:
        self._refused(error.reason)
        return pb.StepResponse(session_id=session_id, error=status_of(error))


def _held_bytes(request: pb.StepRequest) -> int:
    return 4 * len(request.x)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
