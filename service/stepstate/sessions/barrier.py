"""Waiting for a session's turn: after the steps that it has accepted, before those to come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from stepstate.errors import StepstateError
from stepstate.sessions.types import Step

T = TypeVar("T")


class SessionBarrier(Generic[T]):
    """A `ReplyTo` that does something with a session when its turn has come.

    Args:
        act: called between two steps of the session.

    Its `mark` stands in the session's line of steps, as the error of a step without rows.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self.cancelled = False
        self.mark = StepstateError()
        self._act = act
        self._done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def deliver(self, step: Step) -> None:
        """See `ReplyTo`."""
        if self._done.cancelled():
            return
        if step.error is not self.mark and step.error is not None:
            self._fail(step.error)
            return
        try:
            self._done.set_result(self._act())
        except Exception as error:  # noqa: BLE001 - it is the waiter's, not the engine's
            self._fail(error)

    def now(self) -> None:
        """Its turn has come without a wait."""
        self._done.set_result(self._act())

    def _fail(self, error: Exception) -> None:
        self._done.set_exception(error)
        self._done.exception()  # its waiter may have given up: no loss

    async def result(self) -> T:
        """What `act` returned.

        Raises:
            StepstateError: the session was lost before its turn.
        """
        try:
            return await self._done
        finally:
            del self  # its error's traceback leads here: no circle
