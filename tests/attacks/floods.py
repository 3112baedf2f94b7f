"""What a tenant can flood a server with: as much as one process sends, whatever it is answered.

Each flood has some connections, and on each of them many tasks that ask as soon as they are
answered, refused or not: no flood looks at RetryInfo.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from itertools import count

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.honest import INPUTS, MODEL, Metadata
from tests.integration.wire import raw_stub

CONNECTIONS = 4
ROW = np.zeros(INPUTS, np.float32)
_names = count()


class Flooder:
    """One connection of the tenant that floods.

    Args:
        stub: of it.
        metadata: with its credential.
        seconds: how long it floods.
    """

    def __init__(self, stub: StepstateServiceStub, metadata: Metadata, seconds: float) -> None:
        self.stub = stub
        self.metadata = metadata
        self.end = time.monotonic() + seconds

    @property
    def going_on(self) -> bool:
        """Whether its time is not up."""
        return time.monotonic() < self.end

    async def opened(self) -> str:
        """Opens a session of a new name, unless that is refused."""
        name = f"flood-{time.monotonic_ns()}-{next(_names)}"
        opening = pb.OpenSessionRequest(session_id=name, model=MODEL)
        with suppress(grpc.aio.AioRpcError):
            await self.stub.OpenSession(opening, metadata=self.metadata)
        return name

    async def ask(self, call: Callable[[], Awaitable[object]]) -> None:
        """Makes a call again and again."""
        while self.going_on:
            with suppress(grpc.aio.AioRpcError):
                await call()


async def _call(multi: Callable[..., Awaitable[object]], asked: object, metadata: Metadata) -> None:
    await multi(asked, metadata=metadata)


async def unary(flooder: Flooder) -> None:
    """Steps."""
    request = pb.StepRequest(session_id=await flooder.opened(), x=ROW)
    await flooder.ask(lambda: _call(flooder.stub.Step, request, flooder.metadata))


async def streams(flooder: Flooder) -> None:
    """Rows on a stream, without a wait for replies."""
    request = pb.StepRequest(session_id=await flooder.opened(), x=ROW)
    await _pour(flooder, flooder.stub.StreamSteps, lambda: request)


async def packed(flooder: Flooder) -> None:
    """Packed rows of 64 sessions, without a wait for replies."""
    names = [await flooder.opened() for _ in range(64)]
    bindings = [pb.Binding(handle=place, session_id=name) for place, name in enumerate(names)]
    handles, x = np.arange(64, dtype="<u4").tobytes(), bytes(64 * 4 * INPUTS)
    first = pb.StreamPackedRequest(bindings=bindings, handles=handles, x=x)
    message = pb.StreamPackedRequest(handles=handles, x=x)
    messages = iter([first])
    await _pour(flooder, flooder.stub.StreamPacked, lambda: next(messages, message))


async def _pour(
    flooder: Flooder, multi: Callable[..., object], message: Callable[[], object]
) -> None:
    while flooder.going_on:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call: grpc.aio.StreamStreamCall = multi(metadata=flooder.metadata)
            reading = asyncio.create_task(_drop_replies(call))
            try:
                while flooder.going_on and not reading.done():
                    await call.write(message())
            finally:
                call.cancel()
                reading.cancel()


async def _drop_replies(call: grpc.aio.StreamStreamCall) -> None:
    with suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


async def primes(flooder: Flooder) -> None:
    """Requests with 2,000 rows."""
    request = pb.StepRequest(
        session_id=await flooder.opened(), x=np.zeros(2000 * INPUTS, np.float32), last_only=True
    )
    await flooder.ask(lambda: _call(flooder.stub.Step, request, flooder.metadata))


async def forecasts(flooder: Flooder) -> None:
    """Forecasts of 16 sessions."""
    names = [await flooder.opened() for _ in range(16)]
    request = pb.ForecastRequest(session_id=names, horizon=1)
    await flooder.ask(lambda: _call(flooder.stub.Forecast, request, flooder.metadata))


async def opens(flooder: Flooder) -> None:
    """Sessions that are opened, and closed again."""

    async def once() -> None:
        name = await flooder.opened()
        closing = pb.CloseSessionRequest(session_id=name)
        await _call(flooder.stub.CloseSession, closing, flooder.metadata)

    await flooder.ask(once)


async def lists(flooder: Flooder) -> None:
    """Pages of 1,000 sessions, of a tenant that has about as many."""
    for _ in range(16):
        await flooder.opened()
    request = pb.ListSessionsRequest(page_size=1000)
    await flooder.ask(lambda: _call(flooder.stub.ListSessions, request, flooder.metadata))


async def honest_load(flooder: Flooder) -> None:
    """Rows of a session, each when the one before is answered: no flood, but a busy tenant."""
    request = pb.StepRequest(session_id=await flooder.opened(), x=ROW)
    call = flooder.stub.StreamSteps(metadata=flooder.metadata)
    while flooder.going_on:
        await call.write(request)
        await call.read()
    call.cancel()


FLOODS: dict[str, tuple[Callable[[Flooder], Awaitable[None]], int]] = {
    "honest load": (honest_load, 16),
    "unary": (unary, 32),
    "streams": (streams, 64),
    "packed": (packed, 4),
    "primes": (primes, 16),
    "forecasts": (forecasts, 8),
    "opens": (opens, 16),
    "lists": (lists, 16),
}
"""What each does, and how many tasks of it are on each connection."""


async def flood(address: str, name: str, metadata: Metadata, seconds: float) -> None:
    """Floods a server."""
    script, tasks = FLOODS[name]
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            stub = await stack.enter_async_context(raw_stub(address))
            flooder = Flooder(stub, metadata, seconds)
            for _ in range(tasks):
                group.create_task(script(flooder))
