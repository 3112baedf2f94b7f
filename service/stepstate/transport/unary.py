"""Where the outcome of a unary call's step goes, and how the step comes about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stepstate.errors import StepstateError
from stepstate.sessions import Hold, ReplyTo, ResidentSession, SessionService, Step
from stepstate.transport.reply_budget import ReplyBudget


class UnaryReply:
    """A `ReplyTo` for one unary call."""

    def __init__(self) -> None:
        self.cancelled = False
        self.reserved_bytes = 0
        """Of its reply."""
        self._outcome: asyncio.Future[Step] = asyncio.get_running_loop().create_future()

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self._outcome.done():
            self._outcome.set_result(step)

    async def outcome(self) -> Step:
        """The step with its outcome."""
        return await self._outcome


async def apply_step(
    sessions: SessionService,
    outgoing: ReplyBudget,
    session_id: str,
    make: Callable[[ResidentSession, ReplyTo], Step],
    *,
    patience_seconds: float = 0.0,
    hold: Hold | None = None,
) -> Step:
    """Applies the step of a unary call in its session's turn; returns it with its outcome.

    Args:
        sessions: the table.
        outgoing: the bytes of replies that are on their way.
        session_id: of the session.
        make: makes the step of the session.
        patience_seconds: see `SessionService.in_turn`.
        hold: see `SessionService.in_turn`.

    Raises:
        StepstateError: it was not accepted.
    """
    call = UnaryReply()

    def accept(session: ResidentSession) -> None:
        step = make(session, call)
        outgoing.reserve(step.reply_bytes)
        try:
            sessions.submit(step)
        except StepstateError:
            outgoing.release(step.reply_bytes)
            raise
        call.reserved_bytes = step.reply_bytes

    try:
        await sessions.in_turn(session_id, accept, patience_seconds=patience_seconds, hold=hold)
        return await call.outcome()
    except asyncio.CancelledError:
        call.cancelled = True
        raise
    finally:
        outgoing.release(call.reserved_bytes)
