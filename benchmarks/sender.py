"""A client process: sends a load to a server, and measures the latency of replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from multiprocessing.connection import Connection
from typing import TypeAlias

import grpc
import uvloop

from benchmarks import BenchError, echo
from benchmarks.access import Metadata
from benchmarks.calls import Dues, Method, Record, StreamClient, UnaryClient
from benchmarks.load import (
    Answer,
    ArrivalSchedule,
    CallPath,
    CloseSessions,
    Failed,
    Kind,
    Load,
    OpenSessions,
    Question,
    Ready,
    Sample,
    Window,
)
from benchmarks.sessions import close_sessions, open_sessions
from benchmarks.templates import (
    PackedTemplate,
    RequestTemplate,
    StepTemplate,
    packed_key,
    session_key,
)
from benchmarks.timer import Timer
from stepstate.v1 import stepstate_pb2 as pb

MAX_STREAMS = 1_000
"""Of a process: with more sessions, several share a stream, as in a large gateway."""
GRACE_SECONDS = 10.0
"""How long after the window the replies to messages within it are awaited."""

_OWN = (("grpc.use_local_subchannel_pool", 1),)
"""Else two channels to one server share a connection."""

_SERVICE = pb.DESCRIPTOR.services_by_name["StepstateService"].full_name
_METHODS = {
    (Kind.STEP, CallPath.STREAM): f"/{_SERVICE}/StreamSteps",
    (Kind.STEP, CallPath.UNARY): f"/{_SERVICE}/Step",
    (Kind.STEP, CallPath.PACKED): f"/{_SERVICE}/StreamPacked",
    (Kind.ECHO, CallPath.STREAM): echo.STREAM,
    (Kind.ECHO, CallPath.UNARY): echo.UNARY,
    (Kind.ECHO, CallPath.PACKED): echo.STREAM,
}
_Method: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"
SteppingClient: TypeAlias = "StreamClient | UnaryClient"


def run_client(parent: Connection[Answer, Question]) -> None:
    """Answers each question until the parent is gone, or the first failure.

    A `Load` is answered with `Ready`, then its `Window` with `Sample`: between the two it
    waits, after them it sends until the window has passed.
    """
    try:
        while True:
            question = parent.recv()
            parent.send(uvloop.run(_answer(question, parent)))
    except EOFError:
        return
    except grpc.aio.AioRpcError as error:
        parent.send(Failed(f"a call failed: {error.details()}"))
    except Exception as error:  # noqa: BLE001 - the parent reports it
        parent.send(Failed(f"{type(error).__name__}: {error}"))


async def _answer(question: Question, parent: Connection[Answer, Question]) -> Answer:
    if isinstance(question, OpenSessions):
        await open_sessions(question.target, question.names, question.options)
        return Ready()
    if isinstance(question, CloseSessions):
        await close_sessions(question.target, question.names)
        return Ready()
    assert isinstance(question, Load)
    return await _run(question, parent)


async def _run(load: Load, parent: Connection[Answer, Question]) -> Sample:
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(load.access.channel(load.target, _OWN))
            for _ in range(load.connections)
        ]
        templates = _packed(load) if load.path is CallPath.PACKED else _single(load)
        clients = list(_clients(load, channels, templates))
        await asyncio.gather(*(client.begin() for client in clients))
        parent.send(Ready())
        window = await asyncio.to_thread(parent.recv)
        assert isinstance(window, Window)
        with Timer() as timer:
            return await _Sending(clients, window, load.schedule, timer).run()


def _single(load: Load) -> list[RequestTemplate]:
    return [StepTemplate(name, x) for name, x in zip(load.names, load.x, strict=True)]


def _packed(load: Load) -> list[RequestTemplate]:
    """Groups of sessions; some that are left over stay idle."""
    return [
        PackedTemplate(
            number, first, load.names[first : first + load.rows], load.x[first:][: load.rows]
        )
        for number, first in enumerate(range(0, len(load.names) - load.rows + 1, load.rows))
    ]


def _clients(
    load: Load, channels: Sequence[grpc.aio.Channel], templates: Sequence[RequestTemplate]
) -> Iterator[SteppingClient]:
    """The calls of a process: a stream each, or for unary calls a session each."""
    kind, method = load.kind, _METHODS[load.kind, load.path]
    in_turn, metadata = cycle(channels), load.access.metadata
    if load.path is CallPath.UNARY:
        unary: list[Method] = [_asking(channel, method, metadata) for channel in channels]
        for ask, template in zip(cycle(unary), templates, strict=False):
            yield UnaryClient(kind, ask, template)
        return
    streams: Iterator[_Method] = (channel.stream_stream(method) for channel in in_turn)
    if load.path is CallPath.PACKED:
        key_of = partial(packed_key, kind)
        in_flight = load.in_flight
        call = next(streams)(metadata=metadata)
        yield StreamClient(kind, call, templates, key_of=key_of, in_flight=in_flight)
        return
    count = min(len(templates), MAX_STREAMS)
    for place, stream in zip(range(count), streams, strict=False):
        share = templates[place::count]
        call = stream(metadata=metadata)
        yield StreamClient(kind, call, share, key_of=session_key, in_flight=len(share))


def _asking(channel: grpc.aio.Channel, method: str, metadata: Metadata) -> Method:
    rpc: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    return lambda request: rpc(request, metadata=metadata)


@dataclass(frozen=True, slots=True)
class _Sending:
    clients: Sequence[SteppingClient]
    window: Window
    schedule: ArrivalSchedule | None
    timer: Timer

    async def run(self) -> Sample:
        record = Record(self.window, paced=self.schedule is not None)
        patience = self.window.finish + GRACE_SECONDS - time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await self.timer.until(self.window.begin)
                await asyncio.gather(*self._all(record))
        except TimeoutError:
            self._give_up(record)
        return record.sample()

    def _all(self, record: Record) -> Iterator[Coroutine[object, object, None]]:
        for place, client in enumerate(self.clients):
            if self.schedule is None:
                yield client.closed_loop(self.window, record)
            else:
                yield client.paced(
                    self.timer, self._dues(self.schedule, place, client.templates), record
                )

    def _dues(
        self, schedule: ArrivalSchedule, place: int, templates: Sequence[RequestTemplate]
    ) -> Dues:
        """When a client's messages are due: the clients, and each one's templates, take turns."""
        begin = self.window.begin + schedule.phase + place * schedule.interval
        stride = schedule.interval * len(self.clients)
        for number in count():
            due = begin + number * stride
            if due >= self.window.finish:
                return
            yield due, templates[number % len(templates)]

    def _give_up(self, record: Record) -> None:
        if self.schedule is None:
            raise BenchError(f"a reply took more than {GRACE_SECONDS:g} s: the server hangs")
        now = time.monotonic()
        for client in self.clients:
            record.unanswered(client.give_up(), now)
