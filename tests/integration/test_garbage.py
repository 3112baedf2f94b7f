"""No call leaves a cycle of references behind: the cycle collector stops the event loop.

A cycle of each call is 30,000 objects in half a second of a busy server, and stops it for 30 ms.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.tenants import LimitTable, TenantLimits
from stepstate.transport.authentication import CREDENTIAL_KEY
from stepstate.v1 import stepstate_pb2 as pb
from tests.credentials import bearer, token
from tests.integration import requests_of
from tests.integration.requests_of import METHODS, MODEL, Own, X
from tests.integration.triton import infer
from tests.integration.wire import HANG

CALLS = 4
WRONG = ((CREDENTIAL_KEY, "Bearer no-token"),)


@dataclass(frozen=True, slots=True)
class Caller:
    """A client with a token."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...]

    async def call(self, method: str, session_id: str, metadata: object = None) -> None:
        """Calls for a session, whatever comes of it."""
        requests = requests_of.REQUESTS[method](Own(session_id))
        await requests_of.call(
            self.channel, METHODS[method], requests[0], metadata or self.metadata
        )


@pytest.fixture(autouse=True)
def _other_objects_aside() -> Iterator[None]:
    """The collector does not look at what there was before: a look takes a second without this."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
async def caller(config: ServerConfig, tmp_path: Path) -> AsyncIterator[Caller]:
    tokens = tmp_path / "tokens"
    metadata = bearer(token(tokens, scopes="step read admin"))
    async with (
        running_server(replace(config, tokens_file=str(tokens))) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Caller(channel, metadata)


@contextmanager
def garbage() -> Iterator[list[object]]:
    """What is left to the cycle collector, of this project, by what is done in the block."""
    left: list[object] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield left
        gc.collect()
        left += [one for one in gc.garbage if "stepstate" in str(type(one))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.transports
async def test_no_call_leaves_a_cycle_of_references(caller: Caller):
    opening, numbers = METHODS["OpenSession"], itertools.count(10_000)
    for method in METHODS:
        names = [str(next(numbers)) for _ in range(CALLS)]
        for name in names:
            request = pb.OpenSessionRequest(session_id=name, model=MODEL)
            await requests_of.call(caller.channel, opening, request, caller.metadata)
            step = pb.StepRequest(session_id=name, x=X, t=0)
            await requests_of.call(caller.channel, METHODS["Step"], step, caller.metadata)
        await caller.call(method, names[0])
        with garbage() as left:
            for name in names[1:]:
                await caller.call(method, name)
                await caller.call(method, "404")
                await caller.call(method, name, WRONG)
            await asyncio.sleep(0.1)  # a server may end its tasks after the client has the reply
        assert not [type(one).__qualname__ for one in left], method


NAN = float("nan")
NAME = "10000"


def of_rows() -> list[Message]:
    """Messages of `StreamSteps` that are served, and such that are refused for each reason."""
    return [
        *requests_of.REQUESTS["StreamSteps"](Own(NAME)),
        *requests_of.REQUESTS["StreamSteps"](Own("404")),
        *(pb.StepRequest(session_id=NAME, x=X, t=t) for t in range(100)),
        pb.StepRequest(session_id=NAME, x=X, t=10**6),
        pb.StepRequest(session_id=NAME, x=X[:2]),
        pb.StepRequest(session_id=NAME, x=(NAN, NAN, NAN)),
        pb.StepRequest(session_id=NAME, x=(3e38, 3e38, 3e38)),
        pb.StepRequest(session_id="", x=X),
    ]


def of_packs() -> list[Message]:
    """The same of `StreamPacked`."""
    packs = requests_of.REQUESTS["StreamPacked"]
    two, far = np.array([0, 1], "<u4").tobytes(), np.array([10**6] * 2, "<u8").tobytes()
    x = np.array([X, X], "<f4")
    return [
        *packs(Own("404")),
        *packs(Own(NAME)),
        *([pb.StreamPackedRequest(handles=two, x=x.tobytes())] * 50),
        pb.StreamPackedRequest(handles=two, x=x.tobytes(), t=far),
        pb.StreamPackedRequest(handles=two, x=x[:, :2].tobytes()),
        pb.StreamPackedRequest(handles=two, x=(NAN * x).tobytes()),
        pb.StreamPackedRequest(handles=two[:-1], x=x.tobytes()),
    ]


def of_inferences() -> list[Message]:
    """The same of `ModelStreamInfer`."""
    inferences, x = requests_of.REQUESTS["ModelStreamInfer"], np.array([X], "<f4")
    return [
        *inferences(Own("404")),
        *inferences(Own(NAME)),
        infer(MODEL, int(NAME), x, sequence_start=True),
        *(infer(MODEL, int(NAME), x, step_t=t) for t in range(50)),
        infer(MODEL, int(NAME), x, step_t=10**6),
        infer(MODEL, int(NAME), x[:, :2]),
        infer(MODEL, int(NAME), NAN * x),
        infer("no-model", int(NAME), x),
    ]


@pytest.mark.transports
@pytest.mark.parametrize("limit", [None, 10], ids=["unlimited", "limited"])
@pytest.mark.parametrize(
    ("method", "messages"),
    [("StreamSteps", of_rows), ("StreamPacked", of_packs), ("ModelStreamInfer", of_inferences)],
)
async def test_no_message_of_a_stream_leaves_a_cycle_of_references(
    config: ServerConfig, method: str, messages: Callable[[], list[Message]], limit: int | None
):
    limits = LimitTable(defaults=TenantLimits(rows_per_second=limit))
    stream, sent = METHODS[method], messages()
    path = f"/{stream.containing_service.full_name}/{method}"
    async with (
        running_server(config, limits=limits) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        opening = pb.OpenSessionRequest(session_id=NAME, model=MODEL)
        await requests_of.call(channel, METHODS["OpenSession"], opening, ())
        call = channel.stream_stream(path, lambda made: made.SerializeToString(), None)()
        await call.write(sent[0])
        await call.read()
        with garbage() as left:
            reading = asyncio.create_task(read(call, len(sent)))
            for message in sent:
                await call.write(message)
            await asyncio.wait_for(reading, HANG)
        call.cancel()
    assert not [type(one).__qualname__ for one in left]


async def read(call: grpc.aio.StreamStreamCall, count: int) -> None:
    for _ in range(count):
        assert await call.read() is not grpc.aio.EOF
