"""grpcio as a client, sync and aio: the four kinds of call, and calls that end in each phase."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from contextlib import suppress
from uuid import uuid4

import grpc
import numpy as np
import pytest
from grpc import StatusCode as Code

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.clients.http2 import GRPC, Http2Client, framed
from tests.clients.phases import PHASES, Phase, no_call_is_left
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    blocker,
    draw,
    largest_difference,
    opened,
    opening,
    outputs,
    raw_stub,
    request,
)
from tests.networks import Network
from tests.processes import ServerProcess

SERVICE = "/stepstate.v1.StepstateService"
ROWS = draw(300)


@pytest.fixture
def name() -> str:
    """A session's id."""
    return uuid4().hex


@pytest.fixture
def sync_stub(served: ServerProcess) -> Iterator[StepstateServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield StepstateServiceStub(channel)


def export_parts(parts: list[pb.StreamExportResponse], name: str) -> list[pb.StreamImportRequest]:
    """A snapshot's parts as those of an import."""
    first = pb.StreamImportRequest(session_id=name, size=parts[0].size)
    return [first, *(pb.StreamImportRequest(data=part.data) for part in parts)]


def test_sync_calls_of_all_four_kinds(
    sync_stub: StepstateServiceStub, networks: dict[str, Network], name: str
):
    sync_stub.OpenSession(opening(session_id=name))
    replies = list(sync_stub.StreamSteps(request(name, t, ROWS[t]) for t in range(299)))
    parts = list(sync_stub.StreamExport(pb.StreamExportRequest(session_id=name)))
    sync_stub.StreamImport(iter(export_parts(parts, name + "-copy")))
    last, again = (sync_stub.Step(request(one, 299, ROWS[299])) for one in (name, name + "-copy"))
    assert [reply.t for reply in [*replies, last]] == list(range(1, 301))
    assert last.y == again.y
    got = outputs([*replies, last])
    assert largest_difference(got, networks["lstm"].offline(ROWS)) < TOLERANCE


async def test_aio_calls_of_all_four_kinds(
    served: ServerProcess, networks: dict[str, Network], name: str
):
    async with raw_stub(served.address) as stub:
        await opened(stub, name)
        stream = stub.StreamSteps(request(name, t, ROWS[t]) for t in range(299))
        replies = [reply async for reply in stream]
        export = stub.StreamExport(pb.StreamExportRequest(session_id=name))
        parts = [part async for part in export]
        await stub.StreamImport(export_parts(parts, name + "-copy"))
        steps = [stub.Step(request(one, 299, ROWS[299])) for one in (name, name + "-copy")]
        last, again = await asyncio.gather(*steps)
    assert last.y == again.y
    got = outputs([*replies, last])
    assert largest_difference(got, networks["lstm"].offline(ROWS)) < TOLERANCE


async def test_a_large_snapshot_comes_and_goes_in_parts(served: ServerProcess, name: str):
    """4 MB in each direction: every window is used up many times."""
    async with raw_stub(served.address) as stub:
        await opened(stub, name, model="far")
        first = await stub.Step(request(name, 0, draw(5, 50)))
        export = stub.StreamExport(pb.StreamExportRequest(session_id=name))
        parts = [part async for part in export]
        assert sum(len(part.data) for part in parts) == parts[0].size > 4_000_000
        await stub.StreamImport(export_parts(parts, name + "-copy"))
        again = await stub.Step(request(name + "-copy", 0, draw(5, 50)))
    assert again.replayed
    assert again.y == first.y


def test_many_threads_share_a_sync_channel(
    sync_stub: StepstateServiceStub, networks: dict[str, Network], name: str
):
    names = [f"{name}-{number}" for number in range(20)]
    opens = [sync_stub.OpenSession.future(opening(session_id=one)) for one in names]
    assert len({future.result(HANG).session.session_id for future in opens}) == 20
    steps = [sync_stub.Step.future(request(one, 0, ROWS)) for one in names]
    expected = networks["lstm"].offline(ROWS)
    for step in steps:
        assert largest_difference(step.result(HANG).y, expected) < TOLERANCE


def test_replies_come_before_a_sync_stream_is_half_closed(
    sync_stub: StepstateServiceStub, name: str
):
    sync_stub.OpenSession(opening(session_id=name))
    requests: queue.Queue[pb.StepRequest | None] = queue.Queue()
    replies = sync_stub.StreamSteps(iter(requests.get, None))
    for t in range(20):
        requests.put(request(name, t, ROWS[t]))
        assert next(replies).t == t + 1
    requests.put(None)
    assert not list(replies)
    assert replies.code() is Code.OK


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
async def test_a_cancelled_call_ends_on_the_server(served: ServerProcess, phase: Phase, name: str):
    async with raw_stub(served.address) as stub:
        await opened(stub, name)
        call = await phase.begin(stub, None)
        call.cancel()
        assert await call.code() is Code.CANCELLED
        await no_call_is_left(served, phase.method)
        assert (await stub.Step(request(name, 0, ROWS[0]))).t == 1  # on the same connection


def test_a_sync_call_is_cancelled_before_and_while_it_is_served(
    sync_stub: StepstateServiceStub, served: ServerProcess, name: str
):
    sync_stub.OpenSession(opening(session_id=name))
    early = sync_stub.Step.future(request(name, None, ROWS[0]))
    early.cancel()
    late = sync_stub.Step.future(blocker(name, None, rows=1_500))
    stream = sync_stub.StreamSteps(iter(queue.Queue().get, None))
    stream.cancel()
    late.cancel()
    assert late.cancelled()
    assert stream.code() is Code.CANCELLED
    for method in ("Step", "StreamSteps"):
        asyncio.run(no_call_is_left(served, method))
    assert sync_stub.GetSession(pb.GetSessionRequest(session_id=name)).session.t in {0, 1, 1501}


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
async def test_a_deadline_that_passes_ends_the_call_on_both_sides(
    served: ServerProcess, phase: Phase, name: str
):
    async with raw_stub(served.address) as stub:
        await opened(stub, name)
        call = await phase.begin(stub, 0.25)
        assert await call.code() is Code.DEADLINE_EXCEEDED
        await no_call_is_left(served, phase.method)
        assert (await stub.Step(request(name, 0, ROWS[0]))).t == 1


async def test_a_deadline_that_has_passed_ends_a_call_before_it_begins(served: ServerProcess):
    async with raw_stub(served.address) as stub:
        for timeout in (0, -1):
            call = stub.ListModels(pb.ListModelsRequest(), timeout=timeout)
            assert await call.code() is Code.DEADLINE_EXCEEDED
        assert (await stub.ListModels(pb.ListModelsRequest(), timeout=1e6)).models


SHORT = (*GRPC, ("grpc-timeout", "200m"))


@pytest.mark.parametrize("half", [b"", b"\0\0\0\1\0", b"\0\0\0\1\0half"])
def test_the_server_ends_a_request_that_does_not_come_in_time(served: ServerProcess, half: bytes):
    """The client sends no RST_STREAM: the server itself looks at the time."""
    with Http2Client(served.address) as client:
        stream = client.begin(f"{SERVICE}/Step", SHORT)
        client.send(stream, half, end=False)
        assert client.response(stream).grpc == (4, "Deadline Exceeded")
        assert client.call(f"{SERVICE}/ListModels", framed(pb.ListModelsRequest())).grpc[0] == 0


def test_the_server_ends_a_call_whose_handler_takes_too_long(served: ServerProcess, name: str):
    with Http2Client(served.address) as client:
        client.call(f"{SERVICE}/OpenSession", framed(opening(session_id=name)))
        slow = client.call(f"{SERVICE}/Step", framed(blocker(name, rows=1_500)), SHORT)
        assert slow.grpc == (4, "Deadline Exceeded")
        assert not slow.data


@pytest.mark.parametrize("window", [0, 100])
def test_the_server_ends_a_call_whose_replies_wait_for_a_window(
    served: ServerProcess, name: str, window: int
):
    """Trailers need no window."""
    with Http2Client(served.address) as opener:
        opener.call(f"{SERVICE}/OpenSession", framed(opening(session_id=name)))
        for t in range(3):
            opener.call(f"{SERVICE}/Step", framed(request(name, t, ROWS[t])))
    export = framed(pb.StreamExportRequest(session_id=name))
    with Http2Client(served.address, window=window) as client:
        stuck = client.call(f"{SERVICE}/StreamExport", export, SHORT)
        assert stuck.grpc == (4, "Deadline Exceeded")
        assert len(stuck.data) <= window


async def test_a_deadline_amid_a_message_is_understood(served: ServerProcess, name: str):
    """The server's: the client itself has none. The status follows a fragment of a message."""
    async with raw_stub(served.address, ("grpc.http2.bdp_probe", 0)) as stub:
        await opened(stub, name, model="far")
        await stub.Step(request(name, 0, draw(1, 50)))
        export = pb.StreamExportRequest(session_id=name)
        call = stub.StreamExport(export, metadata=(("grpc-timeout", "300m"),))
        await no_call_is_left(served, "StreamExport")
        with suppress(grpc.RpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() is Code.DEADLINE_EXCEEDED
        assert await call.details() == "Deadline Exceeded"
        assert (await stub.Step(request(name, 1, draw(1, 50)))).t == 2


async def test_a_deadline_in_mid_stream_keeps_what_was_answered(served: ServerProcess, name: str):
    """Rows that were answered before it stay applied; the stream's other rows can be sent again.

    The client does not write any more when it passes: see `refused`.
    """
    async with raw_stub(served.address) as stub:
        await opened(stub, name)
        call = stub.StreamSteps(timeout=1)
        for t in range(5):
            await call.write(request(name, t, ROWS[t]))
            assert (await call.read()).t == t + 1
        await call.write(blocker(name, 5, rows=100_000))
        with suppress(grpc.RpcError):
            await call.read()
        assert await call.code() is Code.DEADLINE_EXCEEDED
        await no_call_is_left(served, "StreamSteps")
        session = (await stub.GetSession(pb.GetSessionRequest(session_id=name))).session
        assert session.t == 5
        replayed, following = [await stub.Step(request(name, t, ROWS[t])) for t in (4, 5)]
        assert (replayed.replayed, following.replayed, following.t) == (True, False, 6)
        assert np.isfinite([*replayed.y, *following.y]).all()
