"""One client process: sessions that each send a row, wait for the reply, and send the next.

Each session has a stream of its own. Its requests carry `t`, as a real client's
do: prepared bytes, then `t`, since protobuf takes fields in any order. The first
and the last reply of each stream are parsed. That is enough: a step that failed
in between would leave the session behind, and every later reply would be an error.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeAlias

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from stepstate.bench import echo
from stepstate.bench.errors import BenchError
from stepstate.client.wire import from_status
from stepstate.v1 import stepstate_pb2 as pb

_T_TAG = bytes([pb.StepRequest.T_FIELD_NUMBER << 3])
"""Field number, and wire type 0: a varint follows."""


class Kind(enum.Enum):
    """What is asked of a server."""

    ECHO = "echo"
    STEP = "step"


_SERVICE = pb.DESCRIPTOR.services_by_name["StepstateService"].full_name
_METHODS = {Kind.ECHO: echo.METHOD, Kind.STEP: f"/{_SERVICE}/StreamSteps"}


@dataclass(frozen=True, slots=True)
class Load:
    """What one process sends."""

    kind: Kind
    target: str
    prefixes: Sequence[bytes]
    """For each stream the bytes of a `StepRequest` without `t`; its session is at t = 0."""


@dataclass(frozen=True, slots=True)
class Window:
    """From when to when replies count, by `time.monotonic`, the same clock in all processes."""

    start: float
    finish: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.finish - self.start


@dataclass(frozen=True, slots=True)
class Ready:
    """Every stream of a process was answered once."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How long each reply that came within the window took, in seconds."""

    latencies: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a process gave up."""

    detail: str


Question = Load | Window
Answer = Ready | Sample | Failed
_Stream: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
_Method: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


def run_client(parent: Connection[Answer, Question]) -> None:
    """Answers each `Load` with `Ready`, then its `Window` with `Sample`, until the parent is gone.

    Between the two it waits, after them it sends until the window has passed. It
    ends with the first failure.
    """
    try:
        while True:
            load = parent.recv()
            assert isinstance(load, Load)
            parent.send(uvloop.run(_run(load, parent)))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - the parent tells it
        parent.send(Failed(f"{type(error).__name__}: {error}"))


async def _run(load: Load, parent: Connection[Answer, Question]) -> Sample:
    async with grpc.aio.insecure_channel(load.target) as channel:
        method: _Method = channel.stream_stream(_METHODS[load.kind])
        streams = [(method(), prefix) for prefix in load.prefixes]
        await asyncio.gather(*(_first(load.kind, *stream) for stream in streams))
        parent.send(Ready())
        window = await asyncio.to_thread(parent.recv)
        assert isinstance(window, Window)
        found = await asyncio.gather(*(_loop(load.kind, *stream, window) for stream in streams))
    return Sample(np.array([latency for part in found for latency in part]))


async def _first(kind: Kind, stream: _Stream, prefix: bytes) -> None:
    request = _request(prefix, 0)
    await stream.write(request)
    _check(kind, request, await stream.read(), 1)


async def _loop(kind: Kind, stream: _Stream, prefix: bytes, window: Window) -> list[float]:
    latencies: list[float] = []
    clock, write, read = time.monotonic, stream.write, stream.read
    now, t = 0.0, 0
    while now < window.finish:
        t += 1
        request = _request(prefix, t)
        sent = clock()
        await write(request)
        reply = await read()
        now = clock()
        if reply is grpc.aio.EOF:
            raise BenchError("the server ended a stream")
        if window.start <= now < window.finish:
            latencies.append(now - sent)
    _check(kind, request, reply, t + 1)
    await stream.done_writing()
    return latencies


def _request(prefix: bytes, t: int) -> bytes:
    return prefix + _T_TAG + _varint(t)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first (protobuf.dev/programming-guides/encoding)."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _check(kind: Kind, request: bytes, reply: object, t: int) -> None:
    """Raises unless this is the right reply to the request that takes the session to t."""
    if not isinstance(reply, bytes):
        raise BenchError("the server ended a stream")
    if kind is Kind.ECHO:
        if reply != request:
            raise BenchError("the echo sent something else back")
        return
    response = pb.StepResponse.FromString(reply)
    if response.HasField("error"):
        raise from_status(response.error)
    if response.t != t or not response.y:
        raise BenchError(f"a step to t = {t} was answered with t = {response.t}, y = {response.y}")
