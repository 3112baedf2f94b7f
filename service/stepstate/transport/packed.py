"""One StreamPacked call: messages with rows of many sessions in, their outcomes out.

Rule 1: rows of one session are applied in the order of the messages, and within a message from
        first to last.
Rule 2: a row whose session has another row of this call in the engine waits for it, and then goes
        with the others that waited: a message takes as many forwards as a session has rows in it.
Rule 3: a row that can't take the fast path (see `sessions.RowBatch`) becomes a `Step` of its own,
        and holds up only its own message.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import StepstateError
from stepstate.sessions import PackedStep, ResidentSession, Source, Step
from stepstate.transport.bidi import Backend, BidiStream, MessageChannel
from stepstate.transport.packed_request import HandleTable, PackedRequest, reply_bytes
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb


class PackedStream(
    BidiStream[pb.StreamPackedRequest, pb.StreamPackedResponse, PackedRequest, "_Row"]
):
    """See `BidiStream` for its arguments."""

    def __init__(self, backend: Backend, messages: MessageChannel) -> None:
        super().__init__(backend, messages)
        models = backend.sessions.catalog
        self._widest = max((model.manifest.output_width for model in models), default=0)
        self._handles = HandleTable.empty()
        self._in_engine = np.zeros(0, np.bool_)  # by handle: a row of it is on the fast path
        self._deferred: list[PackedRequest] = []

    def finish_rows(self, part: _PackedRows, pack: PackedStep) -> None:
        """Takes the outcome of rows of the fast path, and starts those that waited for them."""
        message = part.message
        self._in_engine[message.handles[part.rows]] = False
        message.put_pack(part.rows, pack)
        self.finish(message)
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

    def finish(self, message: PackedRequest) -> None:
        """Answers a message if all its rows have their outcome."""
        if not message.left:
            self._unanswered_rows -= len(message)
            self._hold(-message.batch.x.nbytes)
            self.deliver(message)

    def _take(self, request: pb.StreamPackedRequest) -> None:
        try:
            message = self._accept_message(request)
        except StepstateError as error:
            self._reply(self._error(request.id, error))
            return
        self._unanswered_rows += len(message)
        self._hold(message.batch.x.nbytes)
        if len(message):
            self._start_rows(message)
        else:
            self.finish(message)

    def _accept_message(self, request: pb.StreamPackedRequest) -> PackedRequest:
        """Reads a message and accepts its rows.

        Raises:
            InvalidField, Draining, QueueFull: nothing of it was accepted.
        """
        handles = self._handles.bind(request.bindings)
        message = PackedRequest.read(request, handles)
        message.reply_bytes = reply_bytes(len(message), self._widest)
        self._reserve(message.reply_bytes)
        try:
            self._sessions.accept(len(message), len(message), source=self.source)
        except StepstateError:
            self._release(message.reply_bytes)
            raise
        if len(handles) > len(self._in_engine):
            self._in_engine = np.pad(self._in_engine, (0, len(handles) - len(self._in_engine)))
        self._handles = handles
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
        session = self._sessions.find(row.session_id)
        if session is None:
            self._wait(row.session_id, row, 0)  # its message holds the bytes
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
        self.finish(waiting.message)

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
            self.message.put_step(self.place, step)
            self.stream.finish(self.message)
