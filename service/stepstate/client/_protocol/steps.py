"""One session's step requests: what to send next, and what an answer means. No I/O.

Rule 1: answers come in the order of the requests. After a refusal, the answers to the requests sent
        behind it mean nothing; when the last one has come, it is decided how to go on.
Rule 2: a server that was rolled back is sent what it lacks, each row once and in order, then what
        was not answered, unchanged. The application notices neither.
Rule 3: every answer that makes progress starts the timeout anew.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import numpy as np

from stepstate.client._protocol.replay import AT_ONCE_ROWS, SentRequest
from stepstate.client._protocol.retry import ProgressTimeout, is_retryable
from stepstate.client._protocol.session import BaseSession
from stepstate.client.times import RowsLike
from stepstate.client.types import Floats
from stepstate.errors import (
    InvalidField,
    NotFound,
    StepAhead,
    StepMismatch,
    StepstateError,
    StepTooOld,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import put_floats

S = TypeVar("S", bound=BaseSession)

WINDOW = 16
"""Requests of a session in flight: half of the replies that a server remembers by default."""
MAX_BYTES = 16 * 2**20 - 1024
"""Of rows in a request: a server's limit for a message, less what else is in it."""


class StepProtocol(Generic[S]):
    """The requests of one session, from the application's rows to their answers.

    Args:
        session: its rows are kept when they are sent.
        timeout: seconds to go on without an answer that makes progress.
        window: most requests sent and not yet taken by the application.

    Attributes:
        error: why the session can't go on; nothing is sent any more.
        pause: seconds to wait before `resume` may be called and more is sent.
        undelivered: requests that were answered and not yet taken by the application.
    """

    def __init__(self, session: S, *, timeout: float, window: int = 1) -> None:
        self.session = session
        self.error: StepstateError | None = None
        self.pause = 0.0
        self.undelivered = 0
        self._timeout = ProgressTimeout(timeout)
        self._window = window
        self._end = session.t
        self._items: deque[SentRequest] = deque()  # not answered; the first `_sent` are in flight
        self._sent = 0
        self._first_time = session.t  # from this t on, nothing was sent yet
        self._flight: deque[SentRequest] = deque()  # requests without an answer, also replayed ones
        self._replayed: int | None = None  # the server has the rows before it; None: it has all
        self._replay = 0  # during a replay: the next row to send
        self._refusal: tuple[StepstateError, SentRequest] | None = None
        self._last: StepstateError | None = None  # the error after all items are answered
        self._stalled = False  # rolled back, and no progress since

    def __len__(self) -> int:
        """Requests of the application that are not answered."""
        return len(self._items)

    @property
    def sendable(self) -> bool:
        """Whether there is something to send now."""
        if self.pause or self._refusal is not None or self.error is not None:
            return False
        if len(self._flight) + self.undelivered >= self._window:
            return False
        if self._replaying:
            return sum(sent.count for sent in self._flight) < AT_ONCE_ROWS
        return self._sent < len(self._items)

    @property
    def left(self) -> float:
        """Seconds that the next request may take."""
        return self._timeout.left

    @property
    def ending(self) -> bool:
        """Whether it takes no more requests."""
        return self._last is not None or self.error is not None

    @property
    def _replaying(self) -> bool:
        return self._replayed is not None and self._replay < self._items[0].t

    def place(self, x: RowsLike) -> Floats:
        """The application's next rows [T, D], to be added.

        Raises:
            InvalidField: x has another shape, or times that are not those of the next rows.
        """
        return self.session.place(x, self._end).rows

    def add(self, rows: Floats, *, inspect: bool = False, last_only: bool = False) -> int:
        """Takes rows [T, D] from the application; returns their size in bytes.

        Raises:
            InvalidField: they are too large for a message.
        """
        data = np.ascontiguousarray(rows, "<f4").tobytes()
        if len(data) > MAX_BYTES:
            raise InvalidField(
                "x",
                f"holds {len(rows)} rows of {len(data) // len(rows)} bytes, a request takes at "
                f"most {MAX_BYTES} bytes: send several",
            )
        self._items.append(SentRequest(self._end, len(rows), data, inspect, last_only))
        self._end += len(rows)
        return len(data)

    def repeat(self, t: int) -> None:
        """Takes the application's last request once more, for a server that is at t.

        The answer to it says that the server has all rows of the application.

        Raises:
            RowsMissing: the rows for it are not kept.
        """
        buffer, end = self.session.replay_buffer, self.session.t
        buffer.check(t, end - 1)
        self._items.append(buffer.last(t, end))

    def end(self, error: StepstateError) -> None:
        """Takes no more: after the answers to what was taken, this is the error."""
        self._last = error
        if not self._items:
            self.error = error

    def drop(self) -> int:
        """Drops what is not answered, after an error; returns its size in bytes."""
        size = sum(len(sent.data) for sent in self._items)
        self._items.clear()
        return size

    def next_request(self) -> pb.StepRequest:
        """The message to send now; call it if `sendable`."""
        return step_request(self.session.session_id, self.next())

    def next(self) -> SentRequest:
        """The rows to send now; call it if `sendable`."""
        if self._replaying:
            sent = self.session.replay_buffer.again(self._replay, self._items[0].t)
            self._replay = sent.end
        else:
            sent = self._items[self._sent]
            self._sent += 1
            if sent.t >= self._first_time:
                self.session.replay_buffer.put(sent)
                self._first_time = sent.end
        self._flight.append(sent)
        return sent

    def answered(self, durable_t: int) -> SentRequest | None:
        """Takes an answer; returns the application's request, if it is the answer to one."""
        sent = self._flight.popleft()
        if self._refusal is not None:
            self._decide_if_last()
            return None
        self.session.mark_durable(durable_t)
        self._timeout.progress()
        self._stalled = False
        if sent.t < self._items[0].t:
            has = max(sent.end, durable_t)  # what is durable is no longer kept
            self._replayed = has if has < self._items[0].t else None
            self._replay = max(self._replay, has)
            return None
        self._replayed = None
        self._items.popleft()
        self._sent -= 1
        if self._last is not None and not self._items:
            self.error = self._last
        return sent

    def refused(self, error: StepstateError) -> None:
        """Takes a refusal; then `error` or `pause` may be set."""
        sent = self._flight.popleft()
        if self._refusal is None:
            self._refusal = error, sent
        self._decide_if_last()

    def lost(self) -> None:
        """The connection broke: what was in flight is to be sent again."""
        self._flight.clear()
        self._refusal = None
        self._sent = 0
        if self._replayed is not None:
            self._replay = max(self._replayed, self.session.durable_t)

    def broken(self, error: StepstateError) -> None:
        """The connection broke, and with it all that was in flight was refused."""
        while self._flight:
            self.refused(error)

    def resume(self) -> None:
        """The pause is over."""
        self.pause = 0.0

    def rest(self) -> float:
        """After a refusal of all that was sent: seconds to wait before the next try.

        Raises:
            StepstateError: there is no next try.
        """
        if self.error is not None:
            raise self.error
        pause, self.pause = self.pause, 0.0
        return pause

    def _decide_if_last(self) -> None:
        if self._flight or self._refusal is None:
            return
        error, sent = self._refusal
        self.lost()
        try:
            self._decide(error, sent)
        except StepstateError as final:
            self.error = final
            self.session.closed |= isinstance(final, NotFound)

    def _decide(self, error: StepstateError, sent: SentRequest) -> None:
        """Decides how to go on after a refusal; raises the error that ends the requests."""
        if isinstance(error, StepAhead):
            if self._stalled:
                self.pause = self._timeout.wait(error)
            self._stalled = True
            self._replay_from(error.expected_t)
        elif isinstance(error, StepMismatch | StepTooOld) and self._has_more(error, sent):
            self._replay_from(error.expected_t)
        elif is_retryable(error):
            self.pause = self._timeout.wait(error)
        else:
            raise error

    def _has_more(self, error: StepMismatch | StepTooOld, sent: SentRequest) -> bool:
        """Whether replayed rows had reached the server before, in other requests."""
        return sent.t < self._items[0].t and error.expected_t > sent.t

    def _replay_from(self, t: int) -> None:
        until = self._items[0].t
        self.session.replay_buffer.check(t, until - 1)
        self._replayed = t if t < until else None
        self._replay = t


def step_request(session_id: str, sent: SentRequest) -> pb.StepRequest:
    """The message that applies rows."""
    request = pb.StepRequest(
        session_id=session_id, t=sent.t, inspect=sent.inspect, last_only=sent.last_only
    )
    put_floats(request, pb.StepRequest.X_FIELD_NUMBER, sent.data)
    return request
