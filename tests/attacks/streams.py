"""Streams of every kind, and calls, that come and go: nothing of them may stay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import numpy as np
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.honest import MODEL
from tests.integration.triton import infer

HANDLES = 10_000
ROW = [0.5] * 3
ONE, NONE = "one", "none"
"""A session that is open, and one that is not."""

Kind = Callable[[grpc.aio.Channel], Awaitable[grpc.aio.Call]]
"""Opens a stream, and leaves it when it has been answered."""


async def steps(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Steps a session, and one that does not exist."""
    stream = StepstateServiceStub(channel).StreamSteps()
    for name in (ONE, NONE):
        await stream.write(pb.StepRequest(session_id=name, x=ROW))
        await stream.read()
    return stream


async def packed(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Binds 10,000 handles, and steps the sessions of two."""
    stream = StepstateServiceStub(channel).StreamPacked()
    message = pb.StreamPackedRequest(
        handles=np.arange(2, dtype="<u4").tobytes(), x=np.array([ROW, ROW], "<f4").tobytes()
    )
    for handle in range(HANDLES):
        message.bindings.add(handle=handle, session_id=f"{NONE}-{handle}" if handle else ONE)
    await stream.write(message)
    await stream.read()
    return stream


async def triton(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Starts a sequence, steps it, steps one that does not exist, and ends the first."""
    stream = GRPCInferenceServiceStub(channel).ModelStreamInfer()
    x = np.array([ROW], np.float32)
    for parameters in (
        {"sequence_id": "two", "sequence_start": True},
        {"sequence_id": "two"},
        {"sequence_id": NONE},
        {"sequence_id": "two", "sequence_end": True},
    ):
        await stream.write(infer(MODEL, x=x, **parameters))
        await stream.read()
    return stream


async def exported(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Exports a session."""
    stream = StepstateServiceStub(channel).StreamExport(pb.StreamExportRequest(session_id=ONE))
    await stream.read()
    return stream


async def imported(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Sends a part of a snapshot of which no more comes."""
    stream = StepstateServiceStub(channel).StreamImport()
    await stream.write(pb.StreamImportRequest(size=10_000, session_id="three", data=bytes(5_000)))
    return stream


async def nothing(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Asks for the models: gRPC itself leaves some objects for each call."""
    return StepstateServiceStub(channel).ListModels(pb.ListModelsRequest())


async def calls(channel: grpc.aio.Channel) -> grpc.aio.Call:
    """Steps a session by a call, with 10,000 rows."""
    ask = pb.StepRequest(session_id=ONE, x=10_000 * ROW, last_only=True)
    return StepstateServiceStub(channel).Step(ask)


KINDS: tuple[Kind, ...] = (calls, steps, packed, triton, exported, imported)


async def come_and_go(address: str, kind: Kind, count: int, *, in_order: bool) -> None:
    """Opens streams one after the other; each ends in order, or is cancelled."""
    async with grpc.aio.insecure_channel(address) as channel:
        for _ in range(count):
            stream = await kind(channel)
            if not in_order:
                stream.cancel()
                continue
            if isinstance(stream, grpc.aio.StreamStreamCall | grpc.aio.StreamUnaryCall):
                await stream.done_writing()
            await stream.code()


def run(address: str, kind: Kind, count: int, in_order: bool) -> None:  # noqa: FBT001 - a process
    """The same, to be the function of a process."""
    asyncio.run(come_and_go(address, kind, count, in_order=in_order))
