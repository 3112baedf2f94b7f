"""The calls of a client process, in closed loop or at fixed times: streams, or unary calls."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import grpc
import numpy as np

from benchmarks import BenchError
from benchmarks.load import Kind, Sample, Window
from benchmarks.templates import Key, RequestTemplate
from benchmarks.timer import Timer

ENDED = "the server ended a stream"
_WRITE_MET_END = "Internal error from Core"
"""What gRPC sets as the status when a write meets the end of the call."""

Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
Method: TypeAlias = "Callable[[bytes], Awaitable[bytes]]"
Dues: TypeAlias = "Iterator[tuple[float, RequestTemplate]]"


class Record:
    """The messages that count, and their latencies.

    Args:
        window: when they count.
        paced: by when a message was due, not by when its reply came.
    """

    def __init__(self, window: Window, *, paced: bool) -> None:
        self._start, self._finish = window.start, window.finish
        self._paced = paced
        self._since: list[float] = []
        self._latencies: list[float] = []
        self._replies = 0
        self._unanswered = 0

    def answered(self, since: float, now: float) -> None:
        """A message that was sent, or due, at `since` was answered."""
        within = self._start <= now < self._finish
        self._replies += within
        if self._start <= since < self._finish if self._paced else within:
            self._since.append(since)
            self._latencies.append(now - since)

    def unanswered(self, since: Iterable[float], now: float) -> None:
        """Messages that were due at `since` are given up: no reply came in time."""
        for moment in since:
            if self._start <= moment < self._finish:
                self._unanswered += 1
                self._since.append(moment)
                self._latencies.append(now - moment)

    def sample(self) -> Sample:
        """What was recorded."""
        since, latencies = np.array(self._since), np.array(self._latencies)
        return Sample(since, latencies, self._replies, self._unanswered)


class StreamClient:
    """Steps sessions, or groups of them, that share one stream.

    Args:
        kind: of the server.
        call: the stream.
        templates: what is sent on it.
        key_of: whose a reply is.
        in_flight: messages of different templates that are unanswered at once in closed loop.
    """

    def __init__(
        self,
        kind: Kind,
        call: Call,
        templates: Sequence[RequestTemplate],
        *,
        key_of: Callable[[bytes], Key],
        in_flight: int,
    ) -> None:
        self._kind = kind
        self._call = call
        self.templates = templates
        self._by_key = {template.key: template for template in templates}
        self._key_of = key_of
        self._in_flight = in_flight
        self._last: dict[Key, bytes] = {}
        self._dues: Dues = iter(())
        self._all_sent = False

    async def begin(self) -> None:
        """Sends each template's first message and checks the replies."""
        for template in self.templates:
            await self._send(template)
            self._take(await self._call.read())
        self._check()

    async def closed_loop(self, window: Window, record: Record) -> None:
        """Sends a message for each reply until the window has passed."""
        idle = deque(self.templates)
        unanswered = min(self._in_flight, len(idle))
        for _ in range(unanswered):
            await self._send(idle.popleft())
        while unanswered:
            template, since, now = self._take(await self._call.read())
            record.answered(since, now)
            if now < window.finish:
                idle.append(template)
                await self._send(idle.popleft())
            else:
                unanswered -= 1
        await self._call.done_writing()
        self._check()

    async def paced(self, timer: Timer, dues: Dues, record: Record) -> None:
        """Sends messages when they are due, and reads the replies at the same time."""
        self._dues = dues
        writing = asyncio.create_task(self._write(timer))
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                _, since, now = self._take(reply)
                record.answered(since, now)
        except grpc.aio.AioRpcError as error:
            if error.details() == _WRITE_MET_END:
                raise BenchError(ENDED) from error
            raise
        finally:
            writing.cancel()
        if not self._all_sent or any(template.since for template in self.templates):
            raise BenchError(ENDED)
        self._check()

    def give_up(self) -> Iterator[float]:
        """Ends the stream; yields the due times of messages without a reply, sent or not."""
        self._call.cancel()
        for template in self.templates:
            yield from template.since
        for due, _ in self._dues:
            yield due

    async def _write(self, timer: Timer) -> None:
        for due, template in self._dues:
            template.since.append(due)
            await timer.until(due)
            await self._put(template.request())
        self._all_sent = True
        await self._call.done_writing()

    async def _send(self, template: RequestTemplate) -> None:
        message = template.request()
        template.since.append(time.monotonic())
        await self._put(message)

    async def _put(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:
            raise BenchError(ENDED) from error

    def _take(self, reply: object) -> tuple[RequestTemplate, float, float]:
        """The template that a reply belongs to, when its message was sent or due, and now."""
        now = time.monotonic()
        if not isinstance(reply, bytes):
            raise BenchError(ENDED)
        key = self._key_of(reply)
        template = self._by_key[key]
        self._last[key] = reply
        return template, template.since.popleft(), now

    def _check(self) -> None:
        for key, reply in self._last.items():
            self._by_key[key].check(self._kind, reply)


class UnaryClient:
    """Steps one session by one call after the other, so that its steps keep their order.

    A step that is due before the call for the one before it was answered waits for that,
    and the waiting counts.
    """

    def __init__(self, kind: Kind, method: Method, template: RequestTemplate) -> None:
        self.templates = (template,)
        self._kind = kind
        self._method = method
        self._template = template
        self._dues: Dues = iter(())
        self._waiting_since: list[float] = []

    async def begin(self) -> None:
        """Sends the first step and checks the reply."""
        self._template.check(self._kind, await self._method(self._template.request()))

    async def closed_loop(self, window: Window, record: Record) -> None:
        """Makes a call for each reply until the window has passed."""
        now = 0.0
        while now < window.finish:
            message = self._template.request()
            sent = time.monotonic()
            reply = await self._method(message)
            now = time.monotonic()
            record.answered(sent, now)
        self._template.check(self._kind, reply)

    async def paced(self, timer: Timer, dues: Dues, record: Record) -> None:
        """Makes a call when a step is due and the one before it is answered."""
        self._dues = dues
        reply = None
        for due, template in dues:
            self._waiting_since = [due]
            await timer.until(due)
            reply = await self._method(template.request())
            record.answered(due, time.monotonic())
            self._waiting_since = []
        if reply is not None:
            self._template.check(self._kind, reply)

    def give_up(self) -> Iterator[float]:
        """The due times of steps without a reply, sent or not."""
        yield from self._waiting_since
        for due, _ in self._dues:
            yield due
