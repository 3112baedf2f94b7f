"""Bidirectional calls whose requests may take the fast path of single rows (see `sessions.rows`).

A request that is what was expected next is recognized by its bytes, and its row goes to its session
at once; every other request is parsed and goes the ordinary way. What is expected, and how a reply
is encoded, is up to the subclasses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Generic

from stepstate.budget import MemoryUse
from stepstate.errors import StepstateError
from stepstate.sessions import ResidentSession, RowReplyTo, SingleRow, Step
from stepstate.transport.bidi import MAX_UNANSWERED, STEP_BYTES, A, Backend, BidiStream, Q, W
from stepstate.transport.interceptor import MessageChannel

TakeRow = Callable[[bytes, RowReplyTo], bool]
"""Hands the row of a request over, if it was expected; False: it has to go the ordinary way."""


class RowStream(BidiStream[Q, A, Step, W], Generic[Q, A, W]):
    """One call: a `RowReplyTo` for its rows. Requests Q, replies A; W: a request that waits.

    Args:
        backend: serves the requests.
        messages: the two directions of the call.
        take: knows what is expected.
        patience_seconds: see `BidiStream`.
    """

    def __init__(
        self,
        backend: Backend,
        messages: MessageChannel,
        take: TakeRow,
        *,
        patience_seconds: float = 0.0,
    ) -> None:
        super().__init__(backend, messages, patience_seconds=patience_seconds)
        self._take_row = take

    @abstractmethod
    def _make_step(self, request: Q, session: ResidentSession) -> Step:
        """The step that a request asks for.

        Raises:
            StepstateError: it is refused.
        """

    @abstractmethod
    def _encode_refusal(self, request: Q, error: StepstateError) -> A:
        """The reply to a request that is refused."""

    @abstractmethod
    def _encode_row(self, row: SingleRow, y: bytes, durable_t: int) -> bytes:
        """The reply to an applied row."""

    def received(self, payload: bytes) -> None:
        """See `MessageSink`: takes a row that was expected, or whatever else it is."""
        fast = not self._paused and self._memory.fits(STEP_BYTES)
        if fast and self._take_row(payload, self):
            self._messages.counts.received += 1
            self._unanswered += 1
            if self._held_bytes or self._unanswered >= MAX_UNANSWERED:
                self._stop_if_full()
        else:
            super().received(payload)

    def deliver_row(self, row: SingleRow, y: bytes, durable_t: int) -> None:
        """See `RowReplyTo`."""
        if self.cancelled:
            return
        if row.held_bytes:
            self._release_row(row)
        self._messages.counts.sent += 1
        try:
            self._send(self._encode_row(row, y, durable_t))
        except Exception as error:  # noqa: BLE001 (the call ends with it)
            self._fail(error)

    def step_of(self, row: SingleRow) -> Step | None:
        """See `RowReplyTo`."""
        self._release_row(row)
        self._messages.counts.received -= 1  # to decode it counts it again
        request = self._messages.decode(row.message)
        try:
            step = self._make_step(request, row.session)
        except StepstateError as error:
            self._reply(self._encode_refusal(request, error))
        except Exception as error:  # noqa: BLE001 (the call ends with it, and nothing else)
            self._fail(error)
        else:
            self._charge(MemoryUse.REPLIES, step.held_bytes)
            return step
        return None

    def hold_row(self, row: SingleRow) -> None:
        """See `RowReplyTo`."""
        row.held_bytes = STEP_BYTES + len(row.message)
        self._charge(MemoryUse.REQUESTS, row.held_bytes)

    def _release_row(self, row: SingleRow) -> None:
        self._release(MemoryUse.REQUESTS, row.held_bytes)
        row.held_bytes = 0
