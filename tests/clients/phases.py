"""Calls that stay in one phase until somebody ends them, and what the server says of its calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import blocker, draw, open_calls, opened, request, until
from tests.processes import ServerProcess

Begin = Callable[[StepstateServiceStub, float | None], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a call.

    Args:
        method: of the call.
        begin: makes the call, with a timeout in seconds, and returns it when it is in the phase.
    """

    method: str
    begin: Begin


async def _half_a_request(stub: StepstateServiceStub, seconds: float | None) -> Any:
    """A client stream of which one message has been sent, and more are announced."""

    async def parts() -> AsyncIterator[pb.StreamImportRequest]:
        yield pb.StreamImportRequest(size=20_000, data=bytes(9_000))
        await asyncio.Event().wait()

    call = stub.StreamImport(parts(), timeout=seconds)
    await asyncio.sleep(0.05)
    return call


async def _in_the_handler(stub: StepstateServiceStub, seconds: float | None) -> Any:
    """A unary call whose many rows are being stepped: no headers have come back."""
    name = await opened(stub, uuid4().hex)
    return stub.Step(blocker(name, rows=50_000), timeout=seconds)


async def _after_a_reply(stub: StepstateServiceStub, seconds: float | None) -> Any:
    """A stream that has had its initial metadata and a reply, and waits for a request."""
    name = await opened(stub, uuid4().hex)
    call = stub.StreamSteps(timeout=seconds)
    await call.write(request(name, 0, draw(1)))
    assert (await call.read()).t == 1
    return call


async def _before_any_reply(stub: StepstateServiceStub, seconds: float | None) -> Any:
    """A stream on which nothing was sent: there is no initial metadata yet."""
    return stub.StreamSteps(timeout=seconds)


async def _before_a_window(stub: StepstateServiceStub, seconds: float | None) -> Any:
    """A server stream of 4 MB whose client reads one message: the others wait for its window."""
    name = await opened(stub, uuid4().hex, model="far")
    await stub.Step(request(name, 0, draw(1, 50)))
    call = stub.StreamExport(pb.StreamExportRequest(session_id=name), timeout=seconds)
    assert (await call.read()).size > 4_000_000
    return call


PHASES = {
    "the request is not whole": Phase("StreamImport", _half_a_request),
    "the handler runs": Phase("Step", _in_the_handler),
    "no initial metadata": Phase("StreamSteps", _before_any_reply),
    "after initial metadata": Phase("StreamSteps", _after_a_reply),
    "replies wait for a window": Phase("StreamExport", _before_a_window),
}


async def no_call_is_left(server: ServerProcess, method: str) -> None:
    """Waits until all calls of a method have ended on the server."""
    metrics = server.metrics_url.removeprefix("http://").removesuffix("/metrics")

    async def ended() -> bool:
        return await open_calls(metrics, method) == 0

    await until(ended)
