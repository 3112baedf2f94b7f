"""One StreamPacked call: messages with rows of many sessions in, their outcomes out.

Rule 1: rows of one session are applied in the order of the messages, and in a message from the
        first to the last.
Rule 2: a row whose session has another one of this call in the engine waits for it, and then goes
        with the others that waited: a message takes as many forwards as a session has rows in it.
Rule 3: a row that can't go straight (see `sessions.packed`) goes alone, and holds up its own
        message only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import StepstateError
from stepstate.sessions import PackedStep, ResidentSession, SessionService, Step
from stepstate.transport.bidi import BidiStream, MessageChannel
from stepstate.transport.handles import HandleTable
from stepstate.transport.packed_request import PackedRequest, reply_bytes
from stepstate.transport.pending_loads import PendingLoads
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb

MAX_ROWS = 16_384
"""Accepted and not answered: 64 of the largest forwards. Beyond them the call is not read."""


class PackedStream(BidiStream[pb.StreamPackedRequest, pb.StreamPackedResponse, PackedRequest]):
    """See `BidiStream` for its arguments."""

    def __init__(
        self,
        sessions: SessionService,
        messages: MessageChannel,
        *,
        outgoing: ReplyBudget,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(sessions, messages, outgoing=outgoing, refused=refused)
        self._widest = max((model.manifest.output_width for model in sessions.catalog), default=0)
        self._bindings = HandleTable.none()
        self._under_way = np.zeros(0, np.bool_)  # by handle: a row of it went straight
        self._waiting: list[PackedRequest] = []
        self._rows = 0
        self._fetches: PendingLoads[_Row] = PendingLoads(
            sessions, found=self._go_alone, failed=self._refuse
        )

    async def run(self) -> None:
        """See `BidiStream.run`."""
        try:
            await super().run()
        finally:
            self._settle(self._fetches.drop())

    def packed(self, part: _PackedRows, pack: PackedStep) -> None:
        """Takes the outcome of rows that went straight, and begins those that waited for them."""
        self._under_way[part.message.handles[part.rows]] = False
        part.message.put_pack(part.rows, pack)
        self.ended(part.message)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                self._sessions.undefer(self, message.columns.handles[message.rest])
            for message in waiting:
                self._begin(message)

    def flush(self, handle: int) -> None:
        """See `DeferredRows`."""
        for message in self._waiting:
            mine = message.columns.handles[message.rest] == handle
            rows, message.rest = message.rest[mine], message.rest[~mine]
            for row in rows.tolist():
                self._go(_Row(self, message, row))

    def ended(self, message: PackedRequest) -> None:
        """Rows of a message have their outcome."""
        if not message.left:
            self._rows -= len(message)
            self._hold(-message.columns.x.nbytes)
            self.deliver(message)

    @property
    def _full(self) -> bool:
        return self._rows >= MAX_ROWS or super()._full

    def _take(self, request: pb.StreamPackedRequest) -> None:
        try:
            message = self._accepted(request)
        except StepstateError as error:
            self._reply(self._error(request.id, error))
            return
        self._rows += len(message)
        self._hold(message.columns.x.nbytes)
        if len(message):
            self._begin(message)
        else:
            self.ended(message)

    def _accepted(self, request: pb.StreamPackedRequest) -> PackedRequest:
        """Reads a message and accepts its rows.

        Raises:
            InvalidField, Draining, QueueFull: nothing of it was accepted.
        """
        bindings = self._bindings.with_(request.bindings)
        message = PackedRequest.read(request, bindings)
        self._reserve(self._size(message))
        try:
            self._sessions.accept(len(message), len(message))
        except StepstateError:
            self._release(self._size(message))
            raise
        if len(bindings) > len(self._under_way):
            more = len(bindings) - len(self._under_way)
            self._under_way = np.pad(self._under_way, (0, more))
        self._bindings = bindings
        return message

    def _begin(self, message: PackedRequest) -> None:
        """Begins every row that does not have to wait; the others are begun later."""
        rest = message.rest
        if self.cancelled:
            self._settle(len(rest))
            return
        waits = self._under_way[message.handles[rest]]
        if waits.any():  # those whose seat does not hold any more wait in their sessions' lines
            columns = message.columns
            waits &= self._sessions.valid_refs(columns.handles[rest], columns.generations[rest])
        rows, waiting = rest[~waits], rest[waits]
        others = rows[~self._go_straight(message, rows)] if len(rows) else rows
        again = self._under_way[message.handles[others]]  # rows after those that just went
        message.rest = np.sort(np.concatenate((waiting, others[again])))
        for row in others[~again].tolist():
            self._go(_Row(self, message, row))
        if len(message.rest):
            self._waiting.append(message)
            self._sessions.defer(self, message.columns.handles[message.rest])

    def _go_straight(self, message: PackedRequest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Sends what can go straight, together, and tells which rows these were."""
        columns = message.columns if len(rows) == len(message) else message.columns.some(rows)
        model = message.model or self._sessions.packed_model(columns)
        if model is None or not message.fits(model):
            return np.zeros(len(rows), np.bool_)
        part = _PackedRows(self, message)
        went = self._sessions.submit_packed(columns, model, part)
        part.rows = rows[went]
        self._under_way[message.handles[part.rows]] = True
        return went

    def _go(self, row: _Row) -> None:
        session = self._sessions.find(row.session_id)
        if session is None:
            self._fetches.wait(row.session_id, row)
        else:
            self._go_alone(row, session)

    def _go_alone(self, row: _Row, session: ResidentSession) -> None:
        self._bindings.seat(row.handle, row.session_id, self._sessions.ref_of(session))
        try:
            step = row.message.step(row.place, session, row)
        except StepstateError as error:
            self._refuse(row, error)
        else:
            self._sessions.submit_accepted(step)

    def _refuse(self, row: _Row, error: StepstateError) -> None:
        row.message.put_error(row.place, error)
        self._settle(1)
        self.ended(row.message)

    def _settle(self, rows: int) -> None:
        """Accepted rows never come to a lane."""
        self._sessions.settled(rows, rows)

    def _unreadable(self, error: StepstateError) -> pb.StreamPackedResponse:
        return self._error(0, error)

    def _error(self, request_id: int, error: StepstateError) -> pb.StreamPackedResponse:
        self._refused(error.reason)
        return pb.StreamPackedResponse(id=request_id, error=status_of(error))

    def _encoded(self, outcome: PackedRequest) -> pb.StreamPackedResponse:
        for error in outcome.errors.values():
            self._refused(error.reason)
        return outcome.response()

    def _size(self, outcome: PackedRequest) -> int:
        return reply_bytes(len(outcome), self._widest)


@dataclass(slots=True, eq=False)
class _PackedRows:
    """Rows of a message on their straight way; a `PackedReplyTo`."""

    stream: PackedStream
    message: PackedRequest
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def cancelled(self) -> bool:
        """See `PackedReplyTo`."""
        return self.stream.cancelled

    def deliver_pack(self, pack: PackedStep) -> None:
        """See `PackedReplyTo`."""
        self.stream.packed(self, pack)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One row of a message on its way alone; a `ReplyTo`."""

    stream: PackedStream
    message: PackedRequest
    place: int

    @property
    def handle(self) -> int:
        """What the stream calls its session."""
        return int(self.message.handles[self.place])

    @property
    def session_id(self) -> str:
        """Its session's."""
        return self.message.session_id(self.place)

    @property
    def cancelled(self) -> bool:
        """See `ReplyTo`."""
        return self.stream.cancelled

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self.stream.cancelled:
            self.message.put_step(self.place, step)
            self.stream.ended(self.message)
