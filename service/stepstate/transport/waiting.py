"""Where the outcome of a unary call's step goes."""

from __future__ import annotations

import asyncio

from stepstate.sessions import Step


class WaitingCall:
    """A `ReplyTo` for one unary call."""

    def __init__(self) -> None:
        self.cancelled = False
        self._outcome: asyncio.Future[Step] = asyncio.get_running_loop().create_future()

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if not self._outcome.done():
            self._outcome.set_result(step)

    async def outcome(self) -> Step:
        """The step with its outcome; a caller that gives up marks it cancelled."""
        try:
            return await self._outcome
        except asyncio.CancelledError:
            self.cancelled = True
            raise
