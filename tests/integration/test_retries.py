"""A step that carries `t` is applied once, however often it is sent."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from stepstate.server import Server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import (
    BLOCKER_ROWS,
    TOLERANCE,
    ask,
    blocker,
    draw,
    largest_difference,
    opened,
    outputs,
    queued,
    request,
    streamed,
    unary,
    where,
)
from tests.networks import Network

PAYLOADS = {
    "one-row": (1, {}),
    "one-row:inspect": (1, {"inspect": True}),
    "one-row:last_only": (1, {"last_only": True}),
    "many-rows": (9, {}),
    "many-rows:last_only": (9, {"last_only": True}),
    "many-rows:inspect": (9, {"inspect": True}),
    "many-rows:inspect:last_only": (9, {"inspect": True, "last_only": True}),
    "more-rows-than-a-chunk": (700, {}),
}


def assert_repeats(again: pb.StepResponse, first: pb.StepResponse) -> None:
    """A retry has the reply of the first time, bit for bit; only durable_t may have moved on."""
    assert (first.replayed, again.replayed) == (False, True)
    assert first.durable_t <= again.durable_t
    assert answered(again) == answered(first)


def answered(reply: pb.StepResponse) -> bytes:
    """The bytes of all that is the same in a reply and its repetition."""
    kept = pb.StepResponse()
    kept.CopyFrom(reply)
    kept.ClearField("replayed")
    kept.ClearField("durable_t")
    return kept.SerializeToString(deterministic=True)


@pytest.mark.parametrize("send", [unary, streamed])
@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_gets_the_same_t_and_outputs_and_is_applied_once(
    stub: StepstateServiceStub,
    other_stub: StepstateServiceStub,
    networks: dict[str, Network],
    send,
    again,
):
    for name, (rows, options) in PAYLOADS.items():
        x = draw(2 + rows + 2)
        await opened(stub, name)
        await stub.Step(request(name, 0, x[:2]))
        sent = request(name, 2, x[2 : 2 + rows], **options)

        first = await send(stub, sent)
        for retrying in (stub, other_stub):
            assert_repeats(await again(retrying, sent), first)
        assert first.t == (await where(stub, name)).t == 2 + rows

        # The state did not move by the retries, and a later step does not spoil the window.
        after = [await stub.Step(request(name, 2 + rows + k, x[2 + rows + k])) for k in range(2)]
        assert_repeats(await again(stub, sent), first)
        offline = networks["lstm"].offline(x)[-2:].ravel()
        assert largest_difference(outputs(after), offline) <= TOLERANCE


@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_is_the_same_and_tells_what_became_durable_since(
    stub: StepstateServiceStub, server: Server, again
):
    """A snapshot between the two replies moves durable_t, and nothing else."""
    await opened(stub, "a")
    sent = request("a", 0, draw(3))
    first = await stub.Step(sent)
    await server.sessions.writer.save_round()
    second = await again(stub, sent)
    assert_repeats(second, first)
    assert second.durable_t == 3


@pytest.mark.parametrize("again", [unary, streamed])
async def test_a_retry_on_another_connection_while_the_first_is_queued_is_applied_once(
    stub: StepstateServiceStub, other_stub: StepstateServiceStub, networks, again
):
    await opened(stub, "a")
    x = np.concatenate((draw(BLOCKER_ROWS, seed=99), draw(1)))
    sent = request("a", BLOCKER_ROWS, x[-1])
    long = asyncio.ensure_future(stub.Step(blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 1)
    first = asyncio.ensure_future(stub.Step(sent))
    await queued(stub, "a", 2)
    second = asyncio.ensure_future(again(other_stub, sent))
    long_again = asyncio.ensure_future(again(other_stub, blocker("a", rows=BLOCKER_ROWS)))
    await queued(stub, "a", 4)

    assert_repeats(await second, await first)
    assert_repeats(await long_again, await long)
    assert (await where(stub, "a")).t == BLOCKER_ROWS + 1
    offline = networks["lstm"].offline(x)[-1]
    assert largest_difference((await first).y, offline) <= TOLERANCE


async def test_a_stream_sent_twice_whole_is_applied_once(
    stub: StepstateServiceStub, other_stub: StepstateServiceStub, networks: dict[str, Network]
):
    x = draw(32)  # what a server remembers by default
    await opened(stub, "a")
    items = [request("a", t, row) for t, row in enumerate(x)]
    first, second = await asyncio.gather(ask(stub, items), ask(other_stub, items))

    applied = {reply.t: reply for reply in (*first, *second) if not reply.replayed}
    repeated = [reply for reply in (*first, *second) if reply.replayed]
    assert sorted(applied) == list(range(1, 33))
    assert len(repeated) == 32
    for reply in repeated:
        assert reply.y == applied[reply.t].y
    got = outputs(applied[t] for t in sorted(applied))
    assert largest_difference(got, networks["lstm"].offline(x).ravel()) <= TOLERANCE
