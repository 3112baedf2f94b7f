"""Honest load: what an attack's effect on others is compared with, and what warms a server up."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.attack import Target
from tests.integration.wire import raw_stub

SECONDS = 1.0


async def busy(target: Target, count: int) -> None:
    """Sessions that step as fast as they are answered, each on a stream of its own."""
    async with raw_stub(target.address) as stub, asyncio.TaskGroup() as group:
        for place in range(count):
            group.create_task(_step(stub, f"busy-{time.monotonic_ns()}-{place}"))


async def _step(stub: StepstateServiceStub, name: str) -> None:
    await stub.OpenSession(pb.OpenSessionRequest(session_id=name, model="lstm"))
    stream = stub.StreamSteps()
    request = pb.StepRequest(session_id=name, x=np.zeros(3, np.float32))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        await stream.write(request)
        await stream.read()
    stream.cancel()
    await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
