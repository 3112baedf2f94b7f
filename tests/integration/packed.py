"""StreamPacked without the project's client: columns in, columns out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    HANG,
    Refusal,
    draw,
    opened,
    refusal_of,
)

REPLAYED, IMPUTED, FALLBACK = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reply, read."""

    id: int
    y: np.ndarray
    t: np.ndarray
    durable_t: np.ndarray
    flags: np.ndarray
    errors: Mapping[int, Refusal]
    error: Refusal | None


def packed(
    handles: Sequence[int],
    t: Sequence[int] | None,
    x: np.ndarray,
    *,
    id: int = 0,  # noqa: A002 - the contract's word
    bind: Mapping[int, str] | None = None,
) -> pb.StreamPackedRequest:
    """A message; t None leaves it empty."""
    return pb.StreamPackedRequest(
        id=id,
        bindings=[
            pb.Binding(handle=handle, session_id=name) for handle, name in (bind or {}).items()
        ],
        handles=np.asarray(handles, "<u4").tobytes(),
        t=b"" if t is None else np.asarray(t, "<u8").tobytes(),
        x=np.asarray(x, "<f4").tobytes(),
    )


def read(reply: pb.StreamPackedResponse) -> Outcome:
    """A reply's columns; those that it has agree in length."""
    t = np.frombuffer(reply.t, "<u8").astype(int)
    y = np.frombuffer(reply.y, "<f4")
    durable_t = np.frombuffer(reply.durable_t, "<u8").astype(int)
    flags = np.frombuffer(reply.flags, "<u1") if reply.flags else np.zeros(len(t), np.uint8)
    assert len(t) == len(durable_t) == len(flags)
    errors = {error.row: refusal_of(error.status) for error in reply.errors}
    refused = None
    if reply.HasField("error"):
        refused = refusal_of(reply.error)
        assert {field.name for field, _ in reply.ListFields()} <= {"id", "error"}
    return Outcome(
        reply.id, y.reshape(len(t), -1) if len(t) else y, t, durable_t, flags, errors, refused
    )


async def ask_packed(
    stub: StepstateServiceStub, requests: Sequence[pb.StreamPackedRequest]
) -> list[Outcome]:
    """Sends all messages on one stream without waiting, and returns the replies as they came."""
    stream = stub.StreamPacked()

    async def send() -> None:
        for request in requests:
            await stream.write(request)
        await stream.done_writing()

    async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
        group.create_task(send())
        return [read(reply) async for reply in stream]


class Conversation:
    """One stream on which a message is answered before the next is sent."""

    def __init__(self, stub: StepstateServiceStub) -> None:
        self._stream = stub.StreamPacked()

    async def ask(self, request: pb.StreamPackedRequest) -> Outcome:
        """Sends a message, and waits for a reply."""
        await self._stream.write(request)
        return await self.next()

    async def next(self) -> Outcome:
        """The next reply."""
        reply = await asyncio.wait_for(self._stream.read(), HANG)
        assert reply is not grpc.aio.EOF
        return read(reply)

    async def send(self, request: pb.StreamPackedRequest) -> None:
        """Sends a message only."""
        await self._stream.write(request)

    def cancel(self) -> None:
        """Gives the stream up."""
        self._stream.cancel()


async def crowd(stub: StepstateServiceStub, count: int, **fields: object) -> dict[int, str]:
    """Opens sessions, and gives each its handle."""
    names = {handle: f"s{handle}" for handle in range(count)}
    await asyncio.gather(*(opened(stub, name, **fields) for name in names.values()))
    return names


def series(count: int, rows: int) -> np.ndarray:
    """Rows [sessions, T, D], another sequence for each session."""
    return np.stack([draw(rows, seed=place) for place in range(count)])
