"""The unary calls of one session, in closed loop or at fixed times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeAlias

import grpc

from stepstate.bench.load import Kind, Window
from stepstate.bench.pace import Timer
from stepstate.bench.parts import Part
from stepstate.bench.record import Record
from stepstate.bench.streams import Dues

Method: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


class UnaryCalls:
    """One call after the other: a session's steps keep their order.

    A step that is due before the call for the one before it was answered waits for that,
    and the waiting counts.
    """

    def __init__(self, kind: Kind, method: Method, part: Part) -> None:
        self.parts = (part,)
        self._kind = kind
        self._method = method
        self._part = part
        self._dues: Dues = iter(())
        self._waiting_since: list[float] = []

    async def begin(self) -> None:
        """Sends the first step and checks the reply."""
        self._part.check(self._kind, await self._method(self._part.request()))

    async def closed_loop(self, window: Window, record: Record) -> None:
        """Makes a call for each reply until the window has passed."""
        now = 0.0
        while now < window.finish:
            message = self._part.request()
            sent = time.monotonic()
            reply = await self._method(message)
            now = time.monotonic()
            record.answered(sent, now)
        self._part.check(self._kind, reply)

    async def paced(self, timer: Timer, dues: Dues, record: Record) -> None:
        """Makes a call when a step is due and the one before it is answered."""
        self._dues = dues
        reply = None
        for due, part in dues:
            self._waiting_since = [due]
            await timer.until(due)
            reply = await self._method(part.request())
            record.answered(due, time.monotonic())
            self._waiting_since = []
        if reply is not None:
            self._part.check(self._kind, reply)

    def give_up(self) -> Iterator[float]:
        """When each step was due that was not answered, or not even sent."""
        yield from self._waiting_since
        for due, _ in self._dues:
            yield due
