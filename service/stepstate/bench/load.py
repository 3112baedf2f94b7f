"""One client process: sessions that each send a message, wait for the reply, and send the next.

It sends prepared bytes and parses nothing but what tells an error, so that the
client costs as little as a client in Python can.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

WARM_UP_SECONDS = 1.0
"""Connections, caches and the first forwards settle in it; it is not counted."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one process sends."""

    target: str
    method: str
    requests: Sequence[bytes]
    """One message for each stream, sent again and again."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process saw: when each reply came, and how long it took, in seconds."""

    started: float
    finished: float
    latencies: NDArray[np.float64]


def run_load(load: Load) -> Sample:
    """Runs the load in this process."""
    return uvloop.run(_run(load))


async def _run(load: Load) -> Sample:
    async with grpc.aio.insecure_channel(load.target) as channel:
        call = channel.stream_stream(load.method)
        started = time.perf_counter() + WARM_UP_SECONDS
        finished = started + load.seconds
        streams = [_closed_loop(call(), request, started, finished) for request in load.requests]
        found = await asyncio.gather(*streams)
    return Sample(started, finished, np.array([value for part in found for value in part]))


async def _closed_loop(
    call: grpc.aio.StreamStreamCall, request: bytes, started: float, finished: float
) -> list[float]:
    latencies: list[float] = []
    now = 0.0
    while now < finished:
        sent = time.perf_counter()
        await call.write(request)
        if await call.read() is grpc.aio.EOF:
            raise RuntimeError("the server ended a stream")
        now = time.perf_counter()
        if started <= sent:
            latencies.append(now - sent)
    await call.done_writing()
    return latencies
