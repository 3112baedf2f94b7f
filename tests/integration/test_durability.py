"""Durability, spill, takeover, fork, export and import, as any gRPC client sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode as Code
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub as Stub
from tests.integration.wire import (
    TOLERANCE,
    ask,
    draw,
    largest_difference,
    opened,
    raw_stub,
    refusal_in,
    refused,
    request,
    sample,
    scrape,
    until,
    where,
)
from tests.networks import make_network

SYNC, ASYNC, NONE = pb.DURABILITY_SYNC, pb.DURABILITY_ASYNC, pb.DURABILITY_NONE


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Stub]:
    async with raw_stub(server.address) as made:
        yield made


async def outputs(stub: Stub, session_id: str, x: np.ndarray, t: int) -> np.ndarray:
    """Rows one by one from t on."""
    replies = [await stub.Step(request(session_id, t + place, row)) for place, row in enumerate(x)]
    return np.array([reply.y for reply in replies])


def fork(session_id: str, new_session_id: str = "", **fields: object) -> pb.ForkSessionRequest:
    return pb.ForkSessionRequest(session_id=session_id, new_session_id=new_session_id, **fields)


async def export(stub: Stub, session_id: str) -> bytes:
    return (await stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))).snapshot


def restore(snapshot: bytes, session_id: str = "", **fields: object) -> pb.ImportSessionRequest:
    return pb.ImportSessionRequest(snapshot=snapshot, session_id=session_id, **fields)


@pytest.mark.parametrize(
    ("asked", "given"), [(0, ASYNC), (NONE, NONE), (ASYNC, ASYNC), (SYNC, SYNC)]
)
async def test_a_session_tells_its_durability_and_what_of_it_is_durable(stub, asked, given):
    await opened(stub, "a", durability=asked)
    assert (await where(stub, "a")).durability == given
    reply = await stub.Step(request("a", 0, draw(1)))
    assert reply.durable_t == (1 if given == SYNC else 0)
    if given == ASYNC:

        async def saved() -> bool:
            return (await where(stub, "a")).durable_t == 1

        await until(saved)
        assert (await stub.Step(request("a", 1, draw(1)))).durable_t == 1


async def test_the_servers_default_durability_is_the_one_it_was_started_with(config):
    sync = replace(config, durability="sync")
    async with running_server(sync) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        assert (await stub.Step(request("a", 0, draw(1)))).durable_t == 1


async def test_a_durability_that_is_none_of_the_contracts_is_an_invalid_field(stub):
    refusal = await refused(stub.OpenSession(pb.OpenSessionRequest(model="lstm", durability=9)))
    assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "durability")


async def test_a_server_without_a_durable_store_refuses_durability(config):
    forgetful = replace(config, store="memory:")
    async with running_server(forgetful) as server, raw_stub(server.address) as stub:
        for durability in (ASYNC, SYNC):
            asked = pb.OpenSessionRequest(model="lstm", durability=durability)
            refusal = await refused(stub.OpenSession(asked))
            assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "durability")
        await opened(stub, "a")
        assert (await where(stub, "a")).durability == NONE


async def test_a_session_tells_where_it_is_and_who_holds_it(config):
    named = replace(config, server_name="left", slots=1)
    async with running_server(named) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        told = await where(stub, "a")
        assert told.residency == pb.RESIDENCY_RESIDENT
        assert told.owner.startswith("left#")
        await opened(stub, "b")
        spilled = await where(stub, "a")
        assert (spilled.residency, spilled.owner) == (pb.RESIDENCY_SPILLED, "")
        await stub.Step(request("a", 0, draw(1)))
        back = await where(stub, "a")
        assert back.residency == pb.RESIDENCY_RESIDENT
        assert back.epoch > told.epoch


async def test_many_more_sessions_than_slots_on_one_stream_keep_their_numbers_and_order(
    config, network
):
    few = replace(config, slots=4)
    x = draw(6, seed=5)
    async with running_server(few) as server, raw_stub(server.address) as stub:
        names = [f"s{place}" for place in range(20)]
        for name in names:
            await opened(stub, name)
        requests = [request(name, t, row) for t, row in enumerate(x) for name in names]
        replies = await ask(stub, requests)
        for name in names:
            own = [reply for reply in replies if reply.session_id == name]
            assert [reply.t for reply in own] == [1, 2, 3, 4, 5, 6]
            y = np.array([reply.y for reply in own])
            assert largest_difference(y, network.offline(x)) <= TOLERANCE
        text = await scrape(server.metrics_address)
        assert sample(text, "stepstate_session_spills_total") >= 16
        assert sample(text, 'stepstate_sessions{model="lstm",residency="resident"') <= 4


async def test_spilled_sessions_are_listed_once_with_the_others(config):
    async with running_server(replace(config, slots=3)) as server, raw_stub(server.address) as stub:
        for place in range(10):
            await opened(stub, f"s{place}")
        seen, token = [], ""
        while True:
            asked = pb.ListSessionsRequest(page_size=4, page_token=token)
            page = await stub.ListSessions(asked)
            seen += [session.session_id for session in page.sessions]
            token = page.next_page_token
            if not token:
                break
        assert sorted(seen) == [f"s{place}" for place in range(10)]


async def test_refusals_of_spilled_sessions_keep_their_place(config, network):
    x = draw(2)
    async with running_server(replace(config, slots=1)) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        await opened(stub, "b")
        wrong = pb.StepRequest(session_id="a", t=1, x=[1.0])
        sent = [request("a", 0, x[0]), wrong, request("a", 1, x[1]), request("never", 0, x[0])]
        replies = await ask(stub, sent)
        first, second, third = [reply for reply in replies if reply.session_id == "a"]
        assert (first.t, third.t) == (1, 2)
        assert refusal_in(second).reason == "INVALID_FIELD"
        (unknown,) = [reply for reply in replies if reply.session_id == "never"]
        assert refusal_in(unknown).reason == "SESSION_UNKNOWN"


@pytest.mark.parametrize("durability", [SYNC, ASYNC, NONE])
async def test_after_kill_9_each_durability_is_what_it_says(
    start_process: Callable, tmp_path, durability
):
    options = ("--store", f"sqlite:{tmp_path / 'kept.db'}", "--snapshot-interval", "1000")
    x = draw(5)
    with start_process(*options) as first:
        async with raw_stub(first.address) as stub:
            await opened(stub, "a", durability=durability)
            await outputs(stub, "a", x[:4], 0)
        first.process.kill()
        first.process.wait()
    with start_process(*options) as second:
        async with raw_stub(second.address) as stub:
            if durability == SYNC:
                assert (await where(stub, "a")).t == 4
                assert (await stub.Step(request("a", None, x[4]))).t == 5
            elif durability == ASYNC:
                position_unknown = await refused(stub.Step(request("a", None, x[4])))
                assert (position_unknown.code, position_unknown.reason) == (
                    Code.ABORTED,
                    "STEP_POSITION_UNKNOWN",
                )
                ahead = await refused(stub.Step(request("a", 4, x[4])))
                assert (ahead.reason, ahead.metadata["expected_t"]) == ("STEP_AHEAD", "0")
                assert (await stub.Step(request("a", 0, x))).t == 5
            else:
                look = pb.GetSessionRequest(session_id="a")
                step = request("a", 4, x[4])
                for rpc, asked in ((stub.GetSession, look), (stub.Step, step)) * 2:
                    lost = await refused(rpc(asked))
                    assert (lost.code, lost.reason) == (Code.NOT_FOUND, "SESSION_LOST")
                await opened(stub, "a")


async def test_two_servers_on_one_store_take_a_session_from_each_other(config, network):
    x = draw(6)
    left, right = (replace(config, server_name=name) for name in ("left", "right"))
    async with running_server(left) as one, running_server(right) as two:
        async with raw_stub(one.address) as here, raw_stub(two.address) as there:
            await opened(here, "a", durability=SYNC)
            y = [await outputs(here, "a", x[:2], 0), await outputs(there, "a", x[2:4], 2)]
            stale = await refused(here.Step(request("a", 4, x[4])))
            assert stale.code is Code.ABORTED
            assert (stale.reason, stale.metadata["expected_t"]) == ("STALE_OWNER", "4")
            y.append(await outputs(here, "a", x[4:6], 4))
            assert largest_difference(np.concatenate(y), network.offline(x)) <= TOLERANCE
            stale = await refused(there.Step(request("a", None, x[0])))
            assert (stale.code, stale.reason) == (Code.ABORTED, "STALE_OWNER")
            assert stale.metadata["expected_t"] == "6"
        text = await scrape(two.metrics_address)
        assert sample(text, "stepstate_session_takeovers_total") == 1
        assert sample(text, 'stepstate_snapshot_failures_total{reason="fenced"}') == 1


async def test_a_fork_goes_on_apart_from_its_source(stub, network):
    x = draw(8)
    await opened(stub, "a")
    await outputs(stub, "a", x[:4], 0)
    forked = (await stub.ForkSession(fork("a", "b", durability=SYNC))).session
    assert (forked.session_id, forked.t, forked.durable_t) == ("b", 4, 4)
    assert forked.durability == SYNC
    await outputs(stub, "a", draw(2, seed=9), 4)
    y = await outputs(stub, "b", x[4:], 4)
    assert largest_difference(y, network.offline(x)[4:]) <= TOLERANCE
    named = (await stub.ForkSession(fork("a"))).session
    assert named.session_id.startswith("s-")
    assert (await where(stub, "a")).t == 6


async def test_a_fork_is_refused_as_an_opening_is(stub):
    await opened(stub, "a")
    assert (await refused(stub.ForkSession(fork("a", "a")))).code is Code.ALREADY_EXISTS
    assert (await refused(stub.ForkSession(fork("a", "no id")))).field == "session_id"
    assert (await refused(stub.ForkSession(fork("never", "b")))).reason == "SESSION_UNKNOWN"
    negative = fork("a", "b", idle_timeout=Duration(seconds=-1))
    assert (await refused(stub.ForkSession(negative))).field == "idle_timeout"


async def test_a_snapshot_moves_a_session_to_another_server(stub, config, tmp_path, network):
    x = draw(8)
    await opened(stub, "a")
    before = await outputs(stub, "a", x[:5], 0)
    snapshot = await export(stub, "a")
    elsewhere = replace(config, store=f"sqlite:{tmp_path / 'other.db'}")
    async with running_server(elsewhere) as server, raw_stub(server.address) as other:
        moved = (await other.ImportSession(restore(snapshot))).session
        assert (moved.session_id, moved.t, moved.durable_t) == ("a", 5, 5)
        again = await other.Step(request("a", 4, x[4]))
        assert again.replayed
        assert np.array_equal(np.array(again.y), before[4])
        y = await outputs(other, "a", x[5:], 5)
        assert largest_difference(y, network.offline(x)[5:]) <= TOLERANCE
        assert (await refused(other.ImportSession(restore(snapshot)))).reason == "SESSION_EXISTS"
        second = (await other.ImportSession(restore(snapshot, "b"))).session
        assert (second.session_id, second.t) == ("b", 5)


async def test_exporting_the_same_state_gives_the_same_bytes(stub):
    await opened(stub, "a")
    await stub.Step(request("a", 0, draw(5)))
    assert await export(stub, "a") == await export(stub, "a")


async def test_a_damaged_snapshot_is_data_loss(stub):
    await opened(stub, "a")
    snapshot = bytearray(await export(stub, "a"))
    snapshot[len(snapshot) // 2] ^= 4
    for bad in (bytes(snapshot), bytes(snapshot[:-1]), b"", b"STEPSNAP"):
        refusal = await refused(stub.ImportSession(restore(bad, "b")))
        assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "SNAPSHOT_CORRUPT")
    assert (await refused(stub.Step(request("b", 0, draw(1))))).reason == "SESSION_UNKNOWN"


async def test_a_snapshot_of_other_weights_is_a_failed_precondition(stub, config, tmp_path):
    await opened(stub, "a")
    snapshot = await export(stub, "a")
    make_network("lstm", seed=404).write(tmp_path / "models")
    other = replace(config, models=tmp_path / "models", store=f"sqlite:{tmp_path / 'other.db'}")
    async with running_server(other) as server, raw_stub(server.address) as there:
        refusal = await refused(there.ImportSession(restore(snapshot)))
        assert (refusal.code, refusal.reason) == (
            Code.FAILED_PRECONDITION,
            "SNAPSHOT_MODEL_MISMATCH",
        )
        assert refusal.precondition == "lstm/1"


async def test_a_stored_session_of_other_weights_is_refused_and_kept(config, tmp_path):
    make_network("lstm", seed=404).write(tmp_path / "models")
    async with running_server(config) as server, raw_stub(server.address) as stub:
        await opened(stub, "a")
        await stub.Step(request("a", 0, draw(3)))
    other = replace(config, models=tmp_path / "models")
    async with running_server(other) as server, raw_stub(server.address) as stub:
        refusal = await refused(stub.Step(request("a", 3, draw(1))))
        assert refusal.code is Code.FAILED_PRECONDITION
        (reply,) = await ask(stub, [request("a", 3, draw(1))])
        assert refusal_in(reply).reason == "SNAPSHOT_MODEL_MISMATCH"
    async with running_server(config) as server, raw_stub(server.address) as stub:
        assert (await stub.Step(request("a", 3, draw(1)))).t == 4


async def test_health_tells_of_the_store_and_of_the_server_apart(server: Server):
    async with aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "stepstate.v1.StepstateService", "stepstate.store"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_ids_that_are_opened_and_stepped_at_the_same_time_are_opened_once(stub):
    async def one(place: int) -> None:
        name = f"race-{place % 10}"
        with suppress(aio.AioRpcError):  # another one was first
            await stub.OpenSession(pb.OpenSessionRequest(session_id=name, model="lstm"))
        await stub.Step(request(name, None, draw(1)))

    await asyncio.gather(*(one(place) for place in range(100)))
    listed = await stub.ListSessions(pb.ListSessionsRequest())
    assert sorted(s.session_id for s in listed.sessions) == [f"race-{n}" for n in range(10)]
    assert {s.t for s in listed.sessions} == {10}
