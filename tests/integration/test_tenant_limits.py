"""What a tenant asks for beyond its limits is refused, whatever way it asks; others are served."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.errors import PermissionDenied, TenantLimitReached
from stepstate.server import Server, running_server
from stepstate.sessions import counts
from stepstate.tenants import LimitTable, RateLimits, TenantLimits
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.packed import packed
from tests.integration.triton import infer
from tests.integration.wire import (
    HANG,
    Refusal,
    draw,
    refusal_in,
    refusal_of,
    refused,
    request,
    scrape,
    until,
)
from tests.tenants import SaidTenants, as_tenant

BURST = 10
SLOW = 0.01
"""A second: so slow that no test sees a token come."""
ACME, OTHER = as_tenant("acme"), as_tenant("other")

Serve = Callable[..., AbstractAsyncContextManager[Server]]
pytestmark = pytest.mark.transports


@pytest.fixture
def serve(config: ServerConfig) -> Serve:
    """Runs a server where the tenant acme has these limits, and others have none."""

    def start(**limits: float) -> AbstractAsyncContextManager[Server]:
        return running_server(config, authenticator=SaidTenants(), limits=of_acme(**limits))

    return start


def of_acme(**limits: float) -> LimitTable:
    return LimitTable(tenants={"acme": TenantLimits(**limits)})


class Stubs:
    """Raw stubs of one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = StepstateServiceStub(channel)
        self.triton = GRPCInferenceServiceStub(channel)

    async def open(self, name: str, tenant: tuple[tuple[str, str], ...] = ACME) -> None:
        opening = pb.OpenSessionRequest(session_id=name, model="lstm")
        await self.stub.OpenSession(opening, metadata=tenant)

    async def t(self, name: str) -> int:
        asked = pb.GetSessionRequest(session_id=name)
        return (await self.stub.GetSession(asked, metadata=ACME)).session.t

    async def ask(self, *requests: pb.StepRequest) -> list[pb.StepResponse]:
        """Sends requests on one stream, each after the reply to the one before."""
        stream = self.stub.StreamSteps(metadata=ACME)
        replies = []
        for one in requests:
            await stream.write(one)
            replies.append(await asyncio.wait_for(stream.read(), HANG))
        await stream.done_writing()
        return replies


@asynccontextmanager
async def stubs(server: Server) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Stubs(channel)


def check(refusal: Refusal, limit: str, value: float, owner: str = "tenant:acme") -> None:
    """A refusal names the limit, its value and whose it is, and when to try again."""
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.reason == "TENANT_LIMIT"
    assert refusal.quota == f"{owner}:{limit}"
    assert refusal.retry_seconds
    assert f"{limit} = {value:g}" in refusal.message
    assert float(refusal.metadata["value"]) == value


def rows(session_id: str, first: int, last: int) -> list[pb.StepRequest]:
    return [request(session_id, t, draw(1, seed=t)) for t in range(first, last)]


async def test_unary_steps(serve: Serve):
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        await acme.open("a")
        await acme.stub.Step(request("a", 0, draw(BURST)), metadata=ACME)
        refusal = await refused(acme.stub.Step(request("a", BURST, draw(1)), metadata=ACME))
        check(refusal, "rows_per_second", SLOW)
        assert 99 < refusal.retry_seconds <= 100  # of one row
        assert await acme.t("a") == BURST
        await acme.open("a", OTHER)
        await acme.stub.Step(request("a", 0, draw(50)), metadata=OTHER)


@pytest.mark.parametrize("counted", [True, False])
async def test_rows_of_a_stream_one_by_one(serve: Serve, *, counted: bool):
    """On the fast path, and beside it; the stream goes on, and nothing is lost or applied twice."""
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        await acme.open("a")
        sent = rows("a", 0, BURST + 3) if counted else [request("a", None, draw(1))] * (BURST + 3)
        replies = await acme.ask(*sent)
        assert [reply.t for reply in replies[:BURST]] == list(range(1, BURST + 1))
        check(refusal_in(replies[BURST]), "rows_per_second", SLOW)
        assert all(reply.session_id == "a" and reply.HasField("error") for reply in replies[BURST:])
        assert await acme.t("a") == BURST
        server.set_limits(LimitTable())
        replies = await acme.ask(*rows("a", BURST, BURST + 5))
        assert [reply.t for reply in replies] == list(range(BURST + 1, BURST + 6))


async def test_rows_of_a_stream_all_at_once(serve: Serve):
    """Replies of a session keep the order of its requests; errors are in their places."""
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        await acme.open("a")
        stream = acme.stub.StreamSteps(metadata=ACME)
        for one in [request("a", None, draw(1, seed=n)) for n in range(100)]:
            await stream.write(one)
        await stream.done_writing()
        replies = [reply async for reply in stream]
        done = [reply.t for reply in replies if not reply.HasField("error")]
        assert done == list(range(1, BURST + 1))
        refusals = [refusal_in(reply) for reply in replies if reply.HasField("error")]
        assert {one.reason for one in refusals} == {"TENANT_LIMIT"}
        assert len(refusals) == 100 - BURST
        assert await acme.t("a") == BURST


async def test_a_request_with_many_rows_is_served_whole_and_made_up_for(serve: Serve):
    async with serve(rows_per_second=100, rows_burst=BURST) as server, stubs(server) as acme:
        await acme.open("a")
        await acme.stub.Step(request("a", 0, draw(1000), last_only=True), metadata=ACME)
        refusal = await refused(acme.stub.Step(request("a", 1000, draw(1)), metadata=ACME))
        check(refusal, "rows_per_second", 100)
        assert 5 < refusal.retry_seconds < 10
        assert await acme.t("a") == 1000


async def test_advance_counts_its_rows(serve: Serve):
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        policy = pb.MISSING_POLICY_HOLD
        opening = pb.OpenSessionRequest(session_id="a", model="lstm", missing=policy)
        await acme.stub.OpenSession(opening, metadata=ACME)
        await acme.stub.Step(request("a", 0, draw(1)), metadata=ACME)
        advance = pb.StepRequest(session_id="a", advance=BURST)
        await acme.stub.Step(advance, metadata=ACME)
        check(await refused(acme.stub.Step(advance, metadata=ACME)), "rows_per_second", SLOW)
        assert await acme.t("a") == 1 + BURST


async def test_packed_rows(serve: Serve):
    """A message is served whole or refused whole, and the stream goes on."""
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        names = [f"a{n}" for n in range(4)]
        for name in names:
            await acme.open(name)
        stream = acme.stub.StreamPacked(metadata=ACME)
        replies = []
        for number in range(6):
            bind = dict(enumerate(names)) if number == 0 else None
            await stream.write(packed([0, 1, 2, 3], None, draw(4), id=number, bind=bind))
            replies.append(await asyncio.wait_for(stream.read(), HANG))
        assert [reply.HasField("error") for reply in replies] == [False] * 3 + [True] * 3
        check(refusal_of(replies[3].error), "rows_per_second", SLOW)
        assert [reply.id for reply in replies] == list(range(6))
        assert [await acme.t(name) for name in names] == [3] * 4
        server.set_limits(LimitTable())
        await stream.write(packed([0, 1, 2, 3], [3] * 4, draw(4), id=9))
        assert not (await asyncio.wait_for(stream.read(), HANG)).HasField("error")


async def test_tritons_requests(serve: Serve):
    async with serve(rows_per_second=SLOW, rows_burst=BURST) as server, stubs(server) as acme:
        for place in range(BURST // 2):
            start = {"sequence_start": True} if place == 0 else {}
            await acme.triton.ModelInfer(infer("lstm", "s", draw(1)[0], **start), metadata=ACME)
        stream = acme.triton.ModelStreamInfer(metadata=ACME)
        problems = []
        for _ in range(BURST):
            await stream.write(infer("lstm", "s", draw(1)[0]))
            problems.append((await asyncio.wait_for(stream.read(), HANG)).error_message)
        assert [bool(problem) for problem in problems] == [False] * 5 + [True] * 5
        assert "rows_per_second = 0.01" in problems[-1]
        call = acme.triton.ModelInfer(infer("lstm", "s", draw(1)[0]), metadata=ACME)
        with pytest.raises(grpc.aio.AioRpcError, match="rows_per_second = 0") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        server.set_limits(LimitTable())
        await stream.write(infer("lstm", "s", draw(1)[0]))
        assert not (await asyncio.wait_for(stream.read(), HANG)).error_message


async def test_forecasts_count_by_session_and_scenario(serve: Serve):
    async with serve(forecasts_per_second=SLOW, forecasts_burst=4) as server, stubs(server) as acme:
        for name in "ab":
            await acme.open(name)
            await acme.stub.Step(request(name, 0, draw(3)), metadata=ACME)
        both = pb.ForecastRequest(session_id=["a", "b"], horizon=1)
        codes = [await forecast_or_code(acme, both) for _ in range(3)]
        assert [code == "RESOURCE_EXHAUSTED" for code in codes] == [False, False, True]
        check(await refused(acme.stub.Forecast(both, metadata=ACME)), "forecasts_per_second", SLOW)


async def forecast_or_code(acme: Stubs, asked: pb.ForecastRequest) -> str:
    """OK, or why not: that the network can't be forecast is found after its tokens were taken."""
    try:
        await acme.stub.Forecast(asked, metadata=ACME)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_all_tenants_together(config: ServerConfig):
    together = LimitTable(together=RateLimits(rows_per_second=SLOW, rows_burst=BURST))
    async with (
        running_server(config, authenticator=SaidTenants(), limits=together) as server,
        stubs(server) as acme,
    ):
        await acme.open("a")
        await acme.open("a", OTHER)
        await acme.stub.Step(request("a", 0, draw(BURST // 2)), metadata=ACME)
        await acme.stub.Step(request("a", 0, draw(BURST // 2)), metadata=OTHER)
        for who in (ACME, OTHER):
            call = acme.stub.Step(request("a", 5, draw(1)), metadata=who)
            check(await refused(call), "rows_per_second", SLOW, owner="server")


async def test_streams_and_calls(serve: Serve):
    async with serve(streams=2, calls=1) as server, stubs(server) as acme:
        await acme.open("a")
        streams = [acme.stub.StreamSteps(metadata=ACME) for _ in range(2)]
        for stream in streams:
            await stream.wait_for_connection()
        check(await refused(acme.stub.StreamPacked(metadata=ACME).read()), "streams", 2)
        await acme.stub.StreamSteps(metadata=OTHER).wait_for_connection()
        streams[0].cancel()

        async def freed() -> bool:
            return server.tenants.get("acme").held["streams"] == 1

        await until(freed)
        assert (await acme.ask(*rows("a", 0, 1)))[0].t == 1
        blocker = request("a", 1, draw(3000), inspect=True, last_only=True)
        long = asyncio.ensure_future(_plain(acme.stub.Step(blocker, metadata=ACME)))

        async def begun() -> bool:
            return server.tenants.get("acme").held["calls"] == 1

        await until(begun)
        check(await refused(acme.stub.Step(request("a", None, draw(1)), metadata=ACME)), "calls", 1)
        assert (await long).t == 3001

        async def ended() -> bool:
            return not server.tenants.get("acme").held["calls"]

        await until(ended)


async def test_callers_who_prove_nothing_are_of_no_tenant(config: ServerConfig):
    """Checks of health do not fail, and take nothing from anybody, least of all `default`."""
    limits = LimitTable(defaults=TenantLimits(streams=1, calls=0))
    async with (
        running_server(config, authenticator=SaidTenants(), limits=limits) as server,
        stubs(server) as default,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        for watch in watches:
            assert (await asyncio.wait_for(watch.read(), HANG)).status == 1
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        assert not server.memory.used
        stream = default.stub.StreamSteps(metadata=as_tenant("default"))
        await stream.write(request("a", 0, draw(1)))
        assert refusal_in(await asyncio.wait_for(stream.read(), HANG)).reason == "SESSION_UNKNOWN"


async def _plain(call: Awaitable[object]) -> object:
    return await call


async def test_open_sessions_on_all_servers_of_a_store(config: ServerConfig):
    limits = of_acme(open_sessions=5)
    second = dataclasses.replace(config, server_name="second")
    async with AsyncExitStack() as stack:
        acmes = []
        for one in (config, second):
            server = await stack.enter_async_context(
                running_server(one, authenticator=SaidTenants(), limits=limits)
            )
            acmes.append(await stack.enter_async_context(stubs(server)))
        openings = [acmes[n % 2].open(f"s{n}") for n in range(20)]
        outcomes = await asyncio.gather(*openings, return_exceptions=True)
        assert outcomes.count(None) == 5
        refusal = await refused(
            acmes[0].stub.OpenSession(pb.OpenSessionRequest(model="lstm"), metadata=ACME)
        )
        check(refusal, "open_sessions", 5)
        await acmes[1].open("s", OTHER)
        name = f"s{outcomes.index(None)}"
        closing = pb.CloseSessionRequest(session_id=name)
        await acmes[0].stub.CloseSession(closing, metadata=ACME)
        forking = pb.ForkSessionRequest(
            session_id=f"s{outcomes.index(None, outcomes.index(None) + 1)}", new_session_id="f"
        )
        await acmes[1].stub.ForkSession(forking, metadata=ACME)
        check(await refused(acmes[0].stub.ForkSession(forking_of(forking), metadata=ACME)),
              "open_sessions", 5)  # fmt: skip


def forking_of(asked: pb.ForkSessionRequest) -> pb.ForkSessionRequest:
    return pb.ForkSessionRequest(session_id=asked.session_id, new_session_id="g")


async def test_bytes_of_memory(serve: Serve):
    async with serve(memory_bytes=200_000) as server, stubs(server) as acme:
        await acme.open("a")
        refusal = await refused(acme.stub.Step(request("a", 0, draw(30_000)), metadata=ACME))
        check(refusal, "memory_bytes", 200_000)
        replies = await acme.ask(request("a", 0, draw(30_000)), request("a", 0, draw(1)))
        check(refusal_in(replies[0]), "memory_bytes", 200_000)
        assert replies[1].t == 1


async def test_bytes_of_memory_on_a_stream_refuse_a_request_and_not_the_stream(serve: Serve):
    """Also of requests that wait for their session, and of those that start a sequence."""
    async with serve(memory_bytes=200_000) as server, stubs(server) as acme:
        await acme.open("a")
        long = request("nobody", 0, draw(30_000))
        replies = await acme.ask(long, long, request("a", 0, draw(1)))
        for reply in replies[:2]:
            check(refusal_in(reply), "memory_bytes", 200_000)
        assert replies[2].t == 1
        stream = acme.triton.ModelStreamInfer(metadata=ACME)
        problems = []
        for rows_, name in ((30_000, "s"), (30_000, "s"), (1, "s")):
            await stream.write(infer("lstm", name, draw(rows_), sequence_start=True))
            problems.append((await asyncio.wait_for(stream.read(), HANG)).error_message)
        assert ["memory_bytes = 200000" in problem for problem in problems] == [True, True, False]
        assert not problems[2]


async def test_bytes_of_snapshots(serve: Serve):
    async with serve(snapshot_bytes=100) as server, stubs(server) as acme:
        await acme.open("a")
        export = pb.ExportSessionRequest(session_id="a")
        check(await refused(acme.stub.ExportSession(export, metadata=ACME)), "snapshot_bytes", 100)
        stream = acme.stub.StreamExport(pb.StreamExportRequest(session_id="a"), metadata=ACME)
        check(await refused(stream.read()), "snapshot_bytes", 100)
        server.set_limits(LimitTable())
        data = (await acme.stub.ExportSession(export, metadata=ACME)).snapshot
        server.set_limits(of_acme(snapshot_bytes=100))
        importing = pb.ImportSessionRequest(snapshot=data, session_id="b")
        check(
            await refused(acme.stub.ImportSession(importing, metadata=ACME)), "snapshot_bytes", 100
        )
        await acme.stub.ImportSession(importing, metadata=OTHER)

        async def released() -> bool:
            return not any(server.tenants.get("acme").held.values())

        await until(released)


async def stepped(client: AsyncClient, name: str, way: str, x: np.ndarray) -> np.ndarray:
    """The outputs of rows that are sent in one of the ways of the client library."""
    session = await client.open("lstm", session_id=name)
    if way == "step":
        return np.stack([await session.step(row) for row in x])
    if way == "stream":
        return np.stack([y async for y in session.stream(x)])
    return await session.prime(x)


@pytest.mark.parametrize("way", ["step", "stream", "prime"])
async def test_the_client_library_over_its_rate_goes_slower_and_loses_and_repeats_nothing(
    serve: Serve, way: str
):
    """Five sessions of one tenant, at a rate that lets all of them together have 200 rows a second;
    the limits change meanwhile."""
    x = draw(60, seed=5)
    async with serve(rows_per_second=200, rows_burst=20) as server:
        async with AsyncClient(server.address, metadata=OTHER) as client:
            want = await stepped(client, "want", way, x)
        async with AsyncClient(server.address, metadata=ACME) as client:
            work = [asyncio.ensure_future(stepped(client, f"s{n}", way, x)) for n in range(5)]
            await asyncio.sleep(0.3)
            assert way == "prime" or not all(task.done() for task in work)
            server.set_limits(of_acme(rows_per_second=400, rows_burst=5, streams=3))
            for got in await asyncio.wait_for(asyncio.gather(*work), HANG):
                np.testing.assert_allclose(got, want, atol=1e-5)
            for n in range(5):
                assert (await client.session(f"s{n}")).t == 60
        assert server.tenants.get("acme").refused["rows_per_second"]


async def test_packed_rows_of_the_client_library_over_their_rate_go_slower(serve: Serve):
    x = draw(20 * 5, seed=6).reshape(20, 5, 3)
    async with (
        serve(rows_per_second=100, rows_burst=10) as server,
        AsyncClient(server.address, metadata=ACME) as client,
    ):
        sessions = [await client.open("lstm", session_id=f"s{n}") for n in range(5)]
        async with client.packed(sessions) as pack:
            for rows_of_all in x:
                result = await asyncio.wait_for(pack.step(rows_of_all), HANG)
                assert not any(result.errors)
        assert [session.t for session in sessions] == [20] * 5
        refused_messages = server.tenants.get("acme").refused["rows_per_second"]
        assert refused_messages
        assert server.tenants.get("acme").rows.taken == 100  # none was applied and sent again


async def test_an_error_of_the_client_names_the_limit(serve: Serve):
    async with (
        serve(rows_per_second=SLOW, rows_burst=BURST) as server,
        AsyncClient(server.address, metadata=ACME) as client,
    ):
        session = await client.open("lstm", session_id="a")
        await session.prime(draw(BURST))
        with pytest.raises(TenantLimitReached) as refusal:
            await session.step(draw(1)[0], timeout=0.5)
        assert refusal.value.tenant == "acme"
        assert refusal.value.limit == "rows_per_second"
        assert session.t == BURST


async def test_admins_see_what_tenants_use(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counts, "COUNT_SECONDS", 0.1)
    async with serve(rows_per_second=1000, weight=2, open_sessions=7) as server:
        async with AsyncClient(server.address, metadata=ACME) as acme:
            session = await acme.open("lstm", session_id="a")
            await session.prime(draw(30))
        reader = AsyncClient(server.address, metadata=as_tenant("acme", "read,step"))
        async with reader, AsyncClient(server.address, metadata=OTHER) as admin:
            with pytest.raises(PermissionDenied):
                await reader.tenants()

            async def counted() -> bool:
                tenants = {tenant.name: tenant for tenant in await admin.tenants()}
                return bool(tenants["acme"].limits["open_sessions"].used)

            await until(counted)
            tenants = {tenant.name: tenant for tenant in await admin.tenants()}
        assert list(tenants) == ["acme", "default", "other"]
        limits = tenants["acme"].limits
        assert tenants["acme"].weight == 2
        assert (limits["open_sessions"].value, limits["open_sessions"].used) == (7, 1)
        assert (limits["rows_per_second"].value, limits["rows_per_second"].used) == (1000, 30)
        assert limits["streams"].value is None
        text = await scrape(server.metrics_address)
        assert 'stepstate_tenant_rows_total{tenant="acme"} 30.0' in text
        assert 'stepstate_tenant_sessions{tenant="acme"} 1.0' in text


async def test_tenants_are_listed_a_page_at_a_time(config: ServerConfig):
    names = [f"t{number:02}" for number in range(25)]
    limits = LimitTable(tenants=dict.fromkeys(names, TenantLimits()))
    async with (
        running_server(config, authenticator=SaidTenants(), limits=limits) as server,
        stubs(server) as admin,
    ):
        found, token = [], ""
        while True:
            asked = pb.ListTenantsRequest(page_size=10, page_token=token)
            reply = await admin.stub.ListTenants(asked, metadata=ACME)
            found += [tenant.name for tenant in reply.tenants]
            assert len(reply.tenants) <= 10
            token = reply.next_page_token
            if not token:
                break
        assert found == ["acme", "default", *names]
