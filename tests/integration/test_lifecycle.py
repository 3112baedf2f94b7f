"""From start to stop: health, reflection, metrics, logs, signals and the drain."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import queue
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from stepstate import errors
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, ServerState, build_server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    GARBAGE,
    HANG,
    STEP,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    queued,
    raw_stub,
    refusal_in,
    refused,
    request,
    sample,
    scrape,
    until,
)
from tests.networks import Network
from tests.processes import ServerProcess

pytestmark = pytest.mark.transports(long=True)

SERVICE = "stepstate.v1.StepstateService"
Start = Callable[..., AbstractContextManager[ServerProcess]]
Serving = health_pb2.HealthCheckResponse


async def health_of(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


# Health and reflection.


async def test_a_running_server_is_serving(server: Server):
    assert server.state is ServerState.SERVING
    for service in ("", SERVICE):
        assert await health_of(server.address, service) == Serving.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await health_of(server.address, "nope")
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_draining_server_is_not_serving(config: ServerConfig):
    patient = dataclasses.replace(config, drain_seconds=HANG)
    async with (
        running_server(patient) as server,
        raw_stub(server.address) as stub,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await opened(stub, "a")
        long = asyncio.ensure_future(stub.Step(blocker("a", rows=1_500)))
        await queued(stub, "a", 1)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
        assert (await watch.read()).status == Serving.SERVING
        draining = asyncio.create_task(server.drain())
        assert (await watch.read()).status == Serving.NOT_SERVING
        assert not long.done()
        assert server.state is ServerState.DRAINING
        assert (await long).t == 1_500
        watch.cancel()
        await draining
        assert server.state is ServerState.STOPPED


async def test_an_async_generator_that_is_cancelled_is_counted_as_canceled(server: Server):
    """Reflection's, which stands at a `yield` while its client does not read."""
    name = "grpc_server_handled_total"
    labels = 'grpc_code="Canceled",grpc_method="ServerReflectionInfo",grpc_service="grpc.reflection'
    unread = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.address, options=unread) as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        )()
        for _ in range(40):
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        await call.read()
        await asyncio.sleep(0.2)
        call.cancel()

    async def counted() -> bool:
        return sample(await scrape(server.metrics_address), f"{name}{{{labels}.v1alpha") == 1

    await until(counted)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_tells_services_and_files(server: Server, version: str):
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()

        async def answer(**fields: str) -> reflection_pb2.ServerReflectionResponse:
            await call.write(reflection_pb2.ServerReflectionRequest(**fields))
            return await call.read()

        services = (await answer(list_services="")).list_services_response.service
        assert {service.name for service in services} == {
            SERVICE,
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for symbol in (SERVICE, "stepstate.v1.StepRequest", "google.rpc.Status"):
            reply = await answer(file_containing_symbol=symbol)
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in reply.file_descriptor_response.file_descriptor_proto
            ]
            wanted = "google/rpc/status" if "rpc" in symbol else "stepstate/v1/stepstate"
            assert f"{wanted}.proto" in {file.name for file in files}
        unknown = await answer(file_containing_symbol="nope.Nope")
        assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        call.cancel()


# Metrics.


async def test_metrics_count_what_happened(server: Server):
    async with raw_stub(server.address) as stub:
        await opened(stub, "a")
        await opened(stub, "b", "gru")
        await ask(stub, [request("a", t, draw(1)) for t in range(5)])
        await stub.Step(request("a", 5, draw(10)))
        await stub.Step(request("a", 5, draw(10)))
        await refused(stub.Step(request("a", 99, draw(1))))
        await refused(stub.Step(request("nope", 0, draw(1))))
        await ask(stub, [request("nope", 0, draw(1))])
        await stub.CloseSession(pb.CloseSessionRequest(session_id="b"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            await refused(channel.unary_unary(STEP)(GARBAGE))
        text = await scrape(server.metrics_address)

    lstm = '{model="lstm",version="1"'
    rpc = f'grpc_method="Step",grpc_service="{SERVICE}",grpc_type="unary"'
    expected = {
        'stepstate_steps_total{model="lstm",result="applied"': 15,
        'stepstate_steps_total{model="lstm",result="replayed"': 1,
        'stepstate_steps_total{model="lstm",result="refused"': 1,
        f"stepstate_microbatch_rows_sum{lstm}": 5,
        'stepstate_step_seconds_count{model="lstm",stage="queue"': 5,
        'stepstate_sessions{model="gru",residency="resident"': 0,
        f"stepstate_sessions_opened_total{lstm}": 1,
        'stepstate_sessions_closed_total{reason="closed"': 1,
        'stepstate_requests_refused_total{reason="SESSION_UNKNOWN"': 2,
        'stepstate_requests_refused_total{reason="STEP_AHEAD"': 1,
        f"stepstate_queue_rows{lstm}": 0,
        f"grpc_server_started_total{{{rpc}": 5,
        f'grpc_server_handled_total{{grpc_code="OK",{rpc}': 2,
        f'grpc_server_handled_total{{grpc_code="Aborted",{rpc}': 1,
        f'grpc_server_handled_total{{grpc_code="NotFound",{rpc}': 1,
        f'grpc_server_handled_total{{grpc_code="InvalidArgument",{rpc}': 1,
        f"grpc_server_handling_seconds_count{{{rpc}": 5,
    }
    assert {series: sample(text, series) for series in expected} == expected
    assert sample(text, f"stepstate_state_bytes{lstm}") > 0
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    labels = {key for family in families for one in family.samples for key in one.labels}
    assert not labels & {"session_id", "peer"}
    assert "process_resident_memory_bytes" in {family.name for family in families}


# Signals.


@asynccontextmanager
async def under_load(
    server: ServerProcess, networks: dict[str, Network]
) -> AsyncIterator[list[asyncio.Future[None]]]:
    """Sessions that step one row after the other, until they are refused; then they check.

    By the synchronous client, as their streams may end while they write: see `refused`.
    """
    loop, started, calls = asyncio.get_running_loop(), asyncio.Semaphore(0), []

    def step_on(stub: StepstateServiceStub, name: str) -> None:
        stub.OpenSession(pb.OpenSessionRequest(session_id=name, model="lstm"))
        x, y = draw(100_000, seed=hash(name) % 1000), []
        requests: queue.SimpleQueue[pb.StepRequest | None] = queue.SimpleQueue()
        call = stub.StreamSteps(iter(requests.get, None))
        calls.append(call)
        for t, row in enumerate(x):
            requests.put(request(name, t, row))
            reply = next(call, None)
            if reply is None or reply.HasField("error"):
                break
            y += reply.y
            loop.call_soon_threadsafe(started.release)
        requests.put(None)
        if reply is not None:
            refusal = refusal_in(reply)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert refusal.retry_seconds is not None
            assert refusal.retry_seconds > 0
        want = networks["lstm"].offline(x[: len(y) // 2]).ravel()
        assert largest_difference(y, want) <= TOLERANCE

    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(8) as threads:
        stub = StepstateServiceStub(channel)
        load = [loop.run_in_executor(threads, step_on, stub, f"load-{n}") for n in range(8)]
        for _ in range(80):
            await asyncio.wait_for(started.acquire(), HANG)
        try:
            yield load
        finally:
            for call in calls:
                call.cancel()


async def ended(server: ServerProcess) -> int:
    return await asyncio.to_thread(server.process.wait, HANG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_every_accepted_step_is_answered(
    start_process: Start, networks: dict[str, Network], number: signal.Signals
):
    rows = 4_000
    with start_process() as server:
        async with (
            under_load(server, networks) as load,
            raw_stub(server.address) as stub,
            raw_stub(server.address) as other,
        ):
            for name in ("a", "b"):
                await opened(stub, name)
            long = asyncio.ensure_future(stub.Step(blocker("a", rows=rows)))
            await queued(stub, "a", 1)
            waiting = asyncio.ensure_future(stub.Step(request("a", rows, draw(1))))
            stream = stub.StreamSteps()
            for t in range(10):
                await stream.write(request("a", rows + 1 + t, draw(1, seed=t)))
            await queued(stub, "a", 12)
            server.process.send_signal(number)

            async def draining() -> bool:
                (reply,) = await ask(other, [request("b", None, draw(1))])
                return reply.HasField("error") and refusal_in(reply).reason == "DRAINING"

            await until(draining)
            for refusal in (
                await refused(stub.Step(request("b", None, draw(1)))),
                await refused(stub.OpenSession(pb.OpenSessionRequest(model="lstm"))),
            ):
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert refusal.retry_seconds is not None
                assert refusal.retry_seconds > 0
            assert not long.done()

            assert ((await long).t, (await waiting).t) == (rows, rows + 1)
            answered = [await stream.read() for _ in range(10)]
            x = np.concatenate(
                (draw(rows, seed=99), draw(1), *(draw(1, seed=t) for t in range(10)))
            )
            want = networks["lstm"].offline(x)[-10:].ravel()
            got = [value for reply in answered for value in reply.y]
            assert largest_difference(got, want) <= TOLERANCE
            with pytest.raises(grpc.aio.AioRpcError) as end:
                await stream.read()
            assert end.value.code() == grpc.StatusCode.UNAVAILABLE
            assert await ended(server) == 0
            for outcome in await asyncio.gather(*load, return_exceptions=True):
                # A stream that was between two steps is ended with the same words.
                assert outcome is None or outcome.code() == grpc.StatusCode.UNAVAILABLE, outcome


async def test_a_second_signal_cuts_the_drain_short(start_process: Start):
    with start_process("--drain-seconds", "600") as server:
        async with raw_stub(server.address) as stub:
            await opened(stub, "a")
            await opened(stub, "b")
            calls = [asyncio.ensure_future(stub.Step(blocker("a", rows=100_000)))]
            calls += [
                asyncio.ensure_future(stub.Step(request("a", None, draw(20_000), last_only=True)))
                for _ in range(20)
            ]
            await queued(stub, "a", 21)
            server.process.terminate()

            async def draining() -> bool:
                (reply,) = await ask(stub, [request("b", None, draw(1))])
                return reply.HasField("error") and refusal_in(reply).reason == "DRAINING"

            await until(draining)
            server.process.terminate()
            assert await ended(server) == 1
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, grpc.aio.AioRpcError)


async def test_a_drain_that_is_cut_does_not_blame_the_store(
    config: ServerConfig, caplog: pytest.LogCaptureFixture
):
    server = await build_server(dataclasses.replace(config, drain_seconds=600.0))
    await server.start()
    async with raw_stub(server.address) as stub:
        await opened(stub, "a")
        call = stub.Step(blocker("a", rows=2_000))
        await queued(stub, "a", 1)
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0)
        await server.stop()
        await asyncio.gather(call, draining, return_exceptions=True)
    assert server.state is ServerState.STOPPED
    assert "the store is away" not in caplog.text


async def test_a_drain_that_takes_too_long_is_cut(start_process: Start):
    with start_process("--drain-seconds", "0.3") as server:
        async with raw_stub(server.address) as stub:
            await opened(stub, "a")
            call = asyncio.ensure_future(stub.Step(blocker("a", rows=100_000)))
            await queued(stub, "a", 1)
            server.process.terminate()
            await ended(server)
            with pytest.raises(grpc.aio.AioRpcError):
                await call


async def test_idle_streams_do_not_hold_up_a_drain(start_process: Start):
    with start_process("--drain-seconds", "600") as server:
        async with raw_stub(server.address) as stub:
            await opened(stub, "a")
            streams = [stub.StreamSteps() for _ in range(20)]
            for t, stream in enumerate(streams):
                await stream.write(request("a", t, draw(1)))
                await stream.read()
            server.process.terminate()
            assert await ended(server) == 0
            for stream in streams:
                with pytest.raises(grpc.aio.AioRpcError) as end:
                    await stream.read()
                assert end.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_watches_of_health_do_not_hold_up_a_drain(start_process: Start):
    """A load balancer keeps one open for as long as the server lives."""
    with start_process("--drain-seconds", "12") as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == Serving.SERVING
            server.process.terminate()
            assert (await watch.read()).status == Serving.NOT_SERVING
            # Far below what the drain may take: nothing accepted is left to answer.
            assert await asyncio.to_thread(server.process.wait, 6.0) == 0


async def test_a_drained_port_can_be_served_again_at_once(start_process: Start):
    with start_process() as first:
        async with AsyncClient(first.address, timeout=30.0) as client:
            session = await client.open("lstm")
            await session.step(draw(3))
            first.process.terminate()
            assert await ended(first) == 0
            with start_process("--listen", first.address) as second:
                assert second.address == first.address
                with pytest.raises(errors.SessionUnknown):
                    await session.step(draw(1))
                assert (await (await client.open("lstm")).step(draw(1))).shape == (1, 2)


# Logs.


async def be_refused(address: str) -> None:
    async with raw_stub(address) as stub:
        await refused(stub.Step(request("nope\n{", 0, draw(1))))
        await refused(stub.GetSession(pb.GetSessionRequest(session_id="gone")))
        await ask(stub, [request("gone", 0, draw(1))] * 3)


def test_logs_are_json_line_by_line_and_hold_no_tracebacks(model_root: Path):
    ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    process = subprocess.Popen(
        [sys.executable, "-m", "stepstate.cli", "serve", "--models", str(model_root), *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        asyncio.run(be_refused(process.stdout.readline().split(" on ")[1].split(",")[0]))
        process.terminate()
        _, logged = process.communicate(timeout=HANG)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    lines = [json.loads(line) for line in logged.splitlines()]
    for line in lines:
        assert {"event", "level", "logger", "timestamp"} <= line.keys()
        assert "exception" not in line
    assert {line["level"] for line in lines} == {"info"}
    by_reason = [line["reason"] for line in lines if "reason" in line]
    assert by_reason == ["INVALID_FIELD", "SESSION_UNKNOWN"]
    (streamed,) = (line["refused"] for line in lines if "refused" in line)
    assert streamed == "SESSION_UNKNOWN: 3"
    assert [line["event"] for line in lines][-2:] == ["draining", "stopped"]
