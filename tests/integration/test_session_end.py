"""A session that is gone says why; none begins again from zero without a word."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    BLOCKER_ROWS,
    TOLERANCE,
    Refusal,
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
    until,
    where,
)
from tests.networks import Network


async def expire(stub: StepstateServiceStub, session_id: str) -> None:
    """Opens a session, steps it, and lets it expire."""
    await opened(stub, session_id, idle_timeout=Duration(nanos=200_000_000))
    await stub.Step(request(session_id, 0, draw(3)))

    async def gone() -> bool:
        try:
            await where(stub, session_id)
        except grpc.aio.AioRpcError:
            return True
        return False

    await until(gone)


async def close(stub: StepstateServiceStub, session_id: str) -> None:
    await opened(stub, session_id)
    await stub.Step(request(session_id, 0, draw(3)))
    await stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))


async def never(stub: StepstateServiceStub, session_id: str) -> None:
    """Nothing happened to this id."""


@pytest.mark.parametrize(
    ("end", "reason", "told"),
    [
        (expire, "SESSION_EXPIRED", {"t": "3", "idle_timeout_seconds": "0.2"}),
        (close, "SESSION_CLOSED", {"t": "3"}),
        (never, "SESSION_UNKNOWN", {}),
    ],
)
async def test_a_session_that_is_gone_says_why_and_is_not_made_anew(
    stub: StepstateServiceStub, end, reason: str, told: dict[str, str]
):
    await end(stub, "a")

    async def everywhere() -> list[Refusal]:
        return [
            await refused(stub.Step(request("a", 0, draw(1)))),
            await refused(stub.Step(request("a", 3, draw(1)))),
            await refused(stub.Step(request("a", None, draw(1)))),
            await refused(stub.GetSession(pb.GetSessionRequest(session_id="a"))),
            await refused(stub.CloseSession(pb.CloseSessionRequest(session_id="a"))),
            *map(refusal_in, await ask(stub, [request("a", 0, draw(1)), request("a", 3, draw(1))])),
        ]

    for refusal in await everywhere() + await everywhere():
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, reason)
        until_when = refusal.metadata.pop("restore_until", "")
        assert bool(until_when) is (reason == "SESSION_EXPIRED")
        assert refusal.metadata == {"session_id": "a", **told}
        assert "open it" in refusal.message
    assert not (await stub.ListSessions(pb.ListSessionsRequest())).sessions

    # Only a client that opens it begins anew, from zero.
    await opened(stub, "a")
    assert (await stub.Step(request("a", 0, draw(1)))).t == 1


async def test_a_step_keeps_its_session_from_expiring(stub: StepstateServiceStub):
    await opened(stub, "a", idle_timeout=Duration(seconds=600))
    opening = (await where(stub, "a")).expire_time.ToNanoseconds()
    assert (await where(stub, "a")).expire_time.ToNanoseconds() == pytest.approx(opening, abs=1e7)
    for t, rows in ((0, 1), (1, 5)):
        before = (await where(stub, "a")).expire_time.ToNanoseconds()
        await asyncio.sleep(0.02)
        await stub.Step(request("a", t, draw(rows)))
        assert (await where(stub, "a")).expire_time.ToNanoseconds() > before + 15_000_000


async def test_a_session_outlives_its_server(config: ServerConfig, networks: dict[str, Network]):
    x = draw(4)
    async with running_server(config) as first, raw_stub(first.address) as stub:
        await opened(stub, "a")
        await stub.Step(request("a", 0, x[:3]))
    async with running_server(config) as second, raw_stub(second.address) as stub:
        reply = await stub.Step(request("a", None, x[3:]))
        assert (reply.t, reply.durable_t) == (4, 3)
        assert largest_difference(reply.y, networks["lstm"].offline(x)[-1]) <= TOLERANCE


async def test_without_a_durable_store_a_session_ends_with_its_server(config: ServerConfig):
    forgetful = dataclasses.replace(config, store="memory:")
    async with running_server(forgetful) as first, raw_stub(first.address) as stub:
        await opened(stub, "a")
        await stub.Step(request("a", 0, draw(3)))
    async with running_server(forgetful) as second, raw_stub(second.address) as stub:
        assert (await refused(stub.Step(request("a", 3, draw(1))))).reason == "SESSION_UNKNOWN"


async def test_closing_finishes_accepted_steps_and_takes_no_more(stub: StepstateServiceStub):
    await opened(stub, "a")
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    waiting = asyncio.ensure_future(stub.Step(request("a", BLOCKER_ROWS, draw(1))))
    await queued(stub, "a", 2)
    closing = asyncio.ensure_future(stub.CloseSession(pb.CloseSessionRequest(session_id="a")))

    async def ending() -> bool:
        return not (await stub.ListSessions(pb.ListSessionsRequest())).sessions

    await until(ending)
    late = asyncio.ensure_future(refused(stub.Step(request("a", BLOCKER_ROWS + 1, draw(1)))))
    assert not long.done()
    assert ((await long).t, (await waiting).t) == (BLOCKER_ROWS, BLOCKER_ROWS + 1)
    assert (await closing).session.t == BLOCKER_ROWS + 1
    assert (await late).reason == "SESSION_CLOSED"
