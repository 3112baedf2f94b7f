"""Attacks on memory: a client makes the server hold more than it should."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from tests.attacks.attack import Target
from tests.attacks.honest import MODEL
from tests.attacks.http2 import RawConnection, frame, raw_connection
from tests.integration.triton import infer
from tests.integration.wire import draw, opened, raw_stub, request

SERVICE = "/stepstate.v1.StepstateService"
TRITON = "/inference.GRPCInferenceService"
MIB = 2**20
CALLS_A_CONNECTION = 500
HELD_SECONDS = 3.0
"""How long the attacker keeps what it has opened."""


async def bindings_of_a_megabyte(target: Target, count: int) -> None:
    """Binds handles to ids of 1 MB on one packed stream, so many times.

    1,800 of them took 2.2 GB, kept as long as the stream lives.
    """
    async with raw_connection(target.address) as connection:
        stream = connection.open(f"{SERVICE}/StreamPacked")
        for first in range(0, count, 15):
            message = pb.StreamPackedRequest(id=first)
            for handle in range(first, min(first + 15, count)):
                message.bindings.add(handle=handle, session_id="x" * MIB)
            await connection.send(stream, frame(message))
        await connection.flush()
        await asyncio.sleep(1)


async def tables_of_unread_messages(target: Target, count: int) -> None:
    """Binds the highest handle, then sends small messages that bind a handle, and reads nothing.

    The table of handles was copied for each message that changed it, 6 MB each time, and each
    message without an answer kept its own: 1,024 of them took 2.7 GB.
    """
    async with raw_connection(target.address, window=0) as connection:
        stream = connection.open(f"{SERVICE}/StreamPacked")
        message = pb.StreamPackedRequest(id=0)
        message.bindings.add(handle=262_143, session_id="none")
        await connection.send(stream, frame(message))
        for number in range(count):
            message = pb.StreamPackedRequest(id=number)
            message.bindings.add(handle=number, session_id="none")
            await connection.send(stream, frame(message))
        await connection.flush()
        await asyncio.sleep(HELD_SECONDS)


async def exports_not_read(target: Target, count: int) -> None:
    """Asks for a snapshot of nearly 4 MB on as many calls, in 10 bytes each, and reads none.

    Exports reserved nothing: 1,000 of them took 4.8 GB. The session is closed in the end: what it
    takes itself is no leftover.
    """
    ask = pb.ExportSessionRequest(session_id="large")
    async with raw_stub(target.address) as stub:
        await opened(stub, "large")
        await stub.Step(request("large", 0, draw(4_000), inspect=True))
        async with calls_not_read(target, f"{SERVICE}/ExportSession", frame(ask), count):
            await asyncio.sleep(HELD_SECONDS)
        await stub.CloseSession(pb.CloseSessionRequest(session_id="large"))


async def replies_not_read(target: Target, count: int) -> None:
    """Sends one step as often, each with a reply of 53 KB that is remembered, and reads none.

    A reply's room was given back before it had left: 500 calls on each of many connections took
    3.3 GB.
    """
    step = request("retried", 0, draw(58), inspect=True)
    async with raw_stub(target.address) as stub:
        await opened(stub, "retried")
        await stub.Step(step)
    async with calls_not_read(target, f"{SERVICE}/Step", frame(step), count):
        await asyncio.sleep(HELD_SECONDS)


async def triton_ids_of_15_megabytes(target: Target, count: int) -> None:
    """Steps a sequence on each of as many Triton streams, with a request id of 15 MB, unread.

    The request and its reply, which repeats the id, were held: 200 streams took 3.2 GB.
    """
    async with AsyncExitStack() as stack:
        for place in range(count):
            if place % 20 == 0:
                connection = await stack.enter_async_context(
                    raw_connection(target.address, window=0)
                )
            stream = connection.open(f"{TRITON}/ModelStreamInfer")
            await connection.send(stream, _with_long_id(place))
            await connection.flush()
        await asyncio.sleep(HELD_SECONDS)


async def ended_triton_sequences(target: Target, count: int) -> None:
    """Starts and ends as many Triton sequences in one request each, with a request id of 15 MB.

    The last request of a sequence was kept for a retry: 100 of them held 1.8 GB for good.
    """
    for place in range(count):
        async with raw_connection(target.address) as connection:
            stream = connection.open(f"{TRITON}/ModelInfer")
            await connection.send(
                stream, _with_long_id(place, sequence_end=True, step_t=0), end=True
            )
            await connection.until_ended([stream])


def _with_long_id(place: int, **parameters: object) -> bytes:
    return frame(
        infer(
            MODEL,
            f"long-{place}",
            np.zeros((1, 3), np.float32),
            request_id="x" * (15 * MIB),
            sequence_start=True,
            **parameters,
        )
    )


async def missing_rows(target: Target, count: int) -> None:
    """Advances a session by 10,000 missing rows, in a request of 20 bytes, as often; reads none.

    1,000 of them were seconds of computing each, and replies of 510 MiB.
    """
    async with raw_stub(target.address) as stub:
        await opened(stub, "missing", missing=pb.MISSING_POLICY_HOLD)
    message = frame(pb.StepRequest(session_id="missing", advance=10_000))
    async with raw_connection(target.address, window=0) as connection:
        stream = connection.open(f"{SERVICE}/StreamSteps")
        await connection.send(stream, message * count)
        await connection.flush()
        await asyncio.sleep(HELD_SECONDS)


async def requests_of_16_megabytes(target: Target, count: int) -> None:
    """Sends the largest requests on as many calls at once.

    100 of them took 4.9 GB.
    """
    message = frame(pb.StepRequest(session_id="none", x=bytes(4_000_000)))
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for _ in range(0, count, 10):
            connection = await stack.enter_async_context(raw_connection(target.address))
            group.create_task(_send_at_once(connection, message, 10))


async def _send_at_once(connection: RawConnection, message: bytes, count: int) -> None:
    streams = [connection.open(f"{SERVICE}/Step") for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(connection.send(stream, message, end=True))
    await connection.until_ended(streams)


async def gzip_bomb(target: Target, count: int) -> None:
    """Sends a message of 64 KB for each 64 MB that it inflates to, in one call.

    gRPC inflates before it compares with its limit: 4 MB became 4 GB.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS + 16)
    start = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    part = packer.compress(bytes(64 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    message = frame(start + part * count + packer.flush(), compressed=True)
    async with raw_connection(target.address) as connection:
        stream = connection.open(f"{SERVICE}/Step", (("grpc-encoding", "gzip"),))
        await connection.send(stream, message, end=True)
        await connection.until_ended([stream])


@asynccontextmanager
async def calls_not_read(
    target: Target, path: str, message: bytes, count: int
) -> AsyncIterator[None]:
    """Inside the block, as many calls have been sent, and their replies wait in the server."""
    async with AsyncExitStack() as stack:
        for first in range(0, count, CALLS_A_CONNECTION):
            connection = await stack.enter_async_context(raw_connection(target.address, window=0))
            for _ in range(min(CALLS_A_CONNECTION, count - first)):
                stream = connection.open(path)
                await connection.send(stream, message, end=True)
            await connection.flush()
        yield
