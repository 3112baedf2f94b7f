"""One StreamPacked call: messages with rows of many sessions in, their outcomes out.

Rule 1: rows of one session are applied in the order of the messages, and within a message from
        first to last.
Rule 2: a row whose session has another row of this call in the engine waits for it, and then goes
        with the others that waited: a message takes as many forwards as a session has rows in it.
Rule 3: a row that can't take the fast path (see `sessions.RowBatch`) becomes a `Step` of its own,
        and holds up only its own message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stepstate.budget import MemoryUse
from stepstate.errors import MemoryLimit, StepstateError
from stepstate.sessions import PackedStep, ResidentSession, Source, Step
from stepstate.transport.bidi import STEP_BYTES, Backend, BidiStream
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.interceptor import SENT, MessageChannel
from stepstate.transport.packed_request import (
    HandleMeaning,
    HandleTable,
    PackedRequest,
    reply_bytes,
)
from stepstate.transport.shares import PACKED_ROW_COST
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb

PART_ROWS = 256
"""Rows that go to the engine together, where they are not taken apart: as --batch-rows by default,
so that the 4,096 rows of a message do not hold up the rows of others for 16 forwards."""
ROW_ERROR_BYTES = 2048
"""Of the error of a row, and of its status in the reply."""


class PackedStream(
    BidiStream[pb.StreamPackedRequest, pb.StreamPackedResponse, PackedRequest, "_Row"]
):
    """See `BidiStream` for its arguments."""

    def __init__(self, backend: Backend, messages: MessageChannel) -> None:
        super().__init__(backend, messages)
        models = backend.sessions.catalog
        self._widest = max((model.manifest.output_width for model in models), default=0)
        self._handles = HandleTable()
        self._in_engine = np.zeros(0, np.bool_)  # by handle: a row of it is on the fast path
        self._deferred: list[PackedRequest] = []

    def finish_rows(self, part: _PackedRows, pack: PackedStep) -> None:
        """Takes the outcome of rows of the fast path, and starts those that waited for them."""
        message = part.message
        self._in_engine[message.handles[part.rows]] = False
        message.put_pack(part.rows, pack)
        self._finish(message, len(pack.errors))
        if self._deferred:
            deferred, self._deferred = self._deferred, []
            for message in deferred:
                self._sessions.undefer(self, message.batch.handles[message.rest])
            for message in deferred:
                self._start_rows(message)

    def flush(self, handle: int) -> None:
        """See `DeferredRows`."""
        for message in self._deferred:
            mine = message.batch.handles[message.rest] == handle
            rows, message.rest = message.rest[mine], message.rest[~mine]
            for row in rows.tolist():
                self._start_row(_Row(self, message, row))

    def finish_row(self, row: _Row, step: Step) -> None:
        """Takes the outcome of a row that was a step of its own."""
        row.message.put_step(row.place, step)
        self._finish(row.message, step.error is not None)

    def _finish(self, message: PackedRequest, errors: int = 0) -> None:
        """Answers a message if all its rows have their outcome; so many more have an error now."""
        if errors:
            self._grow(message, errors * ROW_ERROR_BYTES)
        if not message.left:
            self._unanswered_rows -= len(message)
            self.deliver(message)

    def _grow(self, message: PackedRequest, size: int) -> None:
        """Counts bytes that a message takes in addition."""
        self._charge(MemoryUse.REPLIES, size)
        message.held_bytes += size

    def _take(self, request: pb.StreamPackedRequest) -> None:
        try:
            before = self._bind(request.bindings)
        except StepstateError as error:  # MemoryLimit too: bindings stay, so waiting may not help
            self._reply(self._error(request.id, error))
            return
        try:
            message = self._accept_message(request)
        except StepstateError as error:
            self._unbind(before)
            if isinstance(error, MemoryLimit):
                raise
            self._reply(self._error(request.id, error))
            return
        self._unanswered_rows += len(message)
        self._shares.charge(self._peer, PACKED_ROW_COST * len(message))
        if len(message):
            self._start_rows(message)
        else:
            self._finish(message)

    def _bind(self, bindings: Sequence[pb.Binding]) -> HandleMeaning | None:
        """Adds bindings; returns what their handles meant before.

        Raises:
            InvalidField, MemoryLimit: nothing was changed.
        """
        if not bindings:
            return None
        handles, memory = self._handles, self._memory
        memory.reserve(MemoryUse.BINDINGS, handles.growth(bindings))
        before = handles.bind(bindings)
        memory.resize(MemoryUse.BINDINGS, handles.nbytes)
        more = len(handles) - len(self._in_engine)
        self._in_engine = np.pad(self._in_engine, (0, more))
        return before

    def _unbind(self, before: HandleMeaning | None) -> None:
        if before is not None:
            self._handles.put_back(before)
            self._memory.resize(MemoryUse.BINDINGS, self._handles.nbytes)

    def _accept_message(self, request: pb.StreamPackedRequest) -> PackedRequest:
        """Reads a message and accepts its rows.

        Raises:
            InvalidField, Draining, QueueFull, MemoryLimit: nothing of it was accepted.
        """
        message = PackedRequest.read(request, self._handles)
        message.held_bytes += SENT * min(reply_bytes(len(message), self._widest), REPLY_BYTES)
        self._reserve(MemoryUse.REPLIES, message.held_bytes)
        try:
            self._sessions.accept(len(message), len(message), source=self.source)
        except StepstateError:
            self._release(MemoryUse.REPLIES, message.held_bytes)
            raise
        return message

    def _start_rows(self, message: PackedRequest) -> None:
        """Starts every row that does not have to wait; the others are started later."""
        rest, batch = message.rest, message.batch
        if self.cancelled:
            self._settle(len(rest))
            return
        waits = self._in_engine[message.handles[rest]]
        if waits.any():  # those with an invalid reference wait in the queue of their session
            waits &= self._sessions.valid_refs(batch.handles[rest], batch.generations[rest])
        rows, waiting = rest[~waits], rest[waits]
        others = rows[~self._submit_rows(message, rows)] if len(rows) else rows
        again = self._in_engine[message.handles[others]]  # behind a row that was just submitted
        message.rest = np.sort(np.concatenate((waiting, others[again])))
        for row in others[~again].tolist():
            self._start_row(_Row(self, message, row))
        if len(message.rest):
            self._deferred.append(message)
            self._sessions.defer(self, batch.handles[message.rest])

    def _submit_rows(self, message: PackedRequest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Submits the rows [N] that can take the fast path; returns which these are."""
        submitted = np.zeros(len(rows), np.bool_)
        for first in range(0, len(rows), PART_ROWS):
            part = slice(first, first + PART_ROWS)
            submitted[part] = self._submit_part(message, rows[part])
        return submitted

    def _submit_part(self, message: PackedRequest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`_submit_rows` for rows that may share a forward."""
        batch = message.batch if len(rows) == len(message) else message.batch.some(rows)
        model = message.model or self._sessions.packed_model(batch)
        if model is None or not message.fits(model):
            return np.zeros(len(rows), np.bool_)
        part = _PackedRows(self, message)
        submitted = self._sessions.submit_packed(batch, model, part)
        part.rows = rows[submitted]
        self._in_engine[message.handles[part.rows]] = True
        return submitted

    def _start_row(self, row: _Row) -> None:
        """Submits a row as a step, or queues it for its session."""
        key = self._principal.key(row.session_id)
        session = self._sessions.find(key)
        if session is None:
            self._grow(row.message, STEP_BYTES)
            self._wait(key, row, 0)
            return
        try:
            self._accept(row, session)
        except StepstateError as error:
            self._refuse(row, error)

    def _accept(self, waiting: _Row, session: ResidentSession) -> None:
        ref = self._sessions.ref_of(session)
        self._handles.put_ref(waiting.handle, waiting.session_id, ref)
        step = waiting.message.step(waiting.place, session, waiting)
        self._sessions.submit_accepted(step)

    def _refuse(self, waiting: _Row, error: StepstateError) -> None:
        waiting.message.put_error(waiting.place, error)
        self._settle(1)
        self._finish(waiting.message, errors=1)

    def _drop_waiting(self) -> int:
        dropped = super()._drop_waiting()
        self._settle(dropped)
        return dropped

    def _settle(self, rows: int) -> None:
        """Accepted rows are not submitted after all."""
        self._sessions.settled(rows, rows, source=self.source)

    def _encode_failure(self, error: StepstateError) -> pb.StreamPackedResponse:
        return self._error(0, error)

    def _error(self, request_id: int, error: StepstateError) -> pb.StreamPackedResponse:
        self._count_refusal(error)
        return pb.StreamPackedResponse(id=request_id, error=status_of(error))

    def _encode(self, outcome: PackedRequest) -> pb.StreamPackedResponse:
        for error in outcome.errors.values():
            self._count_refusal(error)
        return outcome.response()


@dataclass(slots=True, eq=False)
class _PackedRows:
    """Rows of a message on the fast path; a `PackedReplyTo`."""

    stream: PackedStream
    message: PackedRequest
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def cancelled(self) -> bool:
        """See `PackedReplyTo`."""
        return self.stream.cancelled

    @property
    def source(self) -> Source:
        """See `PackedReplyTo`."""
        return self.stream.source

    def deliver_pack(self, pack: PackedStep) -> None:
        """See `PackedReplyTo`."""
        self.stream.finish_rows(self, pack)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One row of a message as a step of its own; a `ReplyTo`."""

    stream: PackedStream
    message: PackedRequest
    place: int

    @property
    def handle(self) -> int:
        """The stream's handle of its session."""
        return int(self.message.handles[self.place])

    @property
    def session_id(self) -> str:
        """Its session's."""
        return self.message.session_id(self.place)

    @property
    def cancelled(self) -> bool:
        """See `ReplyTo`."""
        return self.stream.cancelled

    @property
    def source(self) -> Source:
        """See `ReplyTo`."""
        return self.stream.source

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self.stream.cancelled:
            self.stream.finish_row(self, step)
