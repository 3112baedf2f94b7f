"""Many sessions of one client: opened concurrently, stepped over one stream.

Every session is sent the same rows, so all outputs at one t are the same: a session
that came back from the store with a wrong state would show.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks import BenchError
from benchmarks.access import OPEN, Access
from benchmarks.models import INPUTS, NAME
from stepstate.client.convert import from_status
from stepstate.errors import StepstateError
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

AT_ONCE = 64
"""Calls on their way."""
LEFT_BEHIND = timedelta(hours=1)
"""Sessions that an interrupted benchmark leaves in a user's Redis expire after this."""
STEPPED_AT_ONCE = 256
"""Steps on their way: as many as one forward takes."""
SAME = 2e-5
"""Twice the largest change in an output that other rows of a micro-batch may cause."""

_SEED = 3
_Stream: TypeAlias = "grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]"


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What sessions are opened with."""

    durability: str = "unspecified"
    """By the contract's name in small letters."""
    expires_at: float | None = None
    """When they all expire, by `time.monotonic`; None: long after the benchmark."""
    model: str = NAME

    def idle_timeout(self) -> timedelta:
        """For a session that is opened now."""
        if self.expires_at is None:
            return LEFT_BEHIND
        return timedelta(seconds=max(0.001, self.expires_at - time.monotonic()))


def open_request(session_id: str, options: SessionOptions) -> pb.OpenSessionRequest:
    """A request for a session of a benchmark's model, to be sent now."""
    durability = f"DURABILITY_{options.durability.upper()}"
    request = pb.OpenSessionRequest(
        session_id=session_id, model=options.model, durability=durability
    )
    request.idle_timeout.FromTimedelta(options.idle_timeout())
    return request


async def open_sessions(
    target: str, names: Sequence[str], options: SessionOptions, access: Access = OPEN
) -> None:
    """Opens sessions."""

    async def call(stub: StepstateServiceStub, name: str) -> None:
        await stub.OpenSession(open_request(name, options), metadata=access.metadata)

    await _all(target, names, call, access)


async def close_sessions(target: str, names: Sequence[str], access: Access = OPEN) -> None:
    """Closes sessions."""

    async def call(stub: StepstateServiceStub, name: str) -> None:
        request = pb.CloseSessionRequest(session_id=name)
        await stub.CloseSession(request, metadata=access.metadata)

    await _all(target, names, call, access)


async def _all(
    target: str,
    names: Sequence[str],
    call: Callable[[StepstateServiceStub, str], Awaitable[None]],
    access: Access,
) -> None:
    """Makes a call for each session, `AT_ONCE` of them at a time."""
    async with access.channel(target) as channel:
        stub, left = StepstateServiceStub(channel), iter(names)

        async def caller() -> None:
            for name in left:
                await call(stub, name)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))


@dataclass(frozen=True, slots=True)
class Timing:
    """How long something took for each session."""

    seconds: float
    """For all together."""
    latencies: NDArray[np.float64]
    """For each, in seconds, in the order in which they were done."""


class SessionGroup:
    """Sessions that are stepped together, one row each at a time.

    Args:
        count: how many.
        durability: of all of them, by the contract's name in small letters.
    """

    def __init__(self, count: int, durability: str) -> None:
        run_id = uuid.uuid4().hex
        self.names = [f"bench-{run_id}-{number}" for number in range(count)]
        self.t = 0
        """Rows sent to each."""
        self._options = SessionOptions(durability)
        self._random = np.random.default_rng(_SEED)

    def open(self, target: str) -> Timing:
        """Opens them all.

        Raises:
            BenchError: a session can't be opened.
        """
        return _run(self._open(target))

    def step(self, target: str) -> Timing:
        """Sends each the next row, in random order.

        Raises:
            BenchError: a step was refused, or its output is not that of the other sessions.
        """
        x = self._random.standard_normal(INPUTS).tolist()
        order = self._random.permutation(len(self.names))
        requests = [pb.StepRequest(session_id=self.names[k], t=self.t, x=x) for k in order]
        taken = _run(_Pass(requests).run(target))
        self.t += 1
        return taken

    async def _open(self, target: str) -> Timing:
        latencies: list[float] = []

        async def call(stub: StepstateServiceStub, name: str) -> None:
            sent = time.monotonic()
            await stub.OpenSession(open_request(name, self._options))
            latencies.append(time.monotonic() - sent)

        began = time.monotonic()
        await _all(target, self.names, call, OPEN)
        return Timing(time.monotonic() - began, np.array(latencies))


class _Pass:
    """One row for each session."""

    def __init__(self, requests: Sequence[pb.StepRequest]) -> None:
        self._requests = requests
        self._room = asyncio.Semaphore(STEPPED_AT_ONCE)
        self._sent: dict[str, float] = {}
        self._latencies: list[float] = []
        self._y: NDArray[np.float32] | None = None

    async def run(self, target: str) -> Timing:
        async with grpc.aio.insecure_channel(target) as channel:
            stream: _Stream = StepstateServiceStub(channel).StreamSteps()
            began = time.monotonic()
            writing = asyncio.create_task(self._write(stream))
            try:
                async for reply in stream:
                    self._take(reply)
            finally:
                writing.cancel()
            if len(self._latencies) < len(self._requests):
                raise BenchError("the server ended a stream")
            return Timing(time.monotonic() - began, np.array(self._latencies))

    async def _write(self, stream: _Stream) -> None:
        for request in self._requests:
            await self._room.acquire()
            self._sent[request.session_id] = time.monotonic()
            await stream.write(request)
        await stream.done_writing()

    def _take(self, reply: pb.StepResponse) -> None:
        if reply.HasField("error"):
            raise from_status(reply.error)
        self._latencies.append(time.monotonic() - self._sent.pop(reply.session_id))
        self._room.release()
        y = np.array(reply.y, np.float32)
        if self._y is None:
            self._y = y
        if reply.replayed or np.abs(y - self._y).max() > SAME:
            raise BenchError(
                f"{reply.session_id} was answered {y}, others {self._y}: a wrong state"
            )


def _run(work: Coroutine[object, object, Timing]) -> Timing:
    """Runs it on a loop of its own."""
    try:
        return uvloop.run(work)
    except StepstateError as error:
        raise BenchError(f"a step was refused: {error}") from error
    except grpc.aio.AioRpcError as error:
        raise BenchError(f"a call failed: {error.details()}") from error
