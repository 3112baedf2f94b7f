"""Honest load: what an attack's effect on others is compared with, and what warms a server up."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.attack import Target
from tests.attacks.honest import INPUTS, MODEL
from tests.integration.wire import opened, raw_stub

WARM_UP_SECONDS, SECONDS = 1.0, 4.0
LARGE_MESSAGES, LONG_REPLIES = 8, 40
LONGEST_GAP = 10_000
"""Missing rows of a request, at most."""


async def warm_up(target: Target, count: int) -> None:
    """Has the server compute batches of every size up to this: torch keeps memory for each.

    It also receives some of the largest messages and makes some of the longest replies, read by
    their client: the first of them take memory that stays, hardly more with each.
    """
    async with raw_stub(target.address) as stub:
        for _ in range(LARGE_MESSAGES):
            with suppress(grpc.aio.AioRpcError):  # it is no snapshot
                await stub.ImportSession(pb.ImportSessionRequest(snapshot=bytes(15 * 2**20)))
        await opened(stub, "warm-gap", missing=pb.MISSING_POLICY_HOLD)
        gaps = stub.StreamSteps()
        for _ in range(LONG_REPLIES):
            await gaps.write(pb.StepRequest(session_id="warm-gap", advance=LONGEST_GAP))
        for _ in range(LONG_REPLIES):
            await gaps.read()
        gaps.cancel()
        await stub.CloseSession(pb.CloseSessionRequest(session_id="warm-gap"))
        stream = stub.StreamPacked()
        message = pb.StreamPackedRequest()
        for place in range(count):
            name = f"warm-{place}"
            await stub.OpenSession(pb.OpenSessionRequest(session_id=name, model=MODEL))
            message.bindings.add(handle=place, session_id=name)
        for size in range(1, count + 1):
            message.handles = np.arange(size, dtype="<u4").tobytes()
            message.x = bytes(4 * INPUTS * size)
            await stream.write(message)
            await stream.read()
            message.ClearField("bindings")
        stream.cancel()
        for place in range(count):
            await stub.CloseSession(pb.CloseSessionRequest(session_id=f"warm-{place}"))
    await _busy(target, 64, WARM_UP_SECONDS)


async def honest_load(target: Target, count: int) -> None:
    """Sessions that step as fast as they are answered, each on a stream of its own.

    No attack: it is what a busy server is to the honest client, which an attack may double.
    """
    await _busy(target, count, SECONDS)


async def _busy(target: Target, count: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    async with raw_stub(target.address) as stub, asyncio.TaskGroup() as group:
        for place in range(count):
            group.create_task(_step(stub, f"busy-{place}-{time.monotonic_ns()}", end))


async def _step(stub: StepstateServiceStub, name: str, end: float) -> None:
    await stub.OpenSession(pb.OpenSessionRequest(session_id=name, model=MODEL))
    stream = stub.StreamSteps()
    request = pb.StepRequest(session_id=name, x=np.zeros(INPUTS, np.float32))
    while time.monotonic() < end:
        await stream.write(request)
        await stream.read()
    stream.cancel()
    await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
