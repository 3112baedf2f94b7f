"""The sessions of others, and the parts of a server that must work after every attack."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.honest import MODEL, rows
from tests.integration.wire import raw_stub, sample, scrape
from tests.networks import Network

SESSIONS = 8
ROWS = 40
ANSWER_SECONDS = 15.0
ZERO = (
    "stepstate_queue_rows",
    "stepstate_slots_leaked",
    *(
        f'stepstate_memory_bytes{{use="{use}"}}'
        for use in ("requests", "replies", "bindings", "snapshots")
    ),
)
"""Series that are 0 when no client is there."""
DURABILITIES = (pb.DURABILITY_ASYNC, pb.DURABILITY_SYNC)


class Bystanders:
    """Sessions of a client that sends nothing while the attack lasts."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._replies: dict[str, pb.StepResponse] = {}

    async def open(self) -> None:
        """Opens them, each with one request whose reply the server remembers."""
        async with raw_stub(self._address) as stub:
            for place in range(SESSIONS):
                name = f"bystander-{place}"
                durability = DURABILITIES[place % 2]
                await stub.OpenSession(
                    pb.OpenSessionRequest(session_id=name, model=MODEL, durability=durability)
                )
                self._replies[name] = await stub.Step(self._request(name))

    async def changed(self) -> list[str]:
        """Those that are gone, at another t, or whose reply is not remembered."""
        found = []
        async with raw_stub(self._address) as stub:
            for name, reply in self._replies.items():
                try:
                    again = await stub.Step(self._request(name), timeout=ANSWER_SECONDS)
                except grpc.aio.AioRpcError as error:
                    found.append(f"{name}: {error.details()}")
                    continue
                if not again.replayed or (again.t, again.y) != (reply.t, reply.y):
                    found.append(f"{name} has another reply to the same request")
        return found

    @staticmethod
    def _request(name: str) -> pb.StepRequest:
        return pb.StepRequest(session_id=name, t=0, x=rows(name, ROWS).ravel())


async def answers(address: str) -> bool:
    """Whether a server answers at all."""
    async with raw_stub(address) as stub:
        try:
            await stub.ListModels(pb.ListModelsRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    return True


async def broken(address: str, metrics_address: str, network: Network) -> list[str]:
    """What does not work, of what everybody needs."""
    found = []

    async def tried(what: str, work: Awaitable[str]) -> None:
        try:
            problem = await asyncio.wait_for(work, ANSWER_SECONDS)
        except (grpc.aio.AioRpcError, OSError, TimeoutError) as error:
            problem = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
        if problem:
            found.append(f"{what}: {problem}")

    async with raw_stub(address) as stub:
        await tried("ListSessions", _lists(stub))
        await tried("a new session", _steps(stub, network))
        await tried("ListModels", _models(stub))
    await tried("metrics", _counts(metrics_address))
    return found


async def _lists(stub: StepstateServiceStub) -> str:
    names, token = set(), ""
    while True:
        page = await stub.ListSessions(pb.ListSessionsRequest(page_size=1000, page_token=token))
        names |= {session.session_id for session in page.sessions}
        token = page.next_page_token
        if not token:
            break
    missing = {f"bystander-{place}" for place in range(SESSIONS)} - names
    return f"{missing} are missing" if missing else ""


async def _models(stub: StepstateServiceStub) -> str:
    reply = await stub.ListModels(pb.ListModelsRequest())
    return "" if any(model.name == MODEL for model in reply.models) else "the model is missing"


async def _steps(stub: StepstateServiceStub, network: Network) -> str:
    x = rows("new-1", 5)
    opened = await stub.OpenSession(pb.OpenSessionRequest(model=MODEL))
    name = opened.session.session_id
    reply = await stub.Step(pb.StepRequest(session_id=name, t=0, x=x.ravel()))
    await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
    want = network.offline(x)
    got = np.array(reply.y).reshape(want.shape)
    return "" if np.abs(got - want).max() <= 1e-5 else "its outputs are wrong"


async def _counts(metrics_address: str) -> str:
    """The metrics are there, and say that nothing is left."""
    for _ in range(50):  # what a client left is cleared when its connection's end is noticed
        text = await scrape(metrics_address)
        left = {name: sample(text, name) for name in ZERO if sample(text, name)}
        if not left:
            return ""
        await asyncio.sleep(0.1)
    return f"are not 0: {left}"
