"""Attacks on time: a client asks for so much that others wait."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from tests.attacks.attack import Target
from tests.attacks.http2 import frame, raw_connection
from tests.attacks.memory import SERVICE
from tests.integration.wire import opened, raw_stub

SECONDS = 4.0
ROWS = 500
"""Of each stream that does not read."""
STREAMS_A_CONNECTION = 100
CALLS = 100


async def streams_not_read(target: Target, count: int) -> None:
    """Sends 500 rows on each of as many streams, every one with a session, and reads no reply.

    1,000 streams left an honest client without a step for 25 s.
    """
    async with raw_stub(target.address) as stub, AsyncExitStack() as stack:
        names = [f"unread-{place}" for place in range(count)]
        for name in names:
            await opened(stub, name)
        for place, name in enumerate(names):
            if place % STREAMS_A_CONNECTION == 0:
                connection = await stack.enter_async_context(
                    raw_connection(target.address, window=0)
                )
            stream = connection.open(f"{SERVICE}/StreamSteps")
            await connection.send(
                stream, ROWS * frame(pb.StepRequest(session_id=name, x=[0.0] * 3))
            )
            await connection.flush()
        await asyncio.sleep(SECONDS)


async def lists_of_models(target: Target, count: int) -> None:
    """Calls ListModels 100 times at once on each of as many connections.

    100 connections were an outage of 10.6 s.
    """
    async with AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(raw_stub(target.address)) for _ in range(count)]
        calls = [stub.ListModels(pb.ListModelsRequest()) for stub in stubs for _ in range(CALLS)]
        await asyncio.gather(*calls, return_exceptions=True)


async def scrapers(target: Target, count: int) -> None:
    """Reads the metrics over and over on as many connections.

    64 of them took the p99 of others from 18 ms to 1.5 s.
    """
    await asyncio.gather(*(_scrape(target, "/metrics") for _ in range(count)))


async def scrapers_of_other_series(target: Target, count: int) -> None:
    """Reads other series on each of as many connections, over and over: none can share a page."""
    paths = (f"/metrics?name[]=stepstate_step_seconds_bucket&name[]={n}" for n in range(count))
    await asyncio.gather(*(_scrape(target, path) for path in paths))


async def scrapes_left_half_open(target: Target, count: int) -> None:
    """Opens as many connections to the metrics port, and sends on them half of a request or none.

    Each kept a thread for good. Prometheus must still get its page.
    """
    host, _, port = target.metrics_address.rpartition(":")
    writers = []
    for place in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metr" if place % 2 else b"")
        writers.append(writer)
    assert b"200 OK" in (await _page(target, "/metrics"))[:20]
    for writer in writers:
        writer.close()


async def _scrape(target: Target, path: str) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with suppress(OSError):
            await _page(target, path)


async def _page(target: Target, path: str) -> bytes:
    host, _, port = target.metrics_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    page = await reader.read(-1)
    writer.close()
    return page


async def refusals_while_nobody_reads_the_log(target: Target, count: int) -> None:
    """Asks for a session that does not exist, as often; stderr is a pipe that nobody reads.

    Each refusal was a line of the log, which was written on the event loop: after 192 of them the
    server stopped.
    """
    ask = pb.GetSessionRequest(session_id="none")
    async with raw_stub(target.address) as stub:
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * SECONDS):
                for _ in range(0, count, CALLS):
                    calls = [stub.GetSession(ask) for _ in range(CALLS)]
                    await asyncio.gather(*calls, return_exceptions=True)


async def waiting_rows(target: Target, count: int) -> None:
    """Keeps rows of 100 sessions waiting, so many in all, each session on a stream of its own.

    They were all before the next row of anybody else.
    """
    sessions = 100
    async with raw_stub(target.address) as stub:
        streams = []
        for place in range(sessions):
            await opened(stub, f"waiting-{place}")
            streams.append(stub.StreamSteps())
        end = time.monotonic() + SECONDS
        rows = count // sessions

        async def step(place: int) -> None:
            message = pb.StepRequest(session_id=f"waiting-{place}", x=[0.0] * 3)
            for _ in range(rows):
                await streams[place].write(message)
            while time.monotonic() < end:
                await streams[place].read()
                await streams[place].write(message)

        await asyncio.gather(*map(step, range(sessions)))


async def waiting_packed_rows(target: Target, count: int) -> None:
    """Keeps rows of 1,000 sessions waiting, so many in all, by packed messages of 4,000 rows."""
    sessions, rows = 1_000, 4_000
    handles = np.tile(np.arange(sessions, dtype="<u4"), rows // sessions)
    async with raw_stub(target.address) as stub:
        message = pb.StreamPackedRequest(
            handles=handles.tobytes(), x=np.zeros((rows, 3), "<f4").tobytes()
        )
        streams = [stub.StreamPacked() for _ in range(-(-count // 3 // rows))]
        binding = pb.StreamPackedRequest()
        for place in range(sessions):
            await opened(stub, f"packed-{place}")
            binding.bindings.add(handle=place, session_id=f"packed-{place}")
        end = time.monotonic() + SECONDS

        async def step(stream: grpc.aio.StreamStreamCall) -> None:
            await stream.write(binding)
            for _ in range(3):
                await stream.write(message)
            while time.monotonic() < end:
                await stream.read()
                await stream.write(message)

        await asyncio.gather(*map(step, streams))
