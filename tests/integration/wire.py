"""The contract without the project's client: raw stubs, rows, and what a refusal carries."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from stepstate.metrics.pages import SHARED_SECONDS
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

DETAILS_KEY = "grpc-status-details-bin"
STEP = "/stepstate.v1.StepstateService/Step"
STREAM = "/stepstate.v1.StepstateService/StreamSteps"
GARBAGE = b"\xff\xff\xff\xff"
"""No message of any type."""
TOLERANCE = 1e-5
KINDS = ("ErrorInfo", "BadRequest", "PreconditionFailure", "QuotaFailure", "RetryInfo")
HANG = 60.0
"""Seconds after which a wait counts as a hang."""
BLOCKER_ROWS = 1_500
"""Rows of a request that keeps its session busy while others are served."""
STEEP = 1e3
"""What the steep networks multiply x with: rows of 3e38 overflow their float32 inside."""


def draw(rows: int, width: int = 3, *, seed: int = 0) -> np.ndarray:
    """Some rows [T, D] in float32."""
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def request(session_id: str, t: int | None, x: np.ndarray, **options: bool) -> pb.StepRequest:
    """A request for rows; t None leaves it unset."""
    return pb.StepRequest(session_id=session_id, t=t, x=np.ravel(x), **options)


def blocker(session_id: str, t: int = 0, *, rows: int, width: int = 3) -> pb.StepRequest:
    """A request that keeps its session busy, half a millisecond a row, while others are served."""
    x = draw(rows, width, seed=99)
    return request(session_id, t, x, inspect=True, last_only=True)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with its details, from a call or from a stream's reply."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: Mapping[str, str]
    field: str | None
    quota: str | None
    precondition: str | None
    retry_seconds: float | None


def refusal_of(status: status_pb2.Status) -> Refusal:
    """What a status carries; it has no detail of an unknown type."""
    found = {}
    for detail in status.details:
        for kind in KINDS:
            message = getattr(error_details_pb2, kind)()
            if detail.Unpack(message):
                found[kind] = message
    assert len(found) == len(status.details), "a detail of an unknown type"
    info = found["ErrorInfo"]
    assert info.domain == "stepstate"
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    _, bad, broken, quota, retry = map(found.get, KINDS)
    return Refusal(
        code,
        status.message,
        info.reason,
        dict(info.metadata),
        bad and bad.field_violations[0].field,
        quota and quota.violations[0].subject,
        broken and broken.violations[0].subject,
        retry and retry.retry_delay.ToNanoseconds() / 1e9,
    )


def refusal_of_call(error: grpc.RpcError) -> Refusal:
    """What a failed call carries; its code and message are those of the details."""
    metadata = dict(error.trailing_metadata() or ())
    assert DETAILS_KEY in metadata, f"{error.code()} without details: {error.details()}"
    found = refusal_of(status_pb2.Status.FromString(metadata[DETAILS_KEY]))
    assert (found.code, found.message) == (error.code(), error.details())
    assert "Traceback" not in found.message
    return found


def refusal_in(reply: pb.StepResponse) -> Refusal:
    """What a refused item of a stream carries; nothing else but its session's id is set."""
    assert {field.name for field, _ in reply.ListFields()} <= {"session_id", "error"}
    assert reply.HasField("error"), reply
    return refusal_of(reply.error)


async def refused(call: Awaitable[object]) -> Refusal:
    """Awaits a call that must fail.

    Nothing may be written to it meanwhile: where a write meets the end of a call, grpc.aio's client
    reports INTERNAL and loses the status. So a stream that is to be refused is only read.
    """
    try:
        reply = await asyncio.wait_for(_plain(call), HANG)
    except grpc.aio.AioRpcError as error:
        return refusal_of_call(error)
    raise AssertionError(f"was accepted: {reply}")


async def _plain(call: Awaitable[object]) -> object:
    return await call


async def ask(
    stub: StepstateServiceStub, requests: Iterable[pb.StepRequest]
) -> list[pb.StepResponse]:
    """Sends requests on one stream, half-closes it, and returns every reply."""
    stream = stub.StreamSteps()

    async def send() -> None:
        for item in requests:
            await stream.write(item)
        await stream.done_writing()

    async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
        group.create_task(send())
        return [reply async for reply in stream]


async def opened(
    stub: StepstateServiceStub, session_id: str, model: str = "lstm", **fields: object
) -> str:
    """Opens a session and returns its id."""
    reply = await stub.OpenSession(
        pb.OpenSessionRequest(session_id=session_id, model=model, **fields)
    )
    return reply.session.session_id


async def where(stub: StepstateServiceStub, session_id: str) -> pb.Session:
    """A session as it stands."""
    return (await stub.GetSession(pb.GetSessionRequest(session_id=session_id))).session


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks until it is so."""
    async with asyncio.timeout(HANG):
        while not await condition():
            await asyncio.sleep(0.005)


async def queued(stub: StepstateServiceStub, session_id: str, count: int) -> None:
    """Waits until so many requests of a session are accepted and unanswered."""

    async def so() -> bool:
        return (await where(stub, session_id)).queued_requests == count

    await until(so)


@asynccontextmanager
async def raw_stub(address: str, *options: tuple[str, int]) -> AsyncIterator[StepstateServiceStub]:
    """A stub on a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=[*own, *options]) as channel:
        yield StepstateServiceStub(channel)


async def scrape(metrics_address: str) -> str:
    """The text of the metrics endpoint, as of now."""
    await asyncio.sleep(SHARED_SECONDS)  # else it may be an earlier one

    def get() -> str:
        with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=HANG) as reply:
            return reply.read().decode()

    return await asyncio.to_thread(get)


async def open_calls(metrics_address: str, method: str) -> float:
    """How many calls of a method have begun and not ended."""
    text = await scrape(metrics_address)
    started, ended = (
        sum(
            map(
                float,
                re.findall(rf'^{name}{{.*grpc_method="{method}".*}} (\S+)$', text, re.MULTILINE),
            )
        )
        for name in ("grpc_server_started_total", "grpc_server_handled_total")
    )
    return started - ended


def sample(text: str, series: str) -> float:
    """The sum of the samples whose name and labels begin so."""
    found = re.findall(rf"^{re.escape(series)}.* ([0-9.e+]+)$", text, re.MULTILINE)
    return sum(map(float, found))


def largest_difference(got: Iterable[float], want: np.ndarray) -> float:
    """max |Δ| of all outputs; the shapes must agree."""
    mine = np.asarray(list(got) if not isinstance(got, np.ndarray) else got, np.float64)
    assert mine.size == want.size, f"{mine.size} values, expected {want.size}"
    assert np.isfinite(mine).all()
    return float(np.abs(mine.reshape(want.shape) - want).max())


def outputs(replies) -> list[float]:
    return [value for reply in replies for value in reply.y]


async def unary(stub: StepstateServiceStub, sent: pb.StepRequest) -> pb.StepResponse:
    return await stub.Step(sent)


async def streamed(stub: StepstateServiceStub, sent: pb.StepRequest) -> pb.StepResponse:
    (reply,) = await ask(stub, [sent])
    return reply


def opening(**fields: object) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(**{"model": "lstm", **fields})
