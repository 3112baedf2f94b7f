"""One stream of a client process, in closed loop or at fixed times."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import grpc

from stepstate.bench.errors import BenchError
from stepstate.bench.load import Kind, Window
from stepstate.bench.pace import Timer
from stepstate.bench.parts import Key, Part
from stepstate.bench.record import Record

ENDED = "the server ended a stream"

Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
Dues: TypeAlias = "Iterator[tuple[float, Part]]"


class Conversation:
    """Parts that share a stream.

    Args:
        kind: of the server.
        call: the stream.
        parts: what is sent on it.
        key_of: whose a reply is.
        in_flight: messages of different parts that are unanswered at once in closed loop.
    """

    def __init__(
        self,
        kind: Kind,
        call: Call,
        parts: Sequence[Part],
        *,
        key_of: Callable[[bytes], Key],
        in_flight: int,
    ) -> None:
        self._kind = kind
        self._call = call
        self.parts = parts
        self._by_key = {part.key: part for part in parts}
        self._key_of = key_of
        self._in_flight = in_flight
        self._last: dict[Key, bytes] = {}
        self._dues: Dues = iter(())
        self._all_sent = False

    async def begin(self) -> None:
        """Sends each part's first message and checks the replies."""
        for part in self.parts:
            await self._send(part)
            self._take(await self._call.read())
        self._check()

    async def closed_loop(self, window: Window, record: Record) -> None:
        """Sends a message for each reply until the window has passed."""
        idle = deque(self.parts)
        unanswered = min(self._in_flight, len(idle))
        for _ in range(unanswered):
            await self._send(idle.popleft())
        while unanswered:
            part, since, now = self._take(await self._call.read())
            record.answered(since, now)
            if now < window.finish:
                idle.append(part)
                await self._send(idle.popleft())
            else:
                unanswered -= 1
        await self._call.done_writing()
        self._check()

    async def paced(self, timer: Timer, dues: Dues, record: Record) -> None:
        """Sends messages when they are due, and reads replies meanwhile, until all are there."""
        self._dues = dues
        writing = asyncio.create_task(self._write(timer))
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                _, since, now = self._take(reply)
                record.answered(since, now)
        finally:
            writing.cancel()
        if not self._all_sent or any(part.since for part in self.parts):
            raise BenchError(ENDED)
        self._check()

    def give_up(self) -> Iterator[float]:
        """Ends the stream; when each message was due that was not answered, or not even sent."""
        self._call.cancel()
        for part in self.parts:
            yield from part.since
        for due, _ in self._dues:
            yield due

    async def _write(self, timer: Timer) -> None:
        for due, part in self._dues:
            part.since.append(due)
            await timer.until(due)
            await self._put(part.request())
        self._all_sent = True
        await self._call.done_writing()

    async def _send(self, part: Part) -> None:
        message = part.request()
        part.since.append(time.monotonic())
        await self._put(message)

    async def _put(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:
            raise BenchError(ENDED) from error

    def _take(self, reply: object) -> tuple[Part, float, float]:
        """Whose a reply is, since when it was waited for, and the time."""
        now = time.monotonic()
        if not isinstance(reply, bytes):
            raise BenchError(ENDED)
        key = self._key_of(reply)
        part = self._by_key[key]
        self._last[key] = reply
        return part, part.since.popleft(), now

    def _check(self) -> None:
        for key, reply in self._last.items():
            self._by_key[key].check(self._kind, reply)
