"""Client processes at work on a server that stalls, drops and refuses: what they count."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks import echo, sender
from benchmarks.load import ArrivalSchedule, CallPath, Failed, Kind, Load, Question, Ready, Window
from stepstate.v1 import stepstate_pb2 as pb

pytestmark = pytest.mark.long  # real client processes and stalls

Reply = Callable[[bytes], Awaitable[bytes | None]]
STALL = 0.5


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[str]:
    """An echo that does something to its messages; without a reply it ends the call."""

    async def stream(_requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            answer = await reply(message)
            if answer is None:
                return
            await context.write(answer)

    async def unary(request: bytes, context: Any) -> bytes:
        answer = await reply(request)
        if answer is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            raise AssertionError
        return answer

    methods = {
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
    }
    server = grpc.aio.server()
    handlers = grpc.method_handlers_generic_handler(echo.SERVICE, methods)
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def load(
    target: str, path: CallPath, sessions: int, schedule: ArrivalSchedule | None = None
) -> Load:
    names = [f"s{place}" for place in range(sessions)]
    x = np.ones((sessions, 2), np.float32)
    packed = path is CallPath.PACKED
    return Load(Kind.ECHO, path, target, names, x, schedule, rows=2 if packed else 1, in_flight=2)


async def sent(asked: Load, warm_up: float, seconds: float) -> Any:
    """What a client answers to a load, in a thread of its own."""
    ours, theirs = multiprocessing.Pipe()
    client = Thread(target=sender.run_client, args=(theirs,))
    client.start()
    try:
        return await asyncio.to_thread(_ask, ours, asked, warm_up, seconds)
    finally:
        ours.close()
        await asyncio.to_thread(client.join)


def _ask(pipe: Connection[Question, Any], asked: Load, warm_up: float, seconds: float) -> Any:
    pipe.send(asked)
    answer = pipe.recv()
    if isinstance(answer, Ready):
        begin = time.monotonic()
        pipe.send(Window(begin, begin + warm_up, begin + warm_up + seconds))
        answer = pipe.recv()
    return answer


def stalling(at: int) -> tuple[Reply, list[bytes]]:
    """An echo that once waits, and what it was sent."""
    messages: list[bytes] = []

    async def reply(message: bytes) -> bytes:
        messages.append(message)
        if len(messages) == at:
            await asyncio.sleep(STALL)
        return message

    return reply, messages


@pytest.mark.parametrize("path", [CallPath.STREAM, CallPath.UNARY])
async def test_at_a_fixed_rate_a_stall_counts_for_every_step_that_was_due_in_it(path: CallPath):
    reply, _ = stalling(at=20)
    async with serving(reply) as target:
        sample = await sent(load(target, path, 1, ArrivalSchedule(0.01, 0.0)), 0.0, 1.0)
    assert len(sample.latencies) == 100
    # Of the 50 that were due in the stall some 40 waited for more than a fifth of it.
    assert (sample.latencies > STALL / 5).sum() >= 40


async def test_in_closed_loop_a_stall_counts_once():
    reply, _ = stalling(at=20)
    async with serving(reply) as target:
        sample = await sent(load(target, CallPath.STREAM, 1), 0.0, 1.0)
    assert (sample.latencies > STALL).sum() == 1
    assert sample.replies == len(sample.latencies)


@pytest.mark.parametrize(
    "schedule", [None, ArrivalSchedule(0.005, 0.0)], ids=["closed loop", "fixed rate"]
)
@pytest.mark.parametrize("path", list(CallPath))
async def test_every_session_is_sent_its_own_t_in_order(
    path: CallPath, schedule: ArrivalSchedule | None
):
    reply, messages = stalling(at=0)
    async with serving(reply) as target:
        sample = await sent(load(target, path, 5, schedule), 0.1, 0.4)
    assert not sample.unanswered
    assert sample.replies > 0
    if schedule is not None:
        assert len(sample.latencies) == pytest.approx(0.4 / schedule.interval, abs=1)
    sent_t: dict[object, list[int]] = {}
    for message in messages:
        if path is CallPath.PACKED:
            packed = pb.StreamPackedRequest.FromString(message)
            sent_t.setdefault(packed.id, []).extend(set(np.frombuffer(packed.t, "<u8").tolist()))
        else:
            step = pb.StepRequest.FromString(message)
            sent_t.setdefault(step.session_id, []).append(step.t)
    assert len(sent_t) == (2 if path is CallPath.PACKED else 5)
    assert all(found == list(range(len(found))) for found in sent_t.values())


async def test_sessions_share_streams_beyond_a_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sender, "MAX_STREAMS", 2)
    reply, messages = stalling(at=0)
    async with serving(reply) as target:
        sample = await sent(load(target, CallPath.STREAM, 5), 0.0, 0.3)
    names = {message[2 : 2 + message[1]] for message in messages}
    assert names == {b"s0", b"s1", b"s2", b"s3", b"s4"}
    assert sample.replies >= 5


async def test_steps_that_are_never_answered_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sender, "GRACE_SECONDS", 0.3)

    async def reply(message: bytes) -> bytes:
        if message.endswith(b"\x05"):  # t = 5
            await asyncio.sleep(60)
        return message

    async with serving(reply) as target:
        sample = await sent(load(target, CallPath.STREAM, 1, ArrivalSchedule(0.05, 0.0)), 0.0, 1.0)
    assert len(sample.latencies) == 20
    assert sample.unanswered == 16
    assert sample.latencies.max() > 1.0


@pytest.mark.parametrize(
    "schedule", [None, ArrivalSchedule(0.01, 0.0)], ids=["closed loop", "fixed rate"]
)
@pytest.mark.parametrize("path", list(CallPath))
async def test_a_call_that_ends_is_told(path: CallPath, schedule: ArrivalSchedule | None):
    seen = 0

    async def reply(message: bytes) -> bytes | None:
        nonlocal seen
        seen += 1
        return message if seen < 10 else None

    async with serving(reply) as target:
        failed = await sent(load(target, path, 4, schedule), 0.0, 2.0)
    assert isinstance(failed, Failed)
    assert "gone" in failed.detail or "ended a stream" in failed.detail


async def test_a_server_that_hangs_in_closed_loop_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sender, "GRACE_SECONDS", 0.2)
    reply, _ = stalling(at=5)
    async with serving(reply) as target:
        failed = await sent(load(target, CallPath.STREAM, 1), 0.0, 0.1)
    assert isinstance(failed, Failed)
    assert "the server hangs" in failed.detail
